"""The trained model as a folder of plain files."""

import dataclasses
import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxlm.config import ModelConfig


def write_model(folder: Path, config: ModelConfig, params: Any) -> Path:
    """Writes `config.json`, `model.safetensors` (float32) and the tokenizer's `gpt2.tiktoken`; replaces the folder.

    Tensors carry the names of the parameter tree, joined by dots, and are stacked over the layers as in it.

    Returns:
        The folder.
    """
    beside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    tensors = {".".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}
    save_file(tensors, beside / "model.safetensors")
    (beside / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    (beside / "gpt2.tiktoken").write_bytes(resources.files("jaxlm").joinpath("gpt2.tiktoken").read_bytes())
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    return folder
