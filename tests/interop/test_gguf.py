"""The GGUF file, read back by llama.cpp's own package."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import ModelConfig
from jaxlm.core.layers import rope, rope_cos_sin
from jaxlm.core.parameters import tree_of
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.interop.gguf import interleave_rope_rows, read_mark, write_gguf
from jaxlm.interop.huggingface import named_tensors

gguf = pytest.importorskip("gguf")

SIZES = {"vocab_size": 300, "context": 16, "layers": 2, "heads": 4, "kv_heads": 2, "width": 64, "mlp_width": 96}
CONFIG = ModelConfig(**SIZES, rope_theta=500.0, norm_eps=1e-5)


QWEN3 = replace(CONFIG, qk_norm=True)


def random_params(config):
    rng = np.random.default_rng(0)
    return tree_of(config, lambda parameter: rng.normal(size=parameter.shape).astype(np.float32))


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module", params=["f32", "f16", "q8_0"])
def written(request, tmp_path_factory, params):
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(file, CONFIG, params, load_tokenizer(300), request.param)
    return request.param, gguf.GGUFReader(file)


def metadata(reader):
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def test_the_metadata_are_those_that_llama_cpp_reads(written):
    dtype, reader = written
    fields = metadata(reader)
    expected = {
        "general.architecture": "llama",
        "general.name": "model",
        "general.file_type": {"f32": 0, "f16": 1, "q8_0": 7}[dtype],
        "llama.vocab_size": 300,
        "llama.context_length": 16,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 500.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 299,
        "tokenizer.ggml.eos_token_id": 299,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {name: fields[name] for name in expected} == expected
    assert {name for name in fields if name.startswith("general.")} <= expected.keys()  # none names a person
    assert fields["tokenizer.ggml.tokens"] == load_tokenizer(300).names()
    assert fields["tokenizer.ggml.token_type"] == [1] * 299 + [3]
    assert len(fields["tokenizer.ggml.merges"]) == 300 - 257
    assert fields["tokenizer.ggml.merges"][0] == "Ġ t"


def test_the_tensors_are_the_parameters(written, params):
    dtype, reader = written
    blocks = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
    names = {f"blk.{layer}.{name}.weight" for layer in (0, 1) for name in blocks}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors.keys() == names | {"token_embd.weight", "output_norm.weight"}
    hf_tensors = named_tensors(CONFIG, params)
    expected = {
        "token_embd.weight": params["embedding"],
        "blk.1.ffn_down.weight": params["blocks"]["down"][1].T,
        "blk.0.ffn_norm.weight": params["blocks"]["mlp_norm"][0],
        "blk.0.attn_v.weight": params["blocks"]["value"][0].T,
        "blk.1.attn_k.weight": interleave_rope_rows(hf_tensors["model.layers.1.self_attn.k_proj.weight"], 2),
        "blk.1.attn_q.weight": interleave_rope_rows(hf_tensors["model.layers.1.self_attn.q_proj.weight"], 4),
    }
    for name, value in expected.items():
        tensor = tensors[name]
        assert tensor.tensor_type.name == ("F32" if value.ndim == 1 else dtype.upper())
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        atol = np.abs(value).max() * {"f32": 0, "f16": 1e-3, "q8_0": 1e-2}[dtype]
        np.testing.assert_allclose(values, value, rtol=0, atol=atol)


def test_norms_of_queries_and_keys_make_a_qwen3(tmp_path):
    """It rotates the halves of a head, so no rows are reordered."""
    params = random_params(QWEN3)
    write_gguf(tmp_path / "model.gguf", QWEN3, params, load_tokenizer(300), "f16")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    fields, tensors = metadata(reader), {tensor.name: tensor for tensor in reader.tensors}
    assert fields["general.architecture"] == "qwen3"
    assert [fields[f"qwen3.attention.{name}_length"] for name in ("key", "value")] == [16, 16]
    assert (fields["qwen3.rope.freq_base"], fields["qwen3.attention.head_count_kv"]) == (500.0, 2)
    assert not any(name.startswith("llama.") for name in fields)
    for name in ("query", "key"):
        norm, matrix = tensors[f"blk.1.attn_{name[0]}_norm.weight"], tensors[f"blk.1.attn_{name[0]}.weight"]
        assert norm.tensor_type.name == "F32"
        np.testing.assert_array_equal(norm.data, params["blocks"][f"{name}_norm"][1])
        np.testing.assert_array_equal(matrix.data, params["blocks"][name][1].T.astype(np.float16))


def test_the_mark_is_that_of_the_tensors(tmp_path, params):
    file = tmp_path / "model.gguf"
    write_gguf(file, CONFIG, params, load_tokenizer(300), "q8_0")
    assert read_mark(file).sound
    first = file.read_bytes()
    write_gguf(file, CONFIG, params, load_tokenizer(300), "q8_0")
    assert file.read_bytes() == first
    for content in (first[:-1] + bytes([first[-1] ^ 1]), first[: len(first) // 2], b"", b"GGUF"):
        file.write_bytes(content)
        assert not read_mark(file).sound


def test_rotating_adjacent_reordered_rows_is_rotating_halves():
    w_QD, x_D = np.random.default_rng(0).normal(size=(2 * 8, 6)), np.random.default_rng(1).normal(size=6)
    q_BTHK = jnp.float32(w_QD @ x_D).reshape(1, 1, 2, 8)
    halves = np.asarray(jax.jit(lambda q: rope(q, rope_cos_sin(jnp.array([[5]]), 8, 100.0)))(q_BTHK))[0, 0]
    pairs = (interleave_rope_rows(w_QD, 2) @ x_D).reshape(2, 4, 2)
    rotated = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(5j * 100.0 ** (-np.arange(4) / 4))
    np.testing.assert_allclose(np.concatenate([rotated.real, rotated.imag], axis=-1), halves, rtol=1e-4)


def test_rows_that_do_not_fill_a_block_of_32_are_float16(tmp_path):
    narrow = ModelConfig(vocab_size=300, context=16, layers=1, heads=2, width=16, mlp_width=32)
    write_gguf(tmp_path / "model.gguf", narrow, random_params(narrow), load_tokenizer(300), "q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.ffn_up.weight"] == "F16"
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0"
