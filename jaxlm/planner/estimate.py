"""What a run costs, reckoned from its settings, its compiled step and what a step and each pause were found to take."""

import bisect
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxlm.checkpoint import checkpoint_bytes
from jaxlm.config import Config, ModelConfig
from jaxlm.model import init_params, parameter_count
from jaxlm.step import HostStep, TrainState, init_state, make_train_step

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
class Memory:
    """Bytes on the device at the worst moment of a run, by part. A checkpoint's copy lies beside a step's memory."""

    weights: int
    moments: int
    accumulated: int
    gradients: int
    temporaries: int  # activations, the batch and whatever else a step needs for itself
    checkpoint_copy: int

    @property
    def step(self) -> int:
        """Bytes of a step."""
        return self.total - self.checkpoint_copy

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def least_memory(config: Config) -> Memory:
    """What no setting avoids: all but the temporaries. Compiles nothing and allocates nothing."""
    state = jax.eval_shape(lambda: init_state(config))
    weights = _size(state.params)
    moments, accumulated = _size(state.opt_state.inner_opt_state), _size(state.opt_state.acc_grads)
    return Memory(weights, moments, accumulated, weights, 0, checkpoint_bytes(state) - 2**20)


def compile_step(config: Config) -> Any:
    """The compiled training step of a resolved config, from shapes: nothing is allocated."""
    return make_train_step(config).lower(*_shapes(config)).compile()


def memory(config: Config, compiled: Any) -> Memory | None:
    """By the analysis of the compiled step; None where the platform gives none.

    The arguments (weights, moments, accumulated gradients, one micro-batch), the results that do not lie in the
    arguments' place, and the temporaries. Of a step of several programs, what lies beside the one of the worst moment
    counts too, and no buffer is reused.
    """
    state, batch = _shapes(config)
    try:
        if isinstance(compiled, HostStep):
            total = _size(jax.eval_shape(make_train_step(config).start, state.params))  # type: ignore[union-attr]
            lie = {"start": 0, "add_slice": total, "update": total}
            programs = {name: getattr(compiled, name).memory_analysis() for name in lie}
            step = _size((state, batch)) + max(lie[name] + _made(program) for name, program in programs.items())
        else:
            analysis = compiled.memory_analysis()
            step = analysis.argument_size_in_bytes + _made(analysis)
    except (AttributeError, NotImplementedError, jax.errors.JaxRuntimeError):
        return None
    least = least_memory(config)
    return dataclasses.replace(least, temporaries=max(step - least.step, 0))


def _made(analysis: Any) -> int:
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes


def _shapes(config: Config) -> tuple[TrainState, jax.ShapeDtypeStruct]:
    batch = jax.ShapeDtypeStruct((config.batch_size, config.model.context + 1), np.int32)
    return jax.eval_shape(lambda: init_state(config)), batch


def _size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@dataclass(frozen=True)
class Seconds:
    """What each thing in a run takes, in seconds."""

    start: float  # from the command to the first step; the first evaluation, texts and save take that much longer too
    step: float  # an optimizer step
    evaluation: float
    last_evaluation: float  # of the whole validation text
    samples: float
    save: float  # what it holds training up, and slows it down
    saving: float  # until it is whole
    end: float  # what the last save and the final model take after the last step


def seconds_at(config: Config, s: Seconds, step: int) -> float:
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


def step_at(config: Config, s: Seconds, seconds: float) -> int:
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


def timeline(config: Config, s: Seconds) -> tuple[str, list[tuple[int, int]]]:
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
