"""Export to a page that writes: one HTML file with the model, its vocabulary and the programs that run them.

The page opens from the disk and loads nothing. Its programs are in the folder `page`.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxlm.config import PROMPTS, Config, ModelConfig
from jaxlm.core.parameters import Params, parameter_table
from jaxlm.data.tokenizer import Tokenizer, merged_from
from jaxlm.errors import RunError, disk_advice
from jaxlm.interop.huggingface import layer_tensors
from jaxlm.interop.mark import Mark
from jaxlm.interop.model_card import text_name
from jaxlm.interop.policy import content_policy
from jaxlm.storage import atomic

WORKER = ("model.js", "tokenizer.js", "weights.js", "sampling.js", "worker.js")
Q8_BLOCK = 32  # numbers that share a scale
_BITS = {"f32": "32 bits a weight", "f16": "16 bits a weight", "q8_0": "8 bits a weight and a scale for each 32"}
_SEAL = b"<!-- written by jaxlm; sha256 %s -->\n"


def write_page(
    file: Path,
    config: Config,
    step: int,
    meta: Mapping[str, Any],
    params: Params,
    tokenizer: Tokenizer,
    dtype: str,
) -> None:
    """Writes the page of the model after `step`, its matrices in one of gguf.DTYPES; replaces the file atomically.

    Its title is the file's name, and `meta` is that of the checkpoint. It has no paths, because it may be published.

    Raises:
        ValueError: `params` are not those of the table of parameters.
        RunError: the disk failed; an existing file is unchanged.
    """
    parts, tensors = _parts(file.stem, config, step, meta, tokenizer, dtype), _tensors(config.model, params, dtype)
    try:
        with atomic.new_directory(file.parent), atomic.new_file(file) as temporary, temporary.open("wb") as out:
            _write(out, parts, tensors)
    except OSError as error:
        raise RunError(f"cannot write {file} ({error}): {disk_advice(error)}, run the same command again") from error


def read_mark(file: Path) -> Mark:
    """The mark of a page: the hash in its last line, and that of the rest."""
    try:
        data = file.read_bytes()
    except OSError:
        return Mark()
    body = data[: data.rfind(b"\n", 0, -1) + 1]
    sha256 = hashlib.sha256(body).hexdigest()
    return Mark(sha256 if data[len(body) :] == _SEAL % sha256.encode() else None, sha256)


def _write(out: BinaryIO, parts: Mapping[str, str], tensors: Iterator[str]) -> None:
    """Writes the template with its parts, then the mark."""
    digest = hashlib.sha256()

    def write(text: str) -> None:
        data = text.encode(errors="replace")  # the parts may name any file
        digest.update(data)
        out.write(data)

    before, after = page_source("page.html").split("{{tensors}}\n")
    write(re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], before))
    for tensor in tensors:
        write(tensor)
    write(after)
    out.write(_SEAL % digest.hexdigest().encode())


def _parts(
    name: str,
    config: Config,
    step: int,
    meta: Mapping[str, Any],
    tokenizer: Tokenizer,
    dtype: str,
) -> dict[str, str]:
    """The parts of the template, escaped."""
    table, model = parameter_table(config.model), config.model
    parameters, text = sum(parameter.size for parameter in table), text_name(meta)
    trained = f", trained on {text}" if meta.get("source") else ""
    facts = {
        "Parameters": f"{parameters:,}",
        "Text": text,
        "Trained": f"{step:,} steps, {step * config.tokens_per_step:,} tokens",
        "Sizes": f"{model.layers} layers, {model.heads} heads, width {model.width}, context {model.context:,} tokens",
        "Vocabulary": f"{model.vocab_size:,} tokens",
        "Weights": _BITS[dtype],
    }
    script, style = page_source("page.js"), page_source("page.css")
    return {
        "policy": content_policy(script, style, "worker-src blob:"),
        "name": html.escape(name),
        "script": script,
        "style": style,
        "worker": "\n".join(map(page_source, WORKER)),
        "model": json.dumps(_model(model, tokenizer, sum(len(parameter.names("")) for parameter in table))),
        "description": html.escape(f"A language model of {parameters:,} parameters{trained}."),
        "placeholder": html.escape((config.sample.prompts or PROMPTS)[0]),
        "facts": "\n".join(f"<dt>{key}</dt><dd>{html.escape(value)}</dd>" for key, value in facts.items()),
    }


def _model(config: ModelConfig, tokenizer: Tokenizer, tensors: int) -> dict[str, Any]:
    """What the page's programs need beside the weights."""
    names = ("context", "layers", "heads", "width", "mlp_width", "rope_theta", "norm_eps", "qk_norm")
    sizes = {name: getattr(config, name) for name in names} | {"kv_heads": config.kv_heads or config.heads}
    return {"config": sizes, "vocabulary": base64.b64encode(packed_vocabulary(tokenizer)).decode(), "tensors": tensors}


def packed_vocabulary(tokenizer: Tokenizer) -> bytes:
    """The 256 single bytes in the order of their ids, then the two ids that merge into each other token, in 16 bits."""
    tokens = tokenizer.vocabulary[:-1]
    ids = {token: index for index, token in enumerate(tokens)}
    pairs = [[ids[part] for part in merged_from(token, ids)] for token in tokens[256:]]
    return b"".join(tokens[:256]) + np.array(pairs, "<u2").tobytes()


def _tensors(config: ModelConfig, params: Params, dtype: str) -> Iterator[str]:
    """An element for each tensor, with its numbers in base64."""
    for parameter, tensors in layer_tensors(config, params):
        for layer, tensor in enumerate(tensors):
            kind = "f32" if parameter.kind == "norm_scale" else dtype
            if kind == "q8_0" and tensor.shape[-1] % Q8_BLOCK:
                kind = "f16"
            place = f' data-layer="{layer}"' if parameter.stacked else ""
            data = base64.b64encode(pack(tensor, kind)).decode()
            name = parameter.path[-1]
            yield f'<script type="text/plain" data-name="{name}"{place} data-dtype="{kind}">{data}</script>\n'


def pack(tensor: np.ndarray, dtype: str) -> bytes:
    """The numbers of a tensor in one of gguf.DTYPES, little-endian; those of q8_0 as in a GGUF file."""
    if dtype != "q8_0":
        return tensor.astype({"f32": "<f4", "f16": "<f2"}[dtype]).tobytes()
    blocks_NB = tensor.reshape(-1, Q8_BLOCK)
    scale_N1 = np.abs(blocks_NB).max(axis=1, keepdims=True) / 127
    numbers_NB = np.rint(blocks_NB / np.where(scale_N1, scale_N1, 1)).astype(np.int8)
    return np.hstack([scale_N1.astype("<f2").view(np.int8), numbers_NB]).tobytes()


def page_source(name: str) -> str:
    """The text of a file of the page."""
    return resources.files("jaxlm.interop").joinpath("page", name).read_text(encoding="utf-8")
