"""The Hugging Face folder: its files, the way back from one, and what is refused."""

import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxlm.config import Config, ModelConfig, SampleConfig
from jaxlm.core.parameters import tree_of
from jaxlm.data.tokenizer import Tokenizer, load_tokenizer
from jaxlm.errors import RunError, UsageError
from jaxlm.interop import huggingface
from jaxlm.interop.gguf import write_gguf
from jaxlm.interop.huggingface import (
    ForeignTokenizer,
    check_init,
    edited_texts,
    read_params,
    read_sizes,
    read_tokenizer,
)
from jaxlm.storage import atomic
from tests.tiny_run import disk_room, is_one_line, listing

SIZES = {"vocab_size": 300, "context": 16, "layers": 3, "heads": 4, "width": 16, "mlp_width": 24}
MODELS = {
    "tied": ModelConfig(**SIZES),
    "shared": ModelConfig(**SIZES, kv_heads=2, tied=False, rope_theta=500_000.0, norm_eps=1e-5),
    "qk_norm": ModelConfig(**SIZES, qk_norm=True),
}
TEXT = "Once upon a time,  there\twas\n\n a Ünïcödé 日本語 😀 king's 123 <|endoftext|> \x00 end  "


def write_model(folder, config, params, card):
    """Writes a model with GPT-2's tokenizer."""
    return huggingface.write_model(folder, config, params, load_tokenizer(config.model.vocab_size), card)


def random_params(model):
    rng = np.random.default_rng(0)
    return tree_of(model, lambda parameter: rng.normal(size=parameter.shape).astype(np.float32))


@pytest.fixture(scope="module", params=MODELS)
def written(request, tmp_path_factory):
    """A model, its parameters and its folder."""
    model = MODELS[request.param]
    params = random_params(model)
    folder = tmp_path_factory.mktemp("written") / "model"
    return model, params, write_model(folder, Config(model=model), params, "# A card of \udcff 日")


@pytest.fixture
def folder(tmp_path):
    """A folder to damage."""
    return write_model(tmp_path / "model", Config(model=MODELS["tied"]), random_params(MODELS["tied"]), "")


def change(file, **fields):
    changed = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in changed.items() if value != "absent"}))


def test_the_folder_has_the_files_that_other_programs_read(written):
    _, _, folder = written
    names = {"config.json", "generation_config.json", "model.safetensors", "README.md", "merges.txt", "vocab.json"}
    assert {path.name for path in folder.iterdir()} == names | {"tokenizer.json", "tokenizer_config.json"}
    card = "# A card of ? 日\n"
    digest = hashlib.sha256(card.encode()).hexdigest()
    assert re.fullmatch(f"{re.escape(card)}<!-- .* {digest} -->\n", (folder / "README.md").read_text(encoding="utf-8"))
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_the_json_files_describe_the_model(written):
    model, _, folder = written
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False}
    qwen3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "use_sliding_window": False}
    assert json.loads((folder / "config.json").read_text()) == (qwen3 if model.qk_norm else llama) | {
        "hidden_act": "silu",
        "attention_bias": False,
        "vocab_size": 300,
        "max_position_embeddings": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if model.tied else 2,
        "head_dim": 4,
        "hidden_size": 16,
        "intermediate_size": 24,
        "rms_norm_eps": 1e-6 if model.tied else 1e-5,
        "rope_theta": 10_000.0 if model.tied else 500_000.0,
        "tie_word_embeddings": model.tied,
        "bos_token_id": 299,
        "eos_token_id": 299,
        "torch_dtype": "float32",
    }
    assert json.loads((folder / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 16,
    }
    with safe_open(folder / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt", "jaxlm.sha256": mock.ANY, "jaxlm.texts_sha256": mock.ANY}


def test_matrices_are_transposed_and_each_layer_has_its_own(written):
    model, params, folder = written
    tensors = load_file(folder / "model.safetensors")
    assert len(tensors) == 2 + (9 + 2 * model.qk_norm) * model.layers + (not model.tied)
    if model.qk_norm:
        scales = params["blocks"]["key_norm"]
        np.testing.assert_array_equal(tensors["model.layers.1.self_attn.k_norm.weight"], scales[1])
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], params["embedding"])
    np.testing.assert_array_equal(tensors["model.layers.2.self_attn.k_proj.weight"], params["blocks"]["key"][2].T)
    np.testing.assert_array_equal(tensors["model.layers.1.mlp.down_proj.weight"], params["blocks"]["down"][1].T)
    assert ("lm_head.weight" in tensors) == (not model.tied)
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}


def test_import_restores_what_export_wrote(written):
    model, params, folder = written
    assert read_sizes(folder) == model
    back = read_params(folder, model)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert isinstance(read_tokenizer(folder, model.vocab_size), Tokenizer)


@pytest.mark.parametrize("leaf", ["extra", "blocks/extra", "norm", "head"])
def test_an_unknown_or_missing_parameter_is_an_error(tmp_path, leaf):
    pytest.importorskip("gguf")
    model, params = MODELS["tied"], random_params(MODELS["tied"])
    *groups, name = leaf.split("/")
    node = params[groups[0]] if groups else params
    if name in node:
        del node[name]
    else:
        node[name] = np.zeros((3, 16), np.float32)
    with pytest.raises(ValueError, match=leaf):
        write_model(tmp_path / "model", Config(model=model), params, "")
    with pytest.raises(ValueError, match=leaf):
        write_gguf(tmp_path / "model.gguf", model, params, load_tokenizer(300), "f32")
    assert list(tmp_path.iterdir()) == []


def test_a_parameter_of_another_shape_is_an_error(tmp_path):
    params = random_params(MODELS["tied"])
    params["blocks"]["up"] = params["blocks"]["up"][:2]
    with pytest.raises(ValueError, match=r"blocks/up has the shape \(2, 16, 24\), not \(3, 16, 24\)"):
        write_model(tmp_path / "model", Config(model=MODELS["tied"]), params, "")


@pytest.mark.parametrize("size", [257, 1000, pytest.param(50257, marks=pytest.mark.slow)])
def test_the_tokenizer_files_give_the_ids_of_gpt2(size, tmp_path):
    """Read by `tokenizers`; tests/test_interop.py runs every program that reads these files."""
    model, own = ModelConfig(**SIZES | {"vocab_size": size}), load_tokenizer(size)
    folder = write_model(tmp_path / "model", Config(model=model), random_params(model), "")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = TEXT.replace("<|endoftext|>", "")
    assert tokenizer.encode(text).ids == own.encode(text).tolist()
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("a<|endoftext|>").ids[-1] == size - 1
    assert json.loads((folder / "vocab.json").read_text()) == {name: i for i, name in enumerate(own.names())}
    assert (folder / "merges.txt").read_text().splitlines()[1:] == own.merges()


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [(0.7, {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9}), (0, {"do_sample": False})],
)
def test_generation_config_has_the_runs_sampling_settings(tmp_path, temperature, expected):
    config = Config(model=MODELS["tied"], sample=SampleConfig(temperature=temperature, top_k=5, top_p=0.9))
    folder = write_model(tmp_path / "model", config, random_params(config.model), "")
    fields = json.loads((folder / "generation_config.json").read_text())
    assert fields == expected | {"bos_token_id": 299, "eos_token_id": 299, "pad_token_id": 299}


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bit_weights_in_several_files_are_read_as_float32(folder, dtype):
    file = folder / "model.safetensors"
    tensors = {name: tensor.astype(dtype) for name, tensor in load_file(file).items()}
    file.unlink()
    parts = {f"model-{part}-of-3.safetensors": sorted(tensors)[part - 1 :: 3] for part in (1, 2, 3)}
    for name, part in parts.items():
        save_file({tensor: tensors[tensor] for tensor in part}, folder / name)
    index = {"metadata": {}, "weight_map": {tensor: name for name, part in parts.items() for tensor in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    back, exact = read_params(folder, MODELS["tied"]), random_params(MODELS["tied"])
    for leaf, expected in zip(jax.tree.leaves(back), jax.tree.leaves(exact), strict=True):
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf, expected.astype(dtype).astype(np.float32))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_key_value_heads": None}, {}),
        ({"num_key_value_heads": "absent", "head_dim": "absent", "rope_theta": "absent"}, {}),
        ({"head_dim": None, "rope_scaling": None, "quantization_config": None}, {}),
        ({"rope_theta": "absent", "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, {"rope_theta": 5e5}),
        ({"rope_theta": 1_000_000}, {"rope_theta": 1e6}),
        ({"vocab_size": 128_256}, {}),
        ({"tie_word_embeddings": "absent"}, {"tied": False}),
        ({"max_position_embeddings": "absent"}, {"context": 2048}),
        ({"pretraining_tp": 1, "mlp_bias": False, "use_cache": True}, {}),
    ],
)
def test_config_json_of_other_programs_is_read(folder, fields, expected):
    change(folder / "config.json", **fields)
    assert read_sizes(folder) == dataclasses.replace(MODELS["tied"], **expected)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"head_dim": 4, "use_sliding_window": "absent", "sliding_window": 4096, "max_window_layers": 3}, {}),
        ({"max_position_embeddings": "absent"}, {"context": 32_768}),
        ({"num_key_value_heads": 2, "rms_norm_eps": 1e-5}, {"kv_heads": 2, "norm_eps": 1e-5}),
    ],
)
def test_config_json_of_a_qwen3_is_read(tmp_path, fields, expected):
    model = MODELS["qk_norm"]
    folder = write_model(tmp_path / "model", Config(model=model), random_params(model), "")
    change(folder / "config.json", **fields)
    assert read_sizes(folder) == dataclasses.replace(model, **expected)
    for refused, named in (({"head_dim": "absent"}, "head_dim is 128"), ({"use_sliding_window": True}, "sliding")):
        change(folder / "config.json", **refused)
        with pytest.raises(UsageError, match=named):
            read_sizes(folder)


def test_norms_of_queries_and_keys_belong_to_a_qwen3(tmp_path):
    folders = {name: tmp_path / name for name in ("qk_norm", "tied")}
    for name, folder in folders.items():
        write_model(folder, Config(model=MODELS[name]), random_params(MODELS[name]), "")
    with pytest.raises(UsageError, match=r"contains the tensor .*\.[qk]_norm\.weight"):
        read_params(folders["qk_norm"], MODELS["tied"])
    with pytest.raises(UsageError, match=r"no tensor .*\.q_norm\.weight"):
        read_params(folders["tied"], MODELS["qk_norm"])
    with pytest.raises(UsageError, match=r"add --config\.model\.qk_norm=True$"):
        check_init(Config(model=MODELS["tied"], init_from=str(folders["qk_norm"])))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "gpt2"}, "gpt2.* llama and qwen3"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"model_type": "absent", "hidden_size": "absent"}, "hidden_size"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "llama3"),
        ({"rope_scaling": "linear"}, "rope_parameters"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"head_dim": 8}, "head_dim"),
        ({"num_hidden_layers": "absent"}, "num_hidden_layers"),
        ({"num_hidden_layers": 0}, "layers"),
        ({"num_attention_heads": "8"}, "heads"),
        ({"num_key_value_heads": 3}, "kv_heads"),
        ({"tie_word_embeddings": 1}, "tied"),
        ({"hidden_size": 1 << 40}, "width"),
    ],
)
def test_an_unsupported_model_is_refused(folder, fields, named):
    change(folder / "config.json", **fields)
    with pytest.raises(UsageError, match=named) as caught:
        read_sizes(folder)
    assert is_one_line(caught.value)
    assert str(folder / "config.json") in str(caught.value)


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "model.norm.weight"),
        (lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj"),
        (lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:-1]}), r"\[15\].*\[16\]"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(16, np.float32)}), "q_proj.bias"),
        (lambda t: t.update({"model.layers.3.input_layernorm.weight": np.zeros(16, np.float32)}), "layers.3"),
        (lambda t: t.update({"model.norm.weight": np.zeros(16, np.int8)}), "int8"),
    ],
)
def test_tensors_that_do_not_fit_config_json_are_refused(folder, change, named):
    change_tensors(folder, change)
    with pytest.raises(UsageError, match=named) as caught:
        read_params(folder, MODELS["tied"])
    assert is_one_line(caught.value)


def test_redundant_tensors_of_other_programs_are_ignored(folder):
    before = read_params(folder, MODELS["tied"])
    extra = {"lm_head.weight": np.zeros((300, 16), np.float32)}
    extra |= {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32)}
    change_tensors(folder, lambda tensors: tensors.update(extra))
    jax.tree.map(np.testing.assert_array_equal, read_params(folder, MODELS["tied"]), before)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("content", [None, b"", b"[]", b"\x80\x02}", b"{" * 100_000, b"\xff" * 64])
def test_a_damaged_or_missing_file_is_named(folder, name, content):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(UsageError) as caught:
        model = read_sizes(folder)
        read_tokenizer(folder, model.vocab_size)
        read_params(folder, model)
    assert is_one_line(caught.value)
    assert str(folder / name) in str(caught.value)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 3}, {"a": "elsewhere.safetensors"}])
def test_a_damaged_index_is_refused(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UsageError, match=r"index\.json|elsewhere"):
        read_params(folder, MODELS["tied"])


def test_a_run_of_other_sizes_is_told_the_flags_to_add(folder):
    fits = Config(model=dataclasses.replace(MODELS["tied"], context=8), init_from=str(folder))
    check_init(fits)
    other = dataclasses.replace(fits, model=dataclasses.replace(fits.model, layers=2, tied=False))
    with pytest.raises(UsageError, match=r"--config\.model\.layers=3 --config\.model\.tied=True$") as caught:
        check_init(other)
    assert is_one_line(caught.value)


def test_a_run_cannot_start_with_another_tokenizer(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"] |= {"vocab": {"!": 0, "b": 1, "<|endoftext|>": 299}, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="tokenizer"):
        check_init(Config(model=MODELS["tied"], init_from=str(folder)))


@pytest.mark.parametrize(
    ("eos_token_id", "end_of_text"),
    [(5, 5), ([7, 8], 7), (299, 299), (300, None), (-1, None), (None, None), ("5", None)],
)
def test_the_end_of_text_of_another_tokenizer_is_its_first_eos_token(folder, eos_token_id, end_of_text):
    change(folder / "tokenizer.json", normalizer={"type": "Lowercase"})
    change(folder / "config.json", eos_token_id=eos_token_id)
    if end_of_text is not None:
        assert read_tokenizer(folder, 300).end_of_text == end_of_text
        return
    with pytest.raises(UsageError, match="eos_token_id") as caught:
        read_tokenizer(folder, 300)
    assert is_one_line(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}},
        {"pre_tokenizer": None},
        {"post_processor": {"type": "BertProcessing", "sep": ["<|endoftext|>", 299], "cls": ["<|endoftext|>", 299]}},
    ],
)
def test_the_same_tokens_with_other_processing_are_another_tokenizer(folder, fields):
    change(folder / "tokenizer.json", **fields)
    assert isinstance(read_tokenizer(folder, 300), ForeignTokenizer)


def test_other_files_of_the_folder_stay(folder):
    (folder / ".git").mkdir()
    for name in ("x.gguf", ".git/HEAD", "model.safetensors.tmp", "README.md.tmp"):
        (folder / name).write_text("mine")
    before, doubled = listing(folder), jax.tree.map(lambda leaf: leaf * 2, random_params(MODELS["tied"]))
    assert write_model(folder, Config(model=MODELS["tied"]), doubled, "new") == folder
    jax.tree.map(np.testing.assert_array_equal, read_params(folder, MODELS["tied"]), doubled)
    after = listing(folder)
    changed = {path for path in before | after if before.get(path) != after.get(path)}
    assert changed == {str(folder / name) for name in ("model.safetensors", "README.md")}
    assert list(folder.parent.iterdir()) == [folder]


def test_the_same_model_is_not_written_again_and_a_persons_edits_of_it_stay(folder, monkeypatch):
    change(folder / "generation_config.json", temperature=0.1)
    (folder / "merges.txt").unlink()
    before = listing(folder)
    write_model(folder, Config(model=MODELS["tied"]), random_params(MODELS["tied"]), "")
    assert listing(folder).keys() - before.keys() == {str(folder / "merges.txt")}
    assert listing(folder) == before | {str(folder / "merges.txt"): (folder / "merges.txt").read_bytes()}
    monkeypatch.setattr(atomic, "new_file", None)
    write_model(folder, Config(model=MODELS["tied"]), random_params(MODELS["tied"]), "")


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "config.json"])
def test_an_edited_text_stays_beside_new_weights_and_is_named(folder, name, temperature):
    """Also the second time. What the settings change is replaced, unless it is the edited text."""
    change(folder / name, more=1)
    text, params = (folder / name).read_bytes(), random_params(MODELS["tied"])
    config = Config(model=MODELS["tied"], sample=SampleConfig(temperature=temperature))
    for factor in (2, 3, 3):
        write_model(folder, config, jax.tree.map(lambda leaf, factor=factor: leaf * factor, params), "new")
        assert (folder / name).read_bytes() == text
        assert edited_texts(folder) == [name]
        np.testing.assert_array_equal(read_params(folder, MODELS["tied"])["embedding"], params["embedding"] * factor)
    if name != "generation_config.json":
        assert json.loads((folder / "generation_config.json").read_text())["temperature"] == temperature


def test_an_edited_config_json_is_not_kept_beside_another_model(folder):
    change(folder / "config.json", more=1)
    before, model = listing(folder), dataclasses.replace(MODELS["tied"], layers=2)
    with pytest.raises(RunError, match=r"config\.json is not as .* wrote it: move it away"):
        write_model(folder, Config(model=model), random_params(model), "")
    assert listing(folder) == before


def test_a_text_of_a_person_that_was_not_recorded_stays(folder):
    """Earlier versions recorded no hashes of texts."""
    file, params = folder / "model.safetensors", random_params(MODELS["tied"])
    with safe_open(file, framework="np") as opened:
        metadata = opened.metadata()
    del metadata["jaxlm.texts_sha256"]
    save_file(load_file(file), file, metadata=metadata)
    assert edited_texts(folder) == []
    change(folder / "generation_config.json", temperature=0.1)
    text = (folder / "generation_config.json").read_bytes()
    write_model(folder, Config(model=MODELS["tied"]), jax.tree.map(np.negative, params), "")
    assert (folder / "generation_config.json").read_bytes() == text
    assert edited_texts(folder) == ["generation_config.json"]


@pytest.mark.parametrize("edit", [b"mine", b"", b"# new\n", b"\xff<!-- \xff -->\n"])
def test_an_edited_card_stays_and_an_unedited_one_is_replaced(folder, edit):
    params, card = random_params(MODELS["tied"]), folder / "README.md"
    write_model(folder, Config(model=MODELS["tied"]), params, "new")
    assert card.read_text().startswith("new\n<!--")
    for text in (edit, b"My words.\n" + card.read_bytes(), card.read_bytes() + b"My words.\n"):
        card.write_bytes(text)
        assert edited_texts(folder) == ["README.md"]
        write_model(folder, Config(model=MODELS["tied"]), jax.tree.map(np.negative, params), "newer")
        assert card.read_bytes() == text


def save_again(folder):
    """As a fine-tuning program does that keeps the metadata."""
    file = folder / "model.safetensors"
    with safe_open(file, framework="np") as opened:
        metadata = opened.metadata()
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, metadata=metadata)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (save_again, "model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"mine"), "model.safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "config.json"),
    ],
)
def test_a_model_that_jaxlm_did_not_write_is_refused(folder, change, named):
    change(folder)
    if named == "config.json":
        (folder / named).write_text("{}")
    before = listing(folder)
    for params in (random_params(MODELS["tied"]), jax.tree.map(np.negative, random_params(MODELS["tied"]))):
        with pytest.raises(RunError, match=f"{named} is not as .* wrote it: move it away") as caught:
            write_model(folder, Config(model=MODELS["tied"]), params, "new")
        assert is_one_line(caught.value)
        assert listing(folder) == before


def test_the_model_of_an_earlier_version_stays_unless_it_differs(folder):
    """It has the same tensors and no mark."""
    file = folder / "model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt"})
    before, params = listing(folder), random_params(MODELS["tied"])
    write_model(folder, Config(model=MODELS["tied"]), params, "")
    with pytest.raises(RunError, match="move it away"):
        write_model(folder, Config(model=MODELS["tied"]), jax.tree.map(np.negative, params), "")
    assert listing(folder) == before


def test_a_link_to_a_folder_elsewhere_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to("disk")
    write_model(tmp_path / "model", Config(model=MODELS["tied"]), random_params(MODELS["tied"]), "")
    assert (tmp_path / "model").is_symlink()
    assert (tmp_path / "disk" / "model.safetensors").is_file()
    (tmp_path / "model").unlink()
    (tmp_path / "model").symlink_to("not mounted")
    for path in (tmp_path / "model", tmp_path / "model/below"):
        with pytest.raises(RunError, match=r"the target of the link .*model is missing.*not mounted") as caught:
            write_model(path, Config(model=MODELS["tied"]), random_params(MODELS["tied"]), "")
        assert is_one_line(caught.value)
        assert "move" not in str(caught.value)


def test_a_model_whose_weights_a_person_deleted_is_written_with_its_card(folder):
    (folder / "model.safetensors").unlink()
    write_model(folder, Config(model=MODELS["tied"]), random_params(MODELS["tied"]), "new")
    assert (folder / "model.safetensors").is_file()
    assert (folder / "README.md").read_text().startswith("new\n")


def test_all_leftovers_of_a_killed_call_are_deleted_even_if_nothing_is_to_write(folder):
    whole = listing(folder)
    for name in ("merges.txt", "model.safetensors"):
        (folder / f".{name}.jaxlm-0123456789abcdef.tmp").write_text("half")
    write_model(folder, Config(model=MODELS["tied"]), random_params(MODELS["tied"]), "")
    assert listing(folder) == whole


@pytest.mark.parametrize("layers", range(1, 9))
def test_the_tensors_are_aligned_to_8_bytes(tmp_path, layers):
    model = ModelConfig(**SIZES | {"layers": layers, "mlp_width": 10**layers if layers < 5 else 8})
    folder = write_model(tmp_path / "model", Config(model=model), random_params(model), "")
    with (folder / "model.safetensors").open("rb") as file:
        assert int.from_bytes(file.read(8), "little") % 8 == 0


class Killed(BaseException):
    pass


def kill_before(monkeypatch, number):
    """The process ends before its system call `number` of those that change a folder, and makes no more of them."""
    done = []

    def call(original, *args, **kwargs):
        if len(done) >= number:
            raise Killed
        done.append(args)
        return original(*args, **kwargs)

    for name in ("mkdir", "fsync", "replace", "rename", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, partial(call, getattr(os, name)))


OLD, NEW = Config(model=MODELS["tied"]), Config(model=MODELS["shared"])
KILLS = {  # the model in the folder, what is written, and whether a reader always finds one of the two
    "no folder": (None, OLD, False),
    "another step": (OLD, OLD, True),
    "another model": (OLD, NEW, False),
    "other samples": (OLD, dataclasses.replace(OLD, sample=SampleConfig(temperature=0)), False),
    "another vocabulary": (OLD, Config(model=dataclasses.replace(MODELS["tied"], vocab_size=301)), False),
}


@pytest.mark.parametrize("case", KILLS)
def test_a_kill_leaves_the_old_or_the_new_model_after_the_same_call_again(tmp_path, case):
    old, new, always = KILLS[case]

    def write(folder, config, factor=1):
        write_model(folder, config, jax.tree.map(lambda leaf: leaf * factor, random_params(config.model)), f"{factor}")

    def files(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir() if not atomic.leftover_of(path.name)}

    def model(folder):
        return {name: data for name, data in files(folder).items() if name != "README.md"}

    write(tmp_path / "whole", new, 2)
    if old:
        write(tmp_path / "old", old)
        (tmp_path / "old" / "mine.gguf").write_text("mine")
        (tmp_path / "whole" / "mine.gguf").write_text("mine")
    for number in itertools.count():
        folder = tmp_path / f"{number}"
        if old:
            shutil.copytree(tmp_path / "old", folder)
        with pytest.MonkeyPatch.context() as patch:
            kill_before(patch, number)
            try:
                write(folder, new, 2)
                break
            except Killed:
                pass
        if old and model(folder) not in (model(tmp_path / "old"), model(tmp_path / "whole")):
            assert not always
            assert "config.json" not in files(folder)  # no program loads it
        write(folder, new, 2)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == files(tmp_path / "whole")
    assert number > 5


def test_all_files_are_synced_before_the_first_is_replaced(folder, monkeypatch):
    log, replace, unlink = [], Path.replace, Path.unlink
    monkeypatch.setattr(Path, "replace", lambda self, target: (log.append(target.name), replace(self, target)))
    monkeypatch.setattr(
        Path, "unlink", lambda self, **flags: (log.append(f"unlink {self.name}"), unlink(self, **flags))
    )
    monkeypatch.setattr(atomic, "sync", lambda path: log.append(f"sync {atomic.leftover_of(path.name) or path.name}"))
    model = dataclasses.replace(MODELS["tied"], layers=2)
    write_model(folder, Config(model=model), random_params(model), "new")
    log = [entry for entry in log if not entry.endswith(".tmp")]
    removed = log.index("unlink config.json")
    assert set(log[:removed]) == {f"sync {name}" for name in ("config.json", "model.safetensors", "README.md")}
    assert log[removed + 1 :] == [
        "sync model",
        *("sync README.md", "README.md", "sync model"),
        *("sync model.safetensors", "model.safetensors", "sync model"),
        *("sync config.json", "config.json", "sync model"),
    ]


def test_a_gguf_file_is_synced_before_it_replaces_an_earlier_one(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    log, replace = [], Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: (log.append(target.name), replace(self, target)))
    monkeypatch.setattr(atomic, "sync", lambda path: log.append(f"sync {atomic.leftover_of(path.name) or path.name}"))
    write_gguf(tmp_path / "model.gguf", MODELS["tied"], random_params(MODELS["tied"]), load_tokenizer(300), "f32")
    assert log == ["sync model.gguf", "model.gguf", f"sync {tmp_path.name}"]


@pytest.mark.parametrize("room", [100, 15_000])
def test_a_full_disk_leaves_the_folder_unchanged(folder, room):
    before, new = listing(folder), folder.with_name("new") / "deep"
    other = jax.tree.map(np.negative, random_params(MODELS["tied"]))
    with disk_room(room):
        for target in (folder, new):
            with pytest.raises(RunError, match=r"(?i)too large.*larger files"):
                write_model(target, Config(model=MODELS["tied"]), other, "")
    assert listing(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def pad(folder, rows=64):
    """Adds rows that no token has to the vocabulary, as programs do for speed."""
    change(folder / "config.json", vocab_size=300 + rows)
    names = ("model.embed_tokens.weight", "lm_head.weight")

    def add_rows(tensors):
        for name in tensors.keys() & set(names):
            tensors[name] = np.concatenate([tensors[name], np.full((rows, 16), 9, np.float32)])

    change_tensors(folder, add_rows)


@pytest.mark.parametrize("name", MODELS)
def test_the_rows_of_a_padded_vocabulary_are_cut(tmp_path, name):
    model, params = MODELS[name], random_params(MODELS[name])
    folder = write_model(tmp_path / "model", Config(model=model), params, "")
    pad(folder)
    assert read_sizes(folder) == model
    jax.tree.map(np.testing.assert_array_equal, read_params(folder, model), params)
    assert isinstance(read_tokenizer(folder, 300), Tokenizer)
    check_init(Config(model=model, init_from=str(folder)))
    with pytest.raises(UsageError, match=r"add --config\.model\.vocab_size=300$"):
        check_init(Config(model=dataclasses.replace(model, vocab_size=301), init_from=str(folder)))


def test_the_rows_must_be_those_of_config_json(folder):
    pad(folder)
    change(folder / "config.json", vocab_size=365)
    with pytest.raises(UsageError, match=r"\[364, 16\], not \[365, 16\] as in config.json"):
        read_params(folder, read_sizes(folder))


@pytest.mark.parametrize(
    ("vocab", "added", "rows"),
    [
        ({"a": 0, "b": 40}, [{"id": 41, "content": "<s>"}], 42),
        ([["a", 0.5], ["b", 0.5]], None, 2),
        ({"a": 0, "b": 400}, [], 300),
        ({"a": "1", "b": None, "c": True}, ["<s>", {"id": "2"}], 300),
        (7, 7, 300),
        ({"a": -5}, [], 300),
    ],
)
def test_the_rows_of_any_tokenizer_end_with_its_last_token(folder, vocab, added, rows):
    change(folder / "tokenizer.json", model={"vocab": vocab}, added_tokens=added)
    assert read_sizes(folder).vocab_size == rows


def test_generation_config_keeps_all_tokens_where_the_run_does(tmp_path):
    config = Config(model=MODELS["tied"], sample=SampleConfig(top_k=0, top_p=1.0))
    folder = write_model(tmp_path / "model", config, random_params(MODELS["tied"]), "")
    fields = json.loads((folder / "generation_config.json").read_text())
    assert (fields["top_k"], fields["top_p"]) == (0, 1.0)
