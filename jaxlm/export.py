"""The trained model as a folder of plain files."""

import dataclasses
import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jaxlm import durable
from jaxlm.config import ModelConfig
from jaxlm.errors import RunError


def write_model(folder: Path, config: ModelConfig, params: Any) -> Path:
    """Writes `config.json`, `model.safetensors` (float32) and the tokenizer's `gpt2.tiktoken`; replaces the folder.

    Tensors carry the names of the parameter tree, joined by dots, and are stacked over the layers as in it.

    Returns:
        The folder.

    Raises:
        RunError: the disk failed; where that was while writing, what the folder held before is still there.
    """
    beside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        _write_files(beside, config, params)
        durable.replace_folder(beside, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise RunError(f"cannot write {folder} ({error}): make room and run the same command again") from error
    return folder


def _write_files(folder: Path, config: ModelConfig, params: Any) -> None:
    folder.mkdir(parents=True)
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    tensors = {".".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    (folder / "gpt2.tiktoken").write_bytes(resources.files("jaxlm").joinpath("gpt2.tiktoken").read_bytes())
