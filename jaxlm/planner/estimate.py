"""Model size, FLOPs and the time of a run, computed from its settings and the measured times of its parts."""

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass

from jaxlm.config import Config, ModelConfig
from jaxlm.core.parameters import PARTS, parameter_table


def parameters_by_part(model: ModelConfig) -> dict[str, int]:
    """The number of parameters in each part of the model. A tied embedding counts once, as the embedding."""
    table = parameter_table(model)
    counts = {part: sum(parameter.size for parameter in table if parameter.part == part) for part in PARTS}
    return {part: count for part, count in counts.items() if count}


def flops_per_token(model: ModelConfig) -> int:
    """Floating-point operations per token, forward and backward: 6 P + 6 L T D.

    P counts the parameters that matmuls read (the embedding only where it is tied to the head). Each takes three
    multiplications and three additions. Causal attention adds two matmuls over T / 2 positions of width D in each of
    L layers. Recomputation is not counted. After the PaLM paper's appendix B (arXiv:2204.02311), whose 12 L T D counts
    no mask.
    """
    table = parameter_table(model)
    matmul_parameters = sum(p.size for p in table if p.kind == "matrix" or p.part == "head")
    matmul_parameters += sum(p.size for p in table if model.tied and p.part == "embedding")
    return 6 * matmul_parameters + 6 * model.layers * model.context * model.width


@dataclass(frozen=True)
class Timings:
    """How long each part of a run takes, in seconds."""

    start: float  # from the command to the first step, plus the extra time of the first evaluation, samples and save
    step: float  # an optimizer step
    evaluation: float
    last_evaluation: float  # over the whole validation data
    samples: float
    save: float  # how much a save delays training
    saving: float  # from the start of a save until it is complete
    end: float  # the last save and the final model, after the last step


def seconds_at(config: Config, timings: Timings, step: int) -> float:
    """Seconds from the command until `step` and everything due after it are done; step 0 is the start."""
    # a save that is still running when the next one is due delays it
    wait = max(0.0, timings.saving - config.save_interval * timings.step)
    pauses = (
        (config.eval_interval, timings.evaluation),
        (config.generation_interval, timings.samples),
        (config.save_interval, timings.save + wait),
    )
    seconds = timings.start + step * timings.step + sum(step // interval * pause for interval, pause in pauses)
    if step == config.max_steps:  # all three are due
        seconds += sum(pause for interval, pause in pauses if step % interval)
        seconds += timings.last_evaluation - timings.evaluation + timings.end
    return seconds


def step_at(config: Config, timings: Timings, seconds: float) -> int:
    """The last step that is done, with everything due after it, `seconds` after the command."""
    steps = range(1, config.max_steps + 1)
    return bisect.bisect_right(steps, seconds, key=lambda step: seconds_at(config, timings, step))


def saves(config: Config) -> range | list[int]:
    """The steps after which a checkpoint is saved, beside the rolling one."""
    regular = range(config.save_interval, config.max_steps + 1, config.save_interval)
    return regular if config.max_steps % config.save_interval == 0 else [*regular, config.max_steps]


def deletions(config: Config) -> Iterator[tuple[int, int]]:
    """Pairs of checkpoints, named by their steps: the first is deleted when the second is complete."""
    steps = saves(config)
    pairs = zip(steps, steps[config.max_checkpoints :], strict=False)
    return ((old, new) for old, new in pairs if not config.keep_every or old % config.keep_every)


def kept(config: Config, step: int) -> list[int]:
    """The checkpoints that exist after `step`, without a rolling one."""
    steps = saves(config)
    count = bisect.bisect_right(steps, step)
    first = max(count - config.max_checkpoints, 0)
    milestones = range(config.keep_every, steps[first], config.keep_every) if config.keep_every else []
    return [*milestones, *steps[first:count]]


TIME_UNITS = (("day", 86400.0), ("hour", 3600.0), ("minute", 60.0), ("second", 1.0))
MAX_ROWS = 16


def timeline(config: Config, timings: Timings) -> tuple[str, list[tuple[int, int]]]:
    """The step that is reached at the end of each day, hour, minute or second: the unit that gives a short table.

    Returns:
        The unit; and pairs of (units passed, step), the last one with `max_steps`.
    """
    seconds = seconds_at(config, timings, config.max_steps)
    unit, length = next((row for row in TIME_UNITS if seconds >= 2 * row[1]), TIME_UNITS[-1])
    count = math.ceil(seconds / length)
    every = math.ceil(count / MAX_ROWS)
    passed = [*range(every, count, every), count]
    return unit, [(n, step_at(config, timings, n * length)) for n in passed]
