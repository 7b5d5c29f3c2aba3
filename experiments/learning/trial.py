"""One trial: a whole schedule of training by a recipe, and its validation loss."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from itertools import islice
from statistics import median
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.learning import orders
from jaxlm.config import Config, from_config_dict
from jaxlm.core.model import parameter_count
from jaxlm.core.train_step import init_state, make_eval_step
from jaxlm.data.token_files import TokenFiles, bits_per_byte, train_batch_stream, val_batches
from jaxlm.device import backend
from jaxlm.run.memory import compile_step

CURVE_POINTS = 40  # of each trial
CURVE_SEQUENCES = 64  # of the validation text, for each point


@dataclass(frozen=True)
class Trial:
    """A recipe and a seed."""

    name: str
    settings: dict[str, Any] = field(hash=False)  # those that differ from the preset
    seed: int = 0
    grows: bool = False  # whether the first half of the steps has half the batch
    preset: str = "m2_60m"  # a file in configs/
    loss: str = ""  # of `losses.py`; empty: cross-entropy
    order: str = ""  # of `orders.py`; empty: jaxlm's

    @property
    def key(self) -> str:
        """Names the trial in a file of results."""
        return f"{self.name}, seed {self.seed}"

    def config(self, device: jax.Device) -> Config:
        """The settings of the run, resolved for `device`."""
        settings = import_module(f"configs.{self.preset}").get_config()
        settings.update_from_flattened_dict(self.settings | {"seed": self.seed})
        return backend.resolve_run(from_config_dict(settings), device)


class Phase(NamedTuple):
    """Steps of one batch size."""

    config: Config
    steps: int
    first_batch: int  # index in the stream of batches of this size


def phases(trial: Trial, config: Config) -> list[Phase]:
    """The phases of a trial with these settings."""
    if not trial.grows:
        return [Phase(config, config.max_steps, 0)]
    half = config.max_steps // 2
    smaller = replace(config, batch_size=config.batch_size // 2)
    return [Phase(smaller, half, 0), Phase(config, config.max_steps - half, half // 2 * config.grad_accum_steps)]


def run(trial: Trial, tokens: TokenFiles, device: jax.Device) -> dict[str, Any]:
    """Trains through the phases; returns the trial's row of the results.

    The time of a step is the median over the points of the curve in the second half of the run.
    """
    config = trial.config(device)
    compiled = [(phase, compile_step(phase.config)) for phase in phases(trial, config)]
    state = jax.device_put(init_state(config), device)
    shape = jax.ShapeDtypeStruct((config.batch_size, config.model.context), np.int32)
    eval_step = make_eval_step(config).lower(state.weights, shape, shape).compile()
    every = max(1, config.max_steps // CURVE_POINTS)
    curve: list[dict[str, float]] = []
    seconds: list[float] = []
    norms: list[jax.Array] = []
    step = trained = timed = 0
    for (c, steps, first), train_step in compiled:
        batches = _batches(trial, tokens, c, first)
        timed, started = step, time.perf_counter()
        for _ in range(steps):
            for ids in islice(batches, c.grad_accum_steps):
                state, metrics = train_step(state, jax.device_put(ids, device))
            step, trained = step + 1, trained + c.tokens_per_step
            norms.append(metrics.grad_norm)
            if step % every == 0:
                jax.block_until_ready(metrics)
                seconds.append((time.perf_counter() - started) / (step - timed))
                point = {"loss": metrics.loss, "grad_norm": np.median(jax.device_get(norms))}
                point["val_loss"] = _evaluate(config, eval_step, state, tokens, CURVE_SEQUENCES)[0]
                curve.append({"step": step, "tokens": trained} | {k: round(float(v), 4) for k, v in point.items()})
                norms, timed, started = [], step, time.perf_counter()
    loss, bits = _evaluate(config, eval_step, state, tokens, 0)
    return {
        "trial": trial.key,
        "name": trial.name,
        "seed": trial.seed,
        "settings": trial.settings,
        "val_loss": round(loss, 4),
        "val_bits_per_byte": round(bits, 4),
        "steps": step,
        "tokens": trained,
        "step_ms": round(1e3 * median(seconds[len(seconds) // 2 :]), 2),
        "parameters": parameter_count(state.params),
        "device": device.device_kind,
        "jax": jax.__version__,
        "curve": curve,
    }


def _batches(trial: Trial, tokens: TokenFiles, config: Config, first: int) -> Iterator[np.ndarray]:
    ids, context, rows, seed = tokens.train, config.model.context, config.batch_size, config.seed
    if trial.order:
        return orders.batches(trial.order, ids, tokens.tokenizer.end_of_text, context, rows, seed)
    return train_batch_stream(ids, context, rows, seed, first)


def _evaluate(config: Config, eval_step: Any, state: Any, tokens: TokenFiles, limit: int) -> tuple[float, float]:
    return validation_loss(partial(eval_step, state.weights), config, tokens, limit)


def validation_loss(
    loss_sum: Callable[[np.ndarray, np.ndarray], Any], config: Config, tokens: TokenFiles, limit: int = 0
) -> tuple[float, float]:
    """The validation loss over `limit` sequences (0: all), in nats a token and in bits a byte.

    `loss_sum` takes the inputs and the targets of a batch, [B, T] each, and gives its loss in nats.
    """
    sums, count, text_bytes = [], 0, 0
    for inputs, targets in val_batches(tokens.val, config.model.context, config.batch_size, limit):
        sums.append(loss_sum(inputs, targets))
        count += int((targets >= 0).sum())
        text_bytes += tokens.text_bytes(targets)
    loss = float(np.sum(jax.device_get(sums), dtype=np.float64)) / count
    return loss, bits_per_byte(loss, count, text_bytes)
