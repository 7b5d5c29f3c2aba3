"""The Hugging Face folder: its files, the way back from one, and what is refused."""

import dataclasses
import json
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxlm.config import Config, ModelConfig, SampleConfig
from jaxlm.core.parameters import tree_of
from jaxlm.data.tokenizer import Tokenizer, load_tokenizer
from jaxlm.errors import RunError, UsageError
from jaxlm.interop.gguf import write_gguf
from jaxlm.interop.huggingface import (
    ForeignTokenizer,
    check_init,
    read_params,
    read_sizes,
    read_tokenizer,
    write_model,
)
from jaxlm.storage import atomic
from tests.tiny_run import disk_room, is_one_line, listing

SIZES = {"vocab_size": 300, "context": 16, "layers": 3, "heads": 4, "width": 16, "mlp_width": 24}
MODELS = {
    "tied": ModelConfig(**SIZES),
    "shared": ModelConfig(**SIZES, kv_heads=2, tied=False, rope_theta=500_000.0, norm_eps=1e-5),
}
TEXT = "Once upon a time,  there\twas\n\n a Ünïcödé 日本語 😀 king's 123 <|endoftext|> \x00 end  "


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
    assert (folder / "README.md").read_text(encoding="utf-8") == "# A card of ? 日\n"
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_the_json_files_describe_the_model(written):
    model, _, folder = written
    assert json.loads((folder / "config.json").read_text()) == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
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
        assert file.metadata() == {"format": "pt"}


def test_matrices_are_transposed_and_each_layer_has_its_own(written):
    model, params, folder = written
    tensors = load_file(folder / "model.safetensors")
    assert len(tensors) == 2 + 9 * model.layers + (not model.tied)
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
        write_gguf(tmp_path / "model.gguf", model, params, "f32")
    assert list(tmp_path.iterdir()) == []


def test_a_parameter_of_another_shape_is_an_error(tmp_path):
    params = random_params(MODELS["tied"])
    params["blocks"]["up"] = params["blocks"]["up"][:2]
    with pytest.raises(ValueError, match=r"blocks/up has the shape \(2, 16, 24\), not \(3, 16, 24\)"):
        write_model(tmp_path / "model", Config(model=MODELS["tied"]), params, "")


@pytest.mark.parametrize("size", [257, 1000, pytest.param(50257, marks=pytest.mark.slow)])
def test_the_tokenizer_files_give_the_ids_of_gpt2(size, tmp_path):
    """Read by `tokenizers`, if it is installed; tests/test_interop.py runs every program that reads these files."""
    tokenizers = pytest.importorskip("tokenizers")
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
        ({"vocab_size": 128_256}, {"vocab_size": 128_256}),
        ({"tie_word_embeddings": "absent"}, {"tied": False}),
        ({"max_position_embeddings": "absent"}, {"context": 2048}),
        ({"pretraining_tp": 1, "mlp_bias": False, "use_cache": True}, {}),
    ],
)
def test_config_json_of_other_programs_is_read(folder, fields, expected):
    change(folder / "config.json", **fields)
    assert read_sizes(folder) == dataclasses.replace(MODELS["tied"], **expected)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
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
    pytest.importorskip("tokenizers")
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
    pytest.importorskip("tokenizers")
    change(folder / "tokenizer.json", normalizer={"type": "Lowercase"})
    change(folder / "config.json", eos_token_id=eos_token_id)
    if end_of_text is not None:
        assert read_tokenizer(folder, 300).end_of_text == end_of_text
        return
    with pytest.raises(UsageError, match="eos_token_id") as caught:
        read_tokenizer(folder, 300)
    assert is_one_line(caught.value)


def test_another_tokenizer_without_its_package_names_the_package(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert isinstance(read_tokenizer(folder, 300), Tokenizer)
    with pytest.raises(UsageError, match="pip install tokenizers") as caught:
        read_tokenizer(folder, 299)
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
    pytest.importorskip("tokenizers")
    change(folder / "tokenizer.json", **fields)
    assert isinstance(read_tokenizer(folder, 300), ForeignTokenizer)


def test_the_whole_folder_is_replaced(folder):
    (folder / "stale.txt").write_text("of an earlier export")
    doubled = jax.tree.map(lambda leaf: leaf * 2, random_params(MODELS["tied"]))
    assert write_model(folder, Config(model=MODELS["tied"]), doubled, "") == folder
    assert not (folder / "stale.txt").exists()
    jax.tree.map(np.testing.assert_array_equal, read_params(folder, MODELS["tied"]), doubled)
    assert list(folder.parent.iterdir()) == [folder]


def test_exports_are_synced_before_they_replace_earlier_ones(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    synced = []
    monkeypatch.setattr(atomic, "sync", lambda path: synced.append(path.name))
    monkeypatch.setattr(atomic, "sync_tree", lambda path: synced.append(path.name))
    model, params = MODELS["tied"], random_params(MODELS["tied"])
    write_model(tmp_path / "model", Config(model=model), params, "")
    write_gguf(tmp_path / "model.gguf", model, params, "f32")
    assert synced == ["model.tmp", tmp_path.name, "model.gguf.tmp", tmp_path.name]


@pytest.mark.parametrize("room", [100, 15_000])
def test_a_full_disk_leaves_the_folder_unchanged(folder, room):
    before, new = listing(folder), folder.with_name("new")
    with disk_room(room):
        for target in (folder, new):
            with pytest.raises(RunError, match=r"(?i)too large"):
                write_model(target, Config(model=MODELS["tied"]), random_params(MODELS["tied"]), "")
    assert listing(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_generation_config_keeps_all_tokens_where_the_run_does(tmp_path):
    config = Config(model=MODELS["tied"], sample=SampleConfig(top_k=0, top_p=1.0))
    folder = write_model(tmp_path / "model", config, random_params(MODELS["tied"]), "")
    fields = json.loads((folder / "generation_config.json").read_text())
    assert (fields["top_k"], fields["top_p"]) == (0, 1.0)
