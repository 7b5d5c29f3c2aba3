"""The Hugging Face folder: what is in it, what comes back from one, and what is refused."""

import dataclasses
import json
import resource
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlm.config import Config, ModelConfig, SampleConfig
from jaxlm.core.model import init_params
from jaxlm.data.tokenizer import Tokenizer, load_tokenizer
from jaxlm.errors import RunError, UsageError
from jaxlm.interop.huggingface import ForeignTokenizer, check_init, read_params, read_sizes, read_tokenizer, write_model
from tests.tiny_run import is_one_line, listing

SIZES = {"vocab_size": 300, "context": 16, "layers": 3, "heads": 4, "width": 16, "mlp_width": 24}
MODELS = {
    "tied": ModelConfig(**SIZES),
    "shared": ModelConfig(**SIZES, kv_heads=2, tied=False, rope_theta=500_000.0, norm_eps=1e-5),
}
TEXT = "Once upon a time,  there\twas\n\n a Ünïcödé 日本語 😀 king's 123 <|endoftext|> \x00 end  "


def drawn(model):
    return init_params(model, jax.random.key(0))


@pytest.fixture(scope="module", params=MODELS)
def written(request, tmp_path_factory):
    """A model, its parameters and its folder."""
    model = MODELS[request.param]
    params = drawn(model)
    folder = tmp_path_factory.mktemp("written") / "model"
    return model, params, write_model(folder, Config(model=model), params, "# A card of \udcff 日")


@pytest.fixture
def folder(tmp_path):
    """A folder to spoil."""
    return write_model(tmp_path / "model", Config(model=MODELS["tied"]), drawn(MODELS["tied"]), "")


def change(file, **said):
    before = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in (before | said).items() if value != "absent"}))


def test_the_folder_holds_the_files_that_others_look_for(written):
    _, _, folder = written
    names = {"config.json", "generation_config.json", "model.safetensors", "README.md", "merges.txt", "vocab.json"}
    assert {path.name for path in folder.iterdir()} == names | {"tokenizer.json", "tokenizer_config.json"}
    assert (folder / "README.md").read_text(encoding="utf-8") == "# A card of ? 日\n"
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_matrices_are_turned_and_blocks_stand_by_themselves(written):
    model, params, folder = written
    tensors = load_file(folder / "model.safetensors")
    assert len(tensors) == 2 + 9 * model.layers + (not model.tied)
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], params["embedding"])
    np.testing.assert_array_equal(tensors["model.layers.2.self_attn.k_proj.weight"], params["blocks"]["key"][2].T)
    np.testing.assert_array_equal(tensors["model.layers.1.mlp.down_proj.weight"], params["blocks"]["down"][1].T)
    assert ("lm_head.weight" in tensors) == (not model.tied)
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}


def test_what_is_written_comes_back(written):
    model, params, folder = written
    assert read_sizes(folder) == model
    back = read_params(folder, model)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert isinstance(read_tokenizer(folder, model.vocab_size), Tokenizer)


@pytest.mark.parametrize("size", [257, 300, 4096, 50257])
def test_byte_pair_encoding_by_the_files_gives_the_ids(size, tmp_path):
    """By `tokenizers`, where it is installed; tests/test_interop.py asks all that read these files."""
    tokenizers = pytest.importorskip("tokenizers")
    model = ModelConfig(**SIZES | {"vocab_size": size})
    folder = write_model(tmp_path / "model", Config(model=model), drawn(model), "")
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = TEXT.replace("<|endoftext|>", "")
    assert theirs.encode(text).ids == load_tokenizer(size).encode(text).tolist()
    assert theirs.decode(theirs.encode(text).ids) == text
    assert theirs.encode("a<|endoftext|>").ids[-1] == size - 1
    vocabulary = json.loads((folder / "vocab.json").read_text())
    assert vocabulary == json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    lines = (folder / "merges.txt").read_text().splitlines()
    assert lines[1:] == json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]


def test_it_says_how_the_run_draws_its_texts(tmp_path):
    for temperature, expected in (
        (0.7, {"do_sample": True, "temperature": 0.7, "top_k": 5}),
        (0, {"do_sample": False}),
    ):
        config = Config(model=MODELS["tied"], sample=SampleConfig(temperature=temperature, top_k=5))
        folder = write_model(tmp_path / "model", config, drawn(config.model), "")
        said = json.loads((folder / "generation_config.json").read_text())
        assert said["eos_token_id"] == 299
        assert {name: said.get(name) for name in expected} == expected


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_weights_of_16_bits_in_several_files_are_read_as_float32(folder, dtype):
    file = folder / "model.safetensors"
    tensors = {name: tensor.astype(dtype) for name, tensor in load_file(file).items()}
    file.unlink()
    parts = {f"model-{part}-of-3.safetensors": sorted(tensors)[part - 1 :: 3] for part in (1, 2, 3)}
    for name, held in parts.items():
        save_file({tensor: tensors[tensor] for tensor in held}, folder / name)
    index = {"metadata": {}, "weight_map": {tensor: name for name, held in parts.items() for tensor in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    back, exact = read_params(folder, MODELS["tied"]), drawn(MODELS["tied"])
    for found, expected in zip(jax.tree.leaves(back), jax.tree.leaves(exact), strict=True):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, np.asarray(expected).astype(dtype).astype(np.float32))


@pytest.mark.parametrize(
    ("said", "expected"),
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
def test_a_config_json_as_others_write_it(folder, said, expected):
    change(folder / "config.json", **said)
    assert read_sizes(folder) == dataclasses.replace(MODELS["tied"], **expected)


@pytest.mark.parametrize(
    ("said", "named"),
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
def test_a_model_that_this_one_cannot_be_is_refused(folder, said, named):
    change(folder / "config.json", **said)
    with pytest.raises(UsageError, match=named) as caught:
        read_sizes(folder)
    assert is_one_line(caught.value)
    assert str(folder / "config.json") in str(caught.value)


def spoil_tensors(folder, spoil):
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "model.norm.weight"),
        (lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj"),
        (lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:-1]}), r"\[15\].*\[16\]"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(16, np.float32)}), "q_proj.bias"),
        (lambda t: t.update({"model.layers.3.input_layernorm.weight": np.zeros(16, np.float32)}), "layers.3"),
        (lambda t: t.update({"model.norm.weight": np.zeros(16, np.int8)}), "int8"),
    ],
)
def test_tensors_that_are_not_those_of_its_sizes_are_refused(folder, spoil, named):
    spoil_tensors(folder, spoil)
    with pytest.raises(UsageError, match=named) as caught:
        read_params(folder, MODELS["tied"])
    assert is_one_line(caught.value)


def test_what_others_leave_beside_the_parameters_does_no_harm(folder):
    before = read_params(folder, MODELS["tied"])
    extra = {"lm_head.weight": np.zeros((300, 16), np.float32)}
    extra |= {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32)}
    spoil_tensors(folder, lambda tensors: tensors.update(extra))
    jax.tree.map(np.testing.assert_array_equal, read_params(folder, MODELS["tied"]), before)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("held", [None, b"", b"[]", b"\x80\x02}", b"{" * 100_000, b"\xff" * 64])
def test_a_damaged_or_missing_file_is_refused_by_name(folder, name, held):
    (folder / name).unlink()
    if held is not None:
        (folder / name).write_bytes(held)
    with pytest.raises(UsageError) as caught:
        model = read_sizes(folder)
        read_tokenizer(folder, model.vocab_size)
        read_params(folder, model)
    assert is_one_line(caught.value)
    assert str(folder / name) in str(caught.value)


@pytest.mark.parametrize("listed", [None, [], {"a": 3}, {"a": "elsewhere.safetensors"}])
def test_an_index_of_nothing_is_refused(folder, listed):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(UsageError, match=r"index\.json|elsewhere"):
        read_params(folder, MODELS["tied"])


def test_a_run_of_other_sizes_is_told_the_flags_that_mend_it(folder):
    fits = Config(model=dataclasses.replace(MODELS["tied"], context=8), init_from=str(folder))
    check_init(fits)
    other = dataclasses.replace(fits, model=dataclasses.replace(fits.model, layers=2, tied=False))
    with pytest.raises(UsageError, match=r"--config\.model\.layers=3 --config\.model\.tied=True$") as caught:
        check_init(other)
    assert is_one_line(caught.value)


def test_a_run_cannot_begin_with_another_tokenizer(folder):
    pytest.importorskip("tokenizers")
    spoken = json.loads((folder / "tokenizer.json").read_text())
    spoken["model"]["vocab"] = {"!": 0, "b": 1, "<|endoftext|>": 299}
    spoken["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(spoken))
    with pytest.raises(UsageError, match="tokenizer"):
        check_init(Config(model=MODELS["tied"], init_from=str(folder)))


def test_without_the_package_another_tokenizer_is_refused_with_its_name(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert isinstance(read_tokenizer(folder, 300), Tokenizer)
    with pytest.raises(UsageError, match="pip install tokenizers") as caught:
        read_tokenizer(folder, 299)
    assert is_one_line(caught.value)


@pytest.mark.parametrize(
    "said",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}},
        {"pre_tokenizer": None},
    ],
)
def test_the_same_tokens_made_otherwise_are_another_tokenizer(folder, said):
    pytest.importorskip("tokenizers")
    change(folder / "tokenizer.json", **said)
    assert isinstance(read_tokenizer(folder, 300), ForeignTokenizer)


def test_a_folder_is_replaced_as_a_whole(folder):
    (folder / "stale.txt").write_text("of an earlier version")
    doubled = jax.tree.map(lambda leaf: leaf * 2, drawn(MODELS["tied"]))
    assert write_model(folder, Config(model=MODELS["tied"]), doubled, "") == folder
    assert not (folder / "stale.txt").exists()
    jax.tree.map(np.testing.assert_array_equal, read_params(folder, MODELS["tied"]), doubled)
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("room", [100, 15_000])
def test_on_a_full_disk_the_folder_stays_as_it_was(folder, room):
    before, new = listing(folder), folder.with_name("new")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        for place in (folder, new):
            with pytest.raises(RunError, match=r"(?i)too large"):
                write_model(place, Config(model=MODELS["tied"]), drawn(MODELS["tied"]), "")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert listing(folder) == before
    assert not new.exists()
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model"]
