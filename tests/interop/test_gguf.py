"""The GGUF file, read back by the package that belongs to llama.cpp."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import ModelConfig
from jaxlm.core.layers import rope, rope_cos_sin
from jaxlm.core.model import init_params
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.interop.gguf import interleave_rope_rows, write_gguf
from jaxlm.interop.huggingface import named_tensors

gguf = pytest.importorskip("gguf")

SIZES = {"vocab_size": 300, "context": 16, "layers": 2, "heads": 4, "kv_heads": 2, "width": 64, "mlp_width": 96}
CONFIG = ModelConfig(**SIZES, rope_theta=500.0, norm_eps=1e-5)


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module", params=["f32", "f16", "q8_0"])
def written(request, tmp_path_factory, params):
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(file, CONFIG, params, request.param)
    return request.param, gguf.GGUFReader(file)


def said(reader):
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def test_it_says_what_llama_cpp_asks(written):
    dtype, reader = written
    found = said(reader)
    sizes = {
        "general.architecture": "llama",
        "general.file_type": {"f32": 0, "f16": 1, "q8_0": 7}[dtype],
        "llama.vocab_size": 300,
        "llama.context_length": 16,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 500.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 299,
        "tokenizer.ggml.eos_token_id": 299,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {name: found[name] for name in sizes} == sizes
    assert found["tokenizer.ggml.tokens"] == load_tokenizer(300).names()
    assert found["tokenizer.ggml.token_type"] == [1] * 299 + [3]
    assert len(found["tokenizer.ggml.merges"]) == 300 - 257
    assert found["tokenizer.ggml.merges"][0] == "Ġ t"


def test_every_tensor_is_there_and_says_what_the_parameters_say(written, params):
    dtype, reader = written
    blocks = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
    names = {f"blk.{layer}.{name}.weight" for layer in (0, 1) for name in blocks}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors.keys() == names | {"token_embd.weight", "output_norm.weight"}
    ours = named_tensors(params)
    expected = {
        "token_embd.weight": params["embedding"],
        "blk.1.ffn_down.weight": params["blocks"]["down"][1].T,
        "blk.0.ffn_norm.weight": params["blocks"]["mlp_norm"][0],
        "blk.0.attn_v.weight": params["blocks"]["value"][0].T,
        "blk.1.attn_k.weight": interleave_rope_rows(ours["model.layers.1.self_attn.k_proj.weight"], 2),
        "blk.1.attn_q.weight": interleave_rope_rows(ours["model.layers.1.self_attn.q_proj.weight"], 4),
    }
    for name, value in expected.items():
        tensor = tensors[name]
        assert tensor.tensor_type.name == ("F32" if value.ndim == 1 else dtype.upper())
        found = gguf.dequantize(tensor.data, tensor.tensor_type)
        atol = np.abs(value).max() * {"f32": 0, "f16": 1e-3, "q8_0": 1e-2}[dtype]
        np.testing.assert_allclose(found, value, rtol=0, atol=atol)


def test_turning_neighbours_of_the_rows_in_their_new_order_is_turning_halves():
    w_QD, x_D = np.random.default_rng(0).normal(size=(2 * 8, 6)), np.random.default_rng(1).normal(size=6)
    halves = np.asarray(rope(jnp.float32(w_QD @ x_D).reshape(1, 1, 2, 8), rope_cos_sin(np.array([[5]]), 8, 100.0)))[
        0, 0
    ]
    pairs = (interleave_rope_rows(w_QD, 2) @ x_D).reshape(2, 4, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(5j * 100.0 ** (-np.arange(4) / 4))
    np.testing.assert_allclose(np.concatenate([turned.real, turned.imag], axis=-1), halves, rtol=1e-4)


def test_rows_that_fill_no_block_of_32_stay_16_bits(tmp_path):
    narrow = ModelConfig(vocab_size=300, context=16, layers=1, heads=2, width=16, mlp_width=32)
    write_gguf(tmp_path / "model.gguf", narrow, init_params(narrow, jax.random.key(0)), "q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.ffn_up.weight"] == "F16"
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0"
