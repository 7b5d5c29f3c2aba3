"""The model as a GGUF file, which llama.cpp runs.

GGUF's Llama rotates neighbours (x[2i], x[2i + 1]) where this model rotates halves (x[i], x[i + K/2]), so the rows of
its query and key matrices stand in another order.
"""

import contextlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.errors import RunError, UsageError
from jaxlm.interop.huggingface import merge_lines, named_tensors
from jaxlm.storage import atomic

DTYPES = ("f32", "f16", "q8_0")


def require_gguf() -> None:
    """Raises UsageError if the package that writes these files is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise UsageError("a GGUF file needs the gguf package: pip install gguf")


def write_gguf(file: Path, config: ModelConfig, params: Any, dtype: str) -> None:
    """Writes the model and its tokenizer, matrices as one of DTYPES and norms float32; replaces the file as a whole.

    Raises:
        RunError: the disk failed; a file that was there before still is.
    """
    beside = file.with_name(file.name + ".tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _write(beside, config, params, dtype)
        atomic.replace_file(beside, file)
    except OSError as error:
        with contextlib.suppress(OSError):  # it may never have begun
            beside.unlink()
        raise RunError(f"cannot write {file} ({error}): make room and run the same command again") from error


def _write(file: Path, config: ModelConfig, params: Any, dtype: str) -> None:
    import gguf

    file_types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    kv_heads = config.kv_heads or config.heads
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_file_type(gguf.LlamaFileType[file_types[dtype]])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.width // config.heads)
    writer.add_rope_freq_base(config.rope_theta)

    tokenizer = load_tokenizer(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokenizer.names())
    writer.add_token_types([gguf.TokenType.NORMAL] * tokenizer.end_of_text + [gguf.TokenType.CONTROL])
    writer.add_token_merges(merge_lines(tokenizer))
    writer.add_bos_token_id(tokenizer.end_of_text)
    writer.add_eos_token_id(tokenizer.end_of_text)
    writer.add_add_bos_token(False)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.layers)
    turned = {"q_proj": config.heads, "k_proj": kv_heads}
    for name, tensor in named_tensors(params).items():
        if heads := turned.get(name.split(".")[-2]):
            tensor = interleave_rope_rows(tensor, heads)
        kind = gguf.GGMLQuantizationType[dtype.upper() if tensor.ndim == 2 else "F32"]
        if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = gguf.GGMLQuantizationType.F16  # rows that do not fill q8_0's blocks of 32
        its_name = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(f"{its_name}", gguf.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleave_rope_rows(w_QD: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a query or key matrix, [heads K, D], with those that turn together side by side in each head."""
    return w_QD.reshape(heads, 2, -1, w_QD.shape[-1]).swapaxes(1, 2).reshape(w_QD.shape)
