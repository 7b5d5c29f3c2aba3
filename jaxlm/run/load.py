"""Loads a trained model from a checkpoint of a run or from a Hugging Face folder."""

import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import SingleDeviceSharding

from jaxlm.config import Config, ModelConfig, from_config_dict
from jaxlm.core.model import init_params, prepare_decode_params
from jaxlm.core.parameters import Params
from jaxlm.data.tokenizer import Tokenizer, TokenizerProtocol, from_bytes, load_tokenizer
from jaxlm.device import backend
from jaxlm.errors import CorruptCheckpointError, UsageError
from jaxlm.interop.huggingface import read_params, read_sizes, read_tokenizer
from jaxlm.run.checkpoint import Checkpoints
from jaxlm.run.workdir import BEST, CHECKPOINTS, saved_steps


class Checkpoint(NamedTuple):
    """The model of a checkpoint, and the run that it belongs to."""

    step: int
    config: Config
    meta: dict[str, Any]  # from `resume.describe_run`
    model: ModelConfig  # resolved for the device
    params: Params  # their average, if the run keeps one

    @property
    def tokenizer(self) -> Tokenizer:
        """An own tokenizer is in the checkpoint, so that it needs no token files."""
        vocabulary = self.meta.get("vocabulary")
        return from_bytes(vocabulary.encode()) if vocabulary else load_tokenizer(self.model.vocab_size)


class LoadedModel(NamedTuple):
    """A model that is ready to generate text."""

    config: ModelConfig  # resolved for the device
    weights: Params  # from `model.prepare_decode_params`
    tokenizer: TokenizerProtocol


def restore(workdir: Path, step: int | None, platform: str, precision: str = "auto") -> Checkpoint:
    """Restores the model of a run's checkpoint.

    It is that of `step`. If that is None, it is the best step's, if the run keeps it, or else the newest that is whole.
    `platform` and `precision` are those of the computation. Raises UsageError if there is no such checkpoint.
    """
    if not (workdir / CHECKPOINTS).is_dir():
        raise UsageError(f"{workdir} holds no checkpoints: name the --workdir of a run")
    device = backend.start(platform)

    def load(checkpoints: Checkpoints, step: int) -> Checkpoint:
        meta = checkpoints.meta(step)
        config = from_config_dict(meta["config"])
        model = _resolve(config.model, device, precision)
        like = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
        params = checkpoints.weights(step, like, SingleDeviceSharding(device))
        return Checkpoint(step, config, meta, model, params)

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
    model = _resolve(config, device, precision)
    return LoadedModel(model, prepare_decode_params(model, jax.device_put(params, device)), tokenizer)


def _resolve(model: ModelConfig, device: jax.Device, precision: str) -> ModelConfig:
    unresolved = dataclasses.replace(model, precision=precision, implementation="auto")
    return backend.resolve(unresolved, device)
