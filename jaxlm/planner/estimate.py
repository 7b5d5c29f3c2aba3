"""What a run costs, reckoned from its settings, its compiled step and what a step and each pause were found to take."""

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax

from jaxlm.config import Config, ModelConfig
from jaxlm.core.model import init_params, parameter_count

PARTS = {
    "attention": ("query", "key", "value", "output"),
    "feed-forward": ("gate", "up", "down"),
    "norms": ("attention_norm", "mlp_norm"),
}


def parameters_by_part(model: ModelConfig) -> dict[str, int]:
    """How many numbers each part of the model has; a tied embedding is the head as well."""
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    by_part = {"embedding": parameter_count(params["embedding"])}
    by_part |= {part: sum(parameter_count(params["blocks"][name]) for name in names) for part, names in PARTS.items()}
    by_part["norms"] += parameter_count(params["norm"])
    return by_part | ({} if model.tied else {"head": parameter_count(params["head"])})


def flops_per_token(model: ModelConfig) -> int:
    """Floating-point operations of a token, forward and backward: 6 P + 6 L T D.

    P numbers in matrices (the embedding only where it is the head), each multiplied and added three times; and in each
    of L layers two products of T / 2 positions by D in attention, likewise. Recomputation counts nothing.
    """
    by_part = parameters_by_part(model)
    matrices = sum(by_part.values()) - by_part["norms"] - (0 if model.tied else by_part["embedding"])
    return 6 * matrices + 6 * model.layers * model.context * model.width


@dataclass(frozen=True)
class Timings:
    """What each thing in a run takes, in seconds."""

    start: float  # from the command to the first step; the first evaluation, texts and save take that much longer too
    step: float  # an optimizer step
    evaluation: float
    last_evaluation: float  # of the whole validation text
    samples: float
    save: float  # what it holds training up, and slows it down
    saving: float  # until it is whole
    end: float  # what the last save and the final model take after the last step


def seconds_at(config: Config, s: Timings, step: int) -> float:
    """Seconds from the command until `step` is done with all that is due after it; 0 is the start."""
    wait = max(0.0, s.saving - config.save_interval * s.step)  # for a save that is not whole when the next one is due
    pauses = (
        (config.eval_interval, s.evaluation),
        (config.generation_interval, s.samples),
        (config.save_interval, s.save + wait),
    )
    total = s.start + step * s.step + sum(step // interval * seconds for interval, seconds in pauses)
    if step == config.max_steps:  # all three are due
        total += sum(seconds for interval, seconds in pauses if step % interval)
        total += s.last_evaluation - s.evaluation + s.end
    return total


def step_at(config: Config, s: Timings, seconds: float) -> int:
    """The last step that is done, with all that is due after it, so many seconds after the command."""
    steps = range(1, config.max_steps + 1)
    return bisect.bisect_right(steps, seconds, key=lambda step: seconds_at(config, s, step))


def saves(config: Config) -> range | list[int]:
    """The steps after which a checkpoint is saved."""
    regular = range(config.save_interval, config.max_steps + 1, config.save_interval)
    return regular if config.max_steps % config.save_interval == 0 else [*regular, config.max_steps]


def deletions(config: Config) -> Iterator[tuple[int, int]]:
    """Which checkpoint is deleted, and after which later one is whole; both named by their step."""
    steps = saves(config)
    return zip(steps, steps[config.max_checkpoints :], strict=False)


def kept(config: Config, step: int) -> list[int]:
    """The checkpoints that there are after `step`."""
    return [saved for saved in saves(config) if saved <= step][-config.max_checkpoints :]


UNITS = (("day", 86400.0, 2 * 86400.0), ("hour", 3600.0, 7200.0), ("minute", 60.0, 120.0), ("second", 1.0, 0.0))
MOST_ROWS = 16


def timeline(config: Config, s: Timings) -> tuple[str, list[tuple[int, int]]]:
    """The step that stands at the end of each day (hour, minute, second: whatever gives a table of a few lines).

    Returns:
        The unit; and (how many of it have passed, the step), the last one with `max_steps`.
    """
    total = seconds_at(config, s, config.max_steps)
    unit, length = next((unit, length) for unit, length, least in UNITS if total >= least)
    count = math.ceil(total / length)
    every = math.ceil(count / MOST_ROWS)
    passed = [*range(every, count, every), count]
    return unit, [(n, step_at(config, s, n * length)) for n in passed]
