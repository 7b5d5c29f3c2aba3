"""Export to a GGUF file, which llama.cpp runs.

RoPE rotates the pairs (x[i], x[i + K/2]) in jaxlm's model, and in GGUF's Qwen3, which has norms of queries and keys. In
GGUF's Llama it rotates (x[2i], x[2i + 1]), so there the rows of the query and key matrices are reordered.
"""

import importlib.util
from pathlib import Path

import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.core.parameters import Params
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import RunError, UsageError, disk_advice
from jaxlm.interop.huggingface import layer_tensors, model_type
from jaxlm.interop.mark import KEY, Mark, tensors_sha256
from jaxlm.storage import atomic

DTYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}  # of the matrices; llama.cpp's file types


def require_gguf() -> None:
    """Raises UsageError if the package `gguf` is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise UsageError("a GGUF file needs the gguf package: pip install gguf")


def write_gguf(file: Path, config: ModelConfig, params: Params, tokenizer: Tokenizer, dtype: str) -> None:
    """Writes the model and its tokenizer, matrices in one of DTYPES and norms in float32; replaces the file atomically.

    The model has the name of the file. No metadata name a person or a folder.

    Raises:
        ValueError: `params` are not those of the table of parameters.
        RunError: the disk failed; an existing file is unchanged.
    """
    try:
        with atomic.new_directory(file.parent), atomic.new_file(file) as temporary:
            _write(temporary, file.stem, config, params, tokenizer, dtype)
    except OSError as error:
        raise RunError(f"cannot write {file} ({error}): {disk_advice(error)}, run the same command again") from error


def read_mark(file: Path) -> Mark:
    """The mark of a GGUF file."""
    import gguf

    try:
        reader = gguf.GGUFReader(file)
        tensors = {tensor.name: tensor.data for tensor in reader.tensors}
        field = reader.get_field(KEY)
        return Mark(field and field.contents(), tensors_sha256(tensors, tensors.__getitem__))
    except Exception:  # the package raises nothing more specific for what is not a GGUF file
        return Mark()


def _write(file: Path, name: str, config: ModelConfig, params: Params, tokenizer: Tokenizer, dtype: str) -> None:
    import gguf

    writer = gguf.GGUFWriter(file, model_type(config))
    writer.add_name(name.encode(errors="replace").decode())
    writer.add_file_type(gguf.LlamaFileType[DTYPES[dtype]])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads or config.heads)
    writer.add_key_length(config.width // config.heads)
    writer.add_value_length(config.width // config.heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.width // config.heads)
    writer.add_rope_freq_base(config.rope_theta)

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokenizer.names())
    writer.add_token_types([gguf.TokenType.NORMAL] * tokenizer.end_of_text + [gguf.TokenType.CONTROL])
    writer.add_token_merges(tokenizer.merges())
    writer.add_bos_token_id(tokenizer.end_of_text)
    writer.add_eos_token_id(tokenizer.end_of_text)
    writer.add_add_bos_token(False)

    written = {}
    for parameter, tensors in layer_tensors(config, params):
        kind = gguf.GGMLQuantizationType["F32" if parameter.kind == "norm_scale" else dtype.upper()]
        if tensors[0].shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = gguf.GGMLQuantizationType.F16  # q8_0 needs rows of a multiple of 32
        for name, tensor in zip(parameter.names(parameter.gguf_name), tensors, strict=True):
            if parameter.rope_heads and not config.qk_norm:
                tensor = interleave_rope_rows(tensor, parameter.rope_heads)
            written[name] = gguf.quantize(tensor, kind)
            writer.add_tensor(name, written[name], raw_dtype=kind)
    writer.add_string(KEY, tensors_sha256(written, written.__getitem__))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleave_rope_rows(w_QD: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of a query or key matrix, [heads K, D], so that i and i + K/2 of each head are adjacent."""
    return w_QD.reshape(heads, 2, -1, w_QD.shape[-1]).swapaxes(1, 2).reshape(w_QD.shape)
