"""The model as a Hugging Face folder, which transformers, mlx-lm and llama.cpp's converter read; and back from one.

The architecture is Llama's, so nothing is lost either way. A matrix is [out, in] there and [in, out] here, and each
block stands by itself. Queries and keys turn in the same half-split pairs in both, so their rows keep their order.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxlm.config import Config, ModelConfig, SampleConfig, model_config
from jaxlm.data.tokenizer import END_OF_TEXT, GPT2_VOCAB_SIZE, Tokenizer, TokenizerProtocol, load_tokenizer
from jaxlm.errors import RunError, UsageError
from jaxlm.storage import atomic

# ours: theirs
_SIZES = {
    "vocab_size": "vocab_size",
    "context": "max_position_embeddings",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "width": "hidden_size",
    "mlp_width": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
    "rope_theta": "rope_theta",
}
_OUTSIDE = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
_BLOCK = {
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_DTYPES = ("float32", "float16", "bfloat16")
_ALWAYS = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
_DEFAULTS = _ALWAYS | {
    "quantization_config": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class ForeignTokenizer:
    """The tokenizer of another model, by Hugging Face's `tokenizers`."""

    tokenizer: Any
    end_of_text: int

    def encode(self, text: str) -> npt.NDArray[np.integer]:
        """Ids of `text`, [N], with what this model has at the beginning of a text."""
        return np.array(self.tokenizer.encode(text).ids, np.int32)

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        """The text of `ids`, [N], without special tokens."""
        return self.tokenizer.decode([int(i) for i in ids])


def write_model(folder: Path, config: Config, params: Any, card: str) -> Path:
    """Writes the model, float32, its tokenizer and the model card; replaces the folder as a whole.

    Returns:
        The folder.

    Raises:
        RunError: the disk failed; where that was while writing, what the folder held before is still there.
    """
    beside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        _write_files(beside, config, params, card)
        atomic.replace_folder(beside, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise RunError(f"cannot write {folder} ({error}): make room and run the same command again") from error
    return folder


def _write_files(folder: Path, config: Config, params: Any, card: str) -> None:
    tokenizer = load_tokenizer(config.model.vocab_size)
    save_file(named_tensors(params), folder / "model.safetensors", metadata={"format": "pt"})
    files = {
        "config.json": _config_json(config.model, tokenizer),
        "generation_config.json": _generation_json(config.sample, tokenizer),
        "tokenizer.json": _tokenizer_json(tokenizer),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "unk_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.model.context,
        },
        "vocab.json": _vocabulary(tokenizer),
    }
    texts = {name: json.dumps(said, indent=2, ensure_ascii=False) for name, said in files.items()}
    texts["merges.txt"] = "\n".join(["#version: 0.2", *merge_lines(tokenizer)])
    texts["README.md"] = card
    for name, text in texts.items():
        (folder / name).write_bytes(f"{text.rstrip()}\n".encode(errors="replace"))  # a card may name any file
    shutil.copymode(folder / "README.md", folder / "model.safetensors")  # which was made for its owner's eyes only


def named_tensors(params: Any) -> dict[str, np.ndarray]:
    """The parameters by their names there; matrices [out, in]."""
    tensors = {theirs: np.asarray(params[ours]) for ours, theirs in _OUTSIDE.items() if ours in params}
    for ours, theirs in _BLOCK.items():
        for layer, tensor in enumerate(np.asarray(params["blocks"][ours])):
            tensors[f"model.layers.{layer}.{theirs}.weight"] = np.ascontiguousarray(tensor.T)
    return tensors


def merge_lines(tokenizer: Tokenizer) -> list[str]:
    """The merges as GPT-2's merges.txt and all that descend from it write them."""
    names = tokenizer.names()
    return [f"{names[a]} {names[b]}" for a, b in tokenizer.merges()]


def _config_json(model: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    sizes = {theirs: getattr(model, ours) for ours, theirs in _SIZES.items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        **_ALWAYS,
        **sizes,
        "num_key_value_heads": model.kv_heads or model.heads,
        "head_dim": model.width // model.heads,
        "bos_token_id": tokenizer.end_of_text,
        "eos_token_id": tokenizer.end_of_text,
        "torch_dtype": "float32",
    }


def _generation_json(sample: SampleConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    drawn = {"do_sample": True, "temperature": sample.temperature, "top_k": sample.top_k, "top_p": sample.top_p}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.end_of_text)
    return ids | (drawn if sample.temperature else {"do_sample": False})


def _tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    marks = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": tokenizer.end_of_text, "content": END_OF_TEXT, **marks}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": _vocabulary(tokenizer),
            "merges": merge_lines(tokenizer),
        },
    }


def _vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    return {name: index for index, name in enumerate(tokenizer.names())}


def read_sizes(folder: Path) -> ModelConfig:
    """The sizes of the Llama in `folder`.

    Raises:
        UsageError: it is no Hugging Face folder, or its model is another than this one can be.
    """
    file = folder / "config.json"
    said = _DEFAULTS | _read_json(file)
    rope = said.get("rope_parameters") or said.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise UsageError(f"{file} is damaged: rope_parameters must be a group")
    said["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    said["rope_theta"] = rope.get("rope_theta", said["rope_theta"])
    for name, value in (_ALWAYS | {"quantization_config": None, "rope_type": "default"}).items():
        if said[name] != value:
            raise UsageError(f"{file}: {name} is {said[name]!r:.100}, and jaxlm's model can only be {value!r}")
    try:
        sizes = {ours: said[theirs] for ours, theirs in _SIZES.items() if ours != "kv_heads"}
        shared = said.get(_SIZES["kv_heads"]) or 0
        model = model_config(sizes | {"kv_heads": 0 if shared == sizes["heads"] else shared})
    except KeyError as error:
        raise UsageError(f"{file} lacks {error}: name the folder of a Llama") from error
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error
    if said.get("head_dim") not in (None, model.width // model.heads):
        raise UsageError(
            f"{file}: head_dim is {said['head_dim']!r:.100}, and jaxlm's model can only be"
            f" hidden_size / num_attention_heads, {model.width // model.heads}"
        )
    return model


def read_params(folder: Path, config: ModelConfig) -> Any:
    """The parameters in the safetensors files of `folder`, float32 whatever they are there.

    Raises:
        UsageError: a file is missing or damaged, or the tensors are not those of a model of these sizes.
    """
    tensors = _read_tensors(folder)
    if config.tied:
        tensors.pop(_OUTSIDE["head"], None)

    def take(name: str, *shape: int) -> npt.NDArray[np.float32]:
        if name not in tensors:
            raise UsageError(f"{folder} holds no tensor {name}: it is not whole, or no Llama")
        tensor = tensors.pop(name)
        if tensor.shape != shape:
            raise UsageError(f"{folder}: {name} is {list(tensor.shape)}, and by its config.json {list(shape)}")
        if tensor.dtype.name not in _DTYPES:
            raise UsageError(f"{folder}: {name} is {tensor.dtype.name}, and jaxlm reads {', '.join(_DTYPES)}")
        return tensor.astype(np.float32)

    V, D, F = config.vocab_size, config.width, config.mlp_width
    KV = D // config.heads * (config.kv_heads or config.heads)
    shapes: dict[str, tuple[int, ...]] = {"query": (D, D), "key": (KV, D), "value": (KV, D), "output": (D, D)}
    shapes |= {"gate": (F, D), "up": (F, D), "down": (D, F), "attention_norm": (D,), "mlp_norm": (D,)}
    params: dict[str, Any] = {
        "embedding": take(_OUTSIDE["embedding"], V, D),
        "norm": take(_OUTSIDE["norm"], D),
        "blocks": {
            ours: np.stack(
                [take(f"model.layers.{layer}.{theirs}.weight", *shapes[ours]).T for layer in range(config.layers)]
            )
            for ours, theirs in _BLOCK.items()
        },
    }
    if not config.tied:
        params["head"] = take(_OUTSIDE["head"], V, D)
    if left := [name for name in tensors if not name.endswith("rotary_emb.inv_freq")]:
        raise UsageError(f"{folder} holds {left[0]}, for which jaxlm's model has no place")
    return params


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if os.path.isfile(index):
        listed = _read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise UsageError(f"{index} is damaged: fetch the folder again")
        names = set(listed.values())
    tensors: dict[str, np.ndarray] = {}
    for path in (folder / name for name in sorted(names)):
        if not os.path.isfile(path):
            raise UsageError(f"{path} is missing: jaxlm reads weights from safetensors files")
        try:
            with safe_open(path, framework="np") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        except (OSError, SafetensorError, ValueError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is damaged, or of a kind that jaxlm does not read ({error})") from error
    return tensors


def check_init(config: Config) -> None:
    """Raises UsageError, with the flags that mend it, if a run cannot begin with the model in `init_from`."""
    folder = Path(config.init_from)
    there = read_sizes(folder)
    names = [field.name for field in dataclasses.fields(there) if field.metadata and field.name != "context"]
    found = {name: getattr(there, name) for name in names if getattr(there, name) != getattr(config.model, name)}
    if found:
        flags = " ".join(f"--config.model.{name}={value}" for name, value in found.items())
        raise UsageError(f"init_from {folder} is a model of other sizes: add {flags}")
    if not isinstance(read_tokenizer(folder, there.vocab_size), Tokenizer):
        raise UsageError(f"init_from {folder} has another tokenizer than GPT-2's, which is the one that runs have")


def read_tokenizer(folder: Path, vocab_size: int) -> TokenizerProtocol:
    """The tokenizer of the model in `folder`: jaxlm's own where it is the same.

    Raises:
        UsageError: there is none, or it needs `tokenizers`, which is not installed.
    """
    file = folder / "tokenizer.json"
    said = _read_json(file)
    if 256 < vocab_size <= GPT2_VOCAB_SIZE and _is_same(said, own := load_tokenizer(vocab_size)):
        return own
    try:
        import tokenizers
    except ImportError as error:
        raise UsageError(f"{file} is not GPT-2's tokenizer: pip install tokenizers to sample with it") from error
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # that is all it raises
        raise UsageError(f"{file} is damaged ({error})") from error
    ends = _read_json(folder / "config.json").get("eos_token_id")
    end = ends[0] if isinstance(ends, list) and ends else ends
    if not isinstance(end, int) or not 0 <= end < vocab_size:
        raise UsageError(f"{folder / 'config.json'}: eos_token_id is {end!r:.100}, and must be a token's id")
    return ForeignTokenizer(tokenizer, end)


def _is_same(said: Mapping[str, Any], own: Tokenizer) -> bool:
    """Whether a tokenizer.json is that of `own`: its tokens, and nothing done to the text before or behind them."""
    model, before, behind = (said.get(name) or {} for name in ("model", "pre_tokenizer", "post_processor"))
    return (
        all(isinstance(part, dict) for part in (model, before, behind))
        and model.get("vocab") == _vocabulary(own)
        and said.get("normalizer") is None
        and (before.get("type"), before.get("add_prefix_space")) == ("ByteLevel", False)
        and before.get("use_regex", True) is True
        and behind.get("type", "ByteLevel") == "ByteLevel"
    )


def _read_json(file: Path) -> dict[str, Any]:
    if not os.path.isfile(file):
        raise UsageError(f"{file} is missing: name the folder of a model, as jaxlm.export or Hugging Face writes it")
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file} is damaged or cannot be read ({error})") from error
    if not isinstance(said, dict):
        raise UsageError(f"{file} is damaged: it must hold a JSON object")
    return said
