"""Export to and import from a Hugging Face folder, which transformers, mlx-lm and llama.cpp's converter read.

The architecture is Llama's, or Qwen3's with `model.qk_norm`, so the conversion is exact in both directions. Hugging
Face stores one [out, in] matrix per layer; jaxlm stores all layers stacked, [layers, in, out]. Both rotate the same
half-split pairs in RoPE, so the rows of query and key matrices have the same order.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from jaxlm.config import SMALLEST_VOCABULARY, TOKENIZERS, Config, ModelConfig, SampleConfig, model_config
from jaxlm.core.parameters import Parameter, Params, check_tree, leaves_by_path, parameter_table, tree_of
from jaxlm.data.tokenizer import (
    END_OF_TEXT,
    GPT2_VOCAB_SIZE,
    Tokenizer,
    TokenizerProtocol,
    load_tokenizer,
    make_tokenizer,
    token_of,
)
from jaxlm.errors import RunError, UsageError, disk_advice
from jaxlm.interop.mark import KEY as MARK_KEY
from jaxlm.interop.mark import TEXTS_KEY, Mark, is_sealed, seal, tensors_sha256
from jaxlm.storage import atomic

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
TEXTS = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    CARD,
)
_UNREADABLE = (OSError, SafetensorError, ValueError, TypeError, AttributeError)  # what safetensors raises

# names of the settings in config.json
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
_OTHER_MERGING = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
_DTYPES = ("float32", "float16", "bfloat16")
_CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}  # by model_type
_REQUIRED: dict[str, dict[str, Any]] = {
    "llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    "qwen3": {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
}
_DEFAULTS = {
    "llama": {"max_position_embeddings": 2048},
    "qwen3": {"max_position_embeddings": 32_768, "head_dim": 128},
}
_COMMON_DEFAULTS = {
    "model_type": "llama",
    "quantization_config": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class ForeignTokenizer:
    """The tokenizer of an imported model, run by Hugging Face's `tokenizers`."""

    tokenizer: Any
    end_of_text: int

    def encode(self, text: str) -> npt.NDArray[np.integer]:
        """Ids of `text`, [N], including the special tokens with which this model's texts begin."""
        return np.array(self.tokenizer.encode(text).ids, np.int32)

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        """The text of `ids`, [N], without special tokens."""
        return self.tokenizer.decode([int(i) for i in ids])


def write_model(folder: Path, config: Config, params: Params, tokenizer: Tokenizer, card: str) -> Path:
    """Writes the model in float32, its tokenizer and the model card into `folder`, and returns it.

    Other files of the folder stay, and so do the texts that a person wrote or edited (see `edited_texts`). If the
    folder has this model already, only what is missing is written. Weights of another step replace the old ones in one
    rename. If any other file of the model changes too, config.json is removed first and written last: after a kill in
    between, no program loads the folder, and the same call completes it.

    Raises:
        ValueError: `params` are not those of the table of parameters.
        RunError: the folder has a model that jaxlm did not write, or the disk failed. Unless it failed during the
            renames, the folder is unchanged.
    """
    tensors = named_tensors(config.model, params)
    try:
        with atomic.new_directory(folder):
            _update(folder, tensors, _texts(config, tokenizer, card))
    except OSError as error:
        raise RunError(f"cannot write {folder} ({error}): {disk_advice(error)}, run the same command again") from error
    return folder


def _update(folder: Path, tensors: Mapping[str, np.ndarray], texts: Mapping[str, bytes]) -> None:
    """Writes the files that are missing or differ, unless they are a person's."""
    for name in (WEIGHTS, *texts):
        atomic.remove_leftovers(folder / name)
    sha256, mark = tensors_sha256(tensors, tensors.__getitem__), read_mark(folder)
    complete = mark.actual == sha256 and os.path.lexists(folder / CONFIG)
    present = {name: (folder / name).read_bytes() for name in texts if os.path.lexists(folder / name)}
    edited = [name for name in present if present[name] != texts[name] and not _is_own(name, present[name], mark.texts)]
    changed = [
        name
        for name, text in texts.items()
        if name not in edited and (name not in present or (present[name] != text and (name == CARD or not complete)))
    ]
    foreign = [] if complete else [CONFIG] * (CONFIG in edited and _sha256(texts[CONFIG]) not in mark.texts)
    if not mark.sound and mark.actual != sha256:
        foreign = [name for name in (WEIGHTS, *changed, *edited) if name != CARD and os.path.lexists(folder / name)]
    if foreign:
        raise RunError(
            f"{folder / foreign[0]} is not as this version of jaxlm wrote it: move it away and run the same command"
            " again"
        )
    needs_swap = not complete and CONFIG not in edited and any(name != CARD for name in changed)
    weights, others = [WEIGHTS] * (mark.actual != sha256), [name for name in changed if name != CONFIG]
    # weights that are replaced come after the texts of which they have the hashes
    order = [*(others + weights if mark.sound else weights + others), *[CONFIG] * needs_swap]
    hashes = " ".join(_sha256(text) for name, text in texts.items() if name != CARD)
    with ExitStack() as stack:  # it renames last what it entered first
        staged = {name: stack.enter_context(atomic.new_file(folder / name)) for name in reversed(order)}
        for name, path in staged.items():
            if name == WEIGHTS:
                _write_weights(path, tensors, {"format": "pt", MARK_KEY: sha256, TEXTS_KEY: hashes})
            else:
                path.write_bytes(texts[name])
            atomic.sync(path)
        if needs_swap:
            (folder / CONFIG).unlink(missing_ok=True)
            atomic.sync(folder)


def edited_texts(folder: Path) -> list[str]:
    """The texts of the model in `folder` that are not as jaxlm wrote them; none if its version did not record that."""
    try:
        with safe_open(folder / WEIGHTS, "numpy") as file:
            own = (file.metadata() or {}).get(TEXTS_KEY, "").split()
        files = [folder / name for name in TEXTS if os.path.isfile(folder / name)] if own else []
        return [file.name for file in files if not _is_own(file.name, file.read_bytes(), own)]
    except _UNREADABLE:
        return []


def _is_own(name: str, text: bytes, hashes: Container[str]) -> bool:
    return is_sealed(text) if name == CARD else _sha256(text) in hashes


def _sha256(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def read_mark(folder: Path) -> Mark:
    """The mark of the model in `folder`."""
    try:
        with safe_open(folder / WEIGHTS, "numpy") as file:
            metadata = file.metadata() or {}
            texts = metadata.get(TEXTS_KEY, "").split()
            return Mark(metadata.get(MARK_KEY), tensors_sha256(file.keys(), file.get_tensor), texts)
    except _UNREADABLE:
        return Mark()


def _write_weights(file: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file. The library orders the metadata at random; this gives the same bytes each time."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            out.write(tensor.astype("<f4", order="C", copy=False).data)


def _texts(config: Config, tokenizer: Tokenizer, card: str) -> dict[str, bytes]:
    """The folder's files but for the weights."""
    tokenizer_json = _tokenizer_json(tokenizer)
    files = {
        CONFIG: _config_json(config.model, tokenizer),
        "generation_config.json": _generation_json(config.sample, tokenizer),
        "tokenizer.json": tokenizer_json,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "unk_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.model.context,
        },
        "vocab.json": tokenizer_json["model"]["vocab"],
    }
    texts = {name: json.dumps(content, indent=2, ensure_ascii=False) for name, content in files.items()}
    texts["merges.txt"] = "\n".join(["#version: 0.2", *tokenizer_json["model"]["merges"]])
    return {name: f"{text}\n".encode() for name, text in texts.items()} | {CARD: seal(card)}


def named_tensors(config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    """The parameters by their Hugging Face names; matrices are [out, in]. Raises ValueError as `layer_tensors`."""
    return {
        name: tensor
        for parameter, tensors in layer_tensors(config, params)
        for name, tensor in zip(parameter.names(parameter.hf_name), tensors, strict=True)
    }


def layer_tensors(config: ModelConfig, params: Params) -> Iterator[tuple[Parameter, list[np.ndarray]]]:
    """Each parameter of the table with its tensors in the layout of other formats: one per layer, matrices [out, in].

    Raises ValueError if a leaf of `params` is not in the table of parameters, is missing or has another shape.
    """
    check_tree(config, params)
    leaves = leaves_by_path(params)
    for parameter in parameter_table(config):
        leaf = np.asarray(leaves[parameter.path])
        if leaf.shape != parameter.shape:
            raise ValueError(f"{'/'.join(parameter.path)} has the shape {leaf.shape}, not {parameter.shape}")
        tensors = list(leaf) if parameter.stacked else [leaf]
        yield parameter, [np.ascontiguousarray(each.T) if parameter.hf_transposed else each for each in tensors]


def model_type(model: ModelConfig) -> str:
    """The name of the architecture in other formats."""
    return "qwen3" if model.qk_norm else "llama"


def _config_json(model: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    sizes = {hf_name: getattr(model, name) for name, hf_name in _SIZES.items()}
    return {
        "architectures": [_CLASSES[model_type(model)]],
        "model_type": model_type(model),
        **_REQUIRED[model_type(model)],
        **sizes,
        "num_key_value_heads": model.kv_heads or model.heads,
        "head_dim": model.width // model.heads,
        "bos_token_id": tokenizer.end_of_text,
        "eos_token_id": tokenizer.end_of_text,
        "torch_dtype": "float32",
    }


def _generation_json(sample: SampleConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    sampling = {"do_sample": True, "temperature": sample.temperature, "top_k": sample.top_k, "top_p": sample.top_p}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.end_of_text)
    return ids | (sampling if sample.temperature else {"do_sample": False})


def _tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": tokenizer.end_of_text, "content": END_OF_TEXT, **flags}],
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
            "merges": tokenizer.merges(),
        },
    }


def _vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    return {name: index for index, name in enumerate(tokenizer.names())}


def read_sizes(folder: Path) -> ModelConfig:
    """The sizes of the model in `folder`, without the rows of a padded vocabulary, which no token has.

    Raises UsageError if it is not a Hugging Face folder, or jaxlm does not support its model.
    """
    file = folder / "config.json"
    fields = _COMMON_DEFAULTS | _read_json(file)
    kind = fields["model_type"]
    if kind not in list(_REQUIRED):
        raise UsageError(f"{file}: model_type is {kind!r:.100}, but jaxlm supports only {' and '.join(_REQUIRED)}")
    fields = _REQUIRED[kind] | _DEFAULTS[kind] | fields
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise UsageError(f"{file} is damaged: rope_parameters must be a group")
    fields["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    fields["rope_theta"] = rope.get("rope_theta", fields["rope_theta"])
    for name, value in (_REQUIRED[kind] | {"quantization_config": None, "rope_type": "default"}).items():
        if fields[name] != value:
            raise UsageError(f"{file}: {name} is {fields[name]!r:.100}, but jaxlm supports only {value!r}")
    try:
        sizes = {name: fields[hf_name] for name, hf_name in _SIZES.items() if name != "kv_heads"}
        kv_heads = fields.get(_SIZES["kv_heads"]) or 0
        sizes |= {"kv_heads": 0 if kv_heads == sizes["heads"] else kv_heads, "qk_norm": kind == "qwen3"}
        model = model_config(sizes)
    except KeyError as error:
        raise UsageError(f"{file} has no {error}: choose the folder of a Llama or a Qwen3") from error
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error
    if fields.get("head_dim") not in (None, model.width // model.heads):
        raise UsageError(
            f"{file}: head_dim is {fields['head_dim']!r:.100}, but jaxlm supports only"
            f" hidden_size / num_attention_heads, {model.width // model.heads}"
        )
    return dataclasses.replace(model, vocab_size=_used_rows(folder, model.vocab_size))


def _used_rows(folder: Path, rows: int) -> int:
    """The rows of the vocabulary up to the last token in tokenizer.json; all `rows` if there is no such file."""
    file = folder / "tokenizer.json"
    content = _read_json(file) if os.path.isfile(file) else {}
    model, added = content.get("model"), content.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocab.values()) if isinstance(vocab, dict) else []
    ids += range(len(vocab)) if isinstance(vocab, list) else []  # Unigram's
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return min(rows, max((i + 1 for i in ids if type(i) is int and i >= 0), default=rows))


def read_params(folder: Path, config: ModelConfig) -> Params:
    """The parameters in the safetensors files of `folder`, converted to float32.

    Raises UsageError if a file is missing or damaged, or the tensors are not those of a model of these sizes.
    """
    tensors, rows = _read_tensors(folder), _read_json(folder / CONFIG).get("vocab_size", 0)
    if config.tied:
        tensors.pop("lm_head.weight", None)  # a copy of the embedding
    params = tree_of(config, lambda parameter: _take(parameter, tensors, folder, rows))
    if unknown := [name for name in tensors if not name.endswith("rotary_emb.inv_freq")]:
        raise UsageError(f"{folder} contains the tensor {unknown[0]}, which jaxlm's model does not have")
    return params


def _take(parameter: Parameter, tensors: dict[str, np.ndarray], folder: Path, rows: int) -> npt.NDArray[np.float32]:
    """Removes one parameter from `tensors`, checks it and returns it in jaxlm's layout."""
    shape = parameter.shape[1:] if parameter.stacked else parameter.shape
    shape = shape[::-1] if parameter.hf_transposed else shape
    if parameter.kind == "embedding":  # config.json counts the rows of a padded vocabulary
        shape = (max(rows, shape[0]), *shape[1:])
    layers = []
    for name in parameter.names(parameter.hf_name):
        if name not in tensors:
            raise UsageError(f"{folder} has no tensor {name}: it is incomplete, or of another model")
        tensor = tensors.pop(name)
        if tensor.shape != shape:
            raise UsageError(
                f"{folder}: {name} has the shape {list(tensor.shape)}, not {list(shape)} as in config.json"
            )
        if tensor.dtype.name not in _DTYPES:
            raise UsageError(f"{folder}: {name} is {tensor.dtype.name}, but jaxlm reads only {', '.join(_DTYPES)}")
        layers.append((tensor.T if parameter.hf_transposed else tensor).astype(np.float32))
    return np.stack(layers) if parameter.stacked else layers[0][: parameter.shape[0]]


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    index = folder / "model.safetensors.index.json"
    names = {WEIGHTS}
    if os.path.isfile(index):
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UsageError(f"{index} is damaged: download the folder again")
        names = set(weight_map.values())
    tensors: dict[str, np.ndarray] = {}
    for path in (folder / name for name in sorted(names)):
        if not os.path.isfile(path):
            raise UsageError(f"{path} is missing: jaxlm reads weights from safetensors files")
        try:
            tensors |= load_file(path)
        except _UNREADABLE as error:
            raise UsageError(f"{path} is damaged, or of a kind that jaxlm does not read ({error})") from error
    return tensors


def check_init(config: Config, tokenizer: Tokenizer | None = None) -> None:
    """Raises UsageError, with the flags to add, if a run cannot start from the model in `init_from`.

    `tokenizer` is that of the run's tokens, None if they are not prepared yet.
    """
    folder = Path(config.init_from)
    model = read_sizes(folder)
    saved = _own_tokenizer(_read_json(folder / "tokenizer.json"), model.vocab_size)
    if not saved:
        raise UsageError(f"init_from {folder} has another tokenizer: training supports only GPT-2's and own ones")
    names = [
        field.name
        for field in dataclasses.fields(model)
        if field.metadata.get("fixed") and field.name not in ("context", "output_init")
    ]
    different = {name: getattr(model, name) for name in names if getattr(model, name) != getattr(config.model, name)}
    if different:
        flags = " ".join(f"--config.model.{name}={value}" for name, value in different.items())
        raise UsageError(f"init_from {folder} is a model of other sizes: add {flags}")
    is_gpt2 = model.vocab_size <= GPT2_VOCAB_SIZE and saved.vocabulary == load_tokenizer(model.vocab_size).vocabulary
    fits = is_gpt2 == (config.data.tokenizer == "gpt2")
    if not fits or (tokenizer and tokenizer.vocabulary != saved.vocabulary):
        advice = f"set --config.data.tokenizer={'gpt2' if is_gpt2 else 'own'}{' and no --config.data.dir' * fits}"
        raise UsageError(f"init_from {folder} has another vocabulary than this run: {advice}")


def own_vocabulary(config: Config) -> Tokenizer | None:
    """The tokenizer of the model in `init_from`, if the run's is an own one. Raises UsageError if it cannot be read."""
    if config.data.tokenizer != "own" or not config.init_from:
        return None
    return _own_tokenizer(_read_json(Path(config.init_from) / "tokenizer.json"), config.model.vocab_size)


def read_tokenizer(folder: Path, vocab_size: int) -> TokenizerProtocol:
    """The tokenizer of the model in `folder`; a `Tokenizer` if one gives the same ids.

    Raises UsageError if there is none.
    """
    import tokenizers  # only now, because training does not need it

    file = folder / "tokenizer.json"
    content = _read_json(file)
    if own := _own_tokenizer(content, vocab_size):
        return own
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more specific
        raise UsageError(f"{file} is damaged ({error})") from error
    ids = _read_json(folder / "config.json").get("eos_token_id")
    end_of_text = ids[0] if isinstance(ids, list) and ids else ids
    if not isinstance(end_of_text, int) or not 0 <= end_of_text < vocab_size:
        raise UsageError(f"{folder / 'config.json'}: eos_token_id is {end_of_text!r:.100}: it must be a token's id")
    return ForeignTokenizer(tokenizer, end_of_text)


def _own_tokenizer(content: Mapping[str, Any], vocab_size: int) -> Tokenizer | None:
    """The `Tokenizer` of a tokenizer.json: GPT-2's or a learnt one. None if no `Tokenizer` gives the same ids."""
    model, before, after = (content.get(name) or {} for name in ("model", "pre_tokenizer", "post_processor"))
    same_processing = (
        all(isinstance(part, dict) for part in (model, before, after))
        and content.get("normalizer") is None
        and (before.get("type"), before.get("add_prefix_space")) == ("ByteLevel", False)
        and before.get("use_regex", True) is True
        and after.get("type", "ByteLevel") == "ByteLevel"
    )
    vocab = model.get("vocab") if same_processing else None
    if not isinstance(vocab, dict) or len(vocab) != vocab_size or vocab_size < SMALLEST_VOCABULARY:
        return None
    if vocab_size <= GPT2_VOCAB_SIZE and vocab == _vocabulary(gpt2 := load_tokenizer(vocab_size)):
        return gpt2
    return _learnt_tokenizer(content, vocab)


def _learnt_tokenizer(content: Mapping[str, Any], vocab: Mapping[str, Any]) -> Tokenizer | None:
    """The `Tokenizer` with the vocabulary and the merges of a tokenizer.json, if one has them."""
    try:
        *names, last = sorted(vocab, key=vocab.__getitem__)
        tokens = [token_of(name) for name in names]
        added = [token["content"] for token in content.get("added_tokens", [])]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"].get("merges", [])]
    except (TypeError, ValueError, LookupError):
        return None
    if {*tokens[:256]} != {bytes([byte]) for byte in range(256)} or len({*tokens}) < len(tokens):
        return None
    own = make_tokenizer(tokens)
    same = (
        len(vocab) <= TOKENIZERS["own"]
        and [last, *added] == [END_OF_TEXT, END_OF_TEXT]
        and not any(content["model"].get(name) for name in _OTHER_MERGING)
        and _vocabulary(own) == vocab
        and merges == own.merges()
    )
    return own if same else None


def _read_json(file: Path) -> dict[str, Any]:
    if not os.path.isfile(file):
        raise UsageError(f"{file} is missing: choose a folder written by jaxlm.export or Hugging Face")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file} is damaged or cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise UsageError(f"{file} is damaged: it must contain a JSON object")
    return content
