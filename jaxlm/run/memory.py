"""What a training step holds in memory, by the compiler's own analysis."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxlm.config import Config
from jaxlm.core.ops.apple import HostLoopStep
from jaxlm.core.train_step import TrainState, init_state, make_train_step
from jaxlm.run.checkpoint import checkpoint_bytes


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


def step_memory(config: Config, compiled: Any) -> Memory | None:
    """By the analysis of the compiled step; None where the platform gives none.

    The arguments (weights, moments, accumulated gradients, one micro-batch), the results that do not lie in the
    arguments' place, and the temporaries. Of a step of several programs, what lies beside the one of the worst moment
    counts too, and no buffer is reused.
    """
    state, batch = _shapes(config)
    try:
        if isinstance(compiled, HostLoopStep):
            total = _size(jax.eval_shape(make_train_step(config).start, state.params))
            lie = {"start": 0, "accumulate_chunk": total, "update": total}
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
