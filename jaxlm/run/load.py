"""Loads a trained model from a checkpoint of a run or from a Hugging Face folder."""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxlm.config import Config, ModelConfig, from_config_dict
from jaxlm.core.model import prepare_decode_params
from jaxlm.core.parameters import Params, tree_of
from jaxlm.data.tokenizer import Tokenizer, TokenizerProtocol, from_bytes, load_tokenizer
from jaxlm.device import backend
from jaxlm.errors import CorruptCheckpointError, UsageError
from jaxlm.interop.huggingface import read_params, read_sizes, read_tokenizer
from jaxlm.run.checkpoint import Checkpoints
from jaxlm.run.workdir import BEST, CHECKPOINTS, saved_steps

Result = TypeVar("Result")


class Checkpoint(NamedTuple):
    """The model of a checkpoint, and the run that it belongs to."""

    step: int
    config: Config
    meta: dict[str, Any]  # from `resume.describe_run`
    params: Params  # their average, if the run keeps one

    @property
    def tokenizer(self) -> Tokenizer:
        """An own tokenizer is in the checkpoint, so that it needs no token files."""
        return _tokenizer(self.config.model, self.meta)


class LoadedModel(NamedTuple):
    """A model that is ready to generate text."""

    config: ModelConfig  # resolved for the device
    weights: Params  # from `model.prepare_decode_params`
    tokenizer: TokenizerProtocol


def restore(workdir: Path, step: int | None, platform: str) -> Checkpoint:
    """Restores the model of a run's checkpoint.

    Args:
        workdir: of the run.
        step: that of the checkpoint; None: the best step's, if the run keeps it, or else the newest that is whole.
        platform: that of the computation.

    Raises UsageError if there is no such checkpoint.
    """

    def read(device: jax.Device, checkpoints: Checkpoints, step: int) -> Checkpoint:
        meta = checkpoints.meta(step)
        config = from_config_dict(meta["config"])
        params = checkpoints.weights(step, param_shapes(config.model), SingleDeviceSharding(device))
        return Checkpoint(step, config, meta, params)

    return _read_checkpoint(workdir, step, platform, read)


def load_run(
    workdir: Path,
    step: int | None,
    platform: str,
    precision: str,
    meanwhile: Callable[[ModelConfig, Tokenizer], None],
) -> tuple[int, LoadedModel]:
    """Loads the model of a run's checkpoint; returns its step too.

    Args:
        workdir, step: as for `restore`.
        platform, precision: those of the computation.
        meanwhile: called in a thread while the weights are read and prepared, with the model as resolved for the
            device, if two threads may use it.

    Raises UsageError as `restore`.
    """

    def read(device: jax.Device, checkpoints: Checkpoints, step: int) -> tuple[int, LoadedModel]:
        meta = checkpoints.meta(step)
        model = resolved(from_config_dict(meta["config"]).model, device, precision)
        tokenizer = _tokenizer(model, meta)
        with ThreadPoolExecutor(1) as thread:
            if backend.takes_threads(device):
                thread.submit(meanwhile, model, tokenizer)
            params = checkpoints.weights(step, param_shapes(model), SingleDeviceSharding(device))
            weights = prepare_decode_params(model, params)
        return step, LoadedModel(model, weights, tokenizer)

    return _read_checkpoint(workdir, step, platform, read)


def _read_checkpoint(
    workdir: Path, step: int | None, platform: str, read: Callable[[jax.Device, Checkpoints, int], Result]
) -> Result:
    """What `read` returns for the checkpoint of `step`; None: for the best, if kept, or the newest whole."""
    if not (workdir / CHECKPOINTS).is_dir():
        raise UsageError(f"{workdir} holds no checkpoints: name the --workdir of a run")
    load = partial(read, backend.start(platform))
    best = saved_steps(workdir / BEST)
    if best and step in (None, *best):
        try:
            return load(Checkpoints(workdir / BEST), best[-1])
        except CorruptCheckpointError as error:
            print(f"Skipped {BEST}/{CHECKPOINTS}/{best[-1]}: {error}", file=sys.stderr)
    checkpoints = Checkpoints(workdir)
    steps = checkpoints.steps()
    if not steps:
        raise UsageError(f"{workdir} has no complete checkpoint yet: wait for the first")
    if step is not None and step not in steps:
        choices = ", ".join(map(str, sorted({*steps, *best})))
        raise UsageError(f"there is no checkpoint of step {step}: choose from {choices}")
    restored, skipped = checkpoints.newest(partial(load, checkpoints), steps if step is None else [step])
    for reason in skipped:
        print(f"Skipped {reason}", file=sys.stderr)
    return restored


def load(folder: Path, platform: str, precision: str = "auto") -> LoadedModel:
    """Loads the Llama or Qwen3 in a Hugging Face folder. Raises UsageError if the folder has none.

    `platform` and `precision` are those of the computation.
    """
    config = read_sizes(folder)
    tokenizer, params = read_tokenizer(folder, config.vocab_size), read_params(folder, config)
    device = backend.start(platform)
    model = resolved(config, device, precision)
    return LoadedModel(model, prepare_decode_params(model, jax.device_put(params, device)), tokenizer)


def param_shapes(model: ModelConfig) -> Params:
    """The shapes of the parameters."""
    return tree_of(model, lambda parameter: jax.ShapeDtypeStruct(parameter.shape, np.float32))


def _tokenizer(model: ModelConfig, meta: Mapping[str, Any]) -> Tokenizer:
    vocabulary = meta.get("vocabulary")
    return from_bytes(vocabulary.encode()) if vocabulary else load_tokenizer(model.vocab_size)


def resolved(model: ModelConfig, device: jax.Device, precision: str = "auto") -> ModelConfig:
    """The sizes of `model`, to be computed on `device`, whatever computed them before."""
    unresolved = dataclasses.replace(model, precision=precision, implementation="auto")
    return backend.resolve(unresolved, device)
