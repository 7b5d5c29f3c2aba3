"""Device memory of a training step, from the compiler's analysis."""

import dataclasses
import functools
import math
import resource
import sys
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jaxlm.config import Config
from jaxlm.core.model import loss_and_gradient
from jaxlm.core.parameters import Params, parameter_table
from jaxlm.core.sharding import FSDP, ROWS, state_shardings, state_specs
from jaxlm.core.train_step import TrainState, init_state, make_train_step
from jaxlm.device.mesh import share
from jaxlm.run.checkpoint import META_BYTES, checkpoint_bytes


@dataclass(frozen=True)
class Memory:
    """Peak bytes of a run on a device, by part. A checkpoint's copy exists beside the memory of a step."""

    weights: int
    moments: int  # and the average of the weights
    accumulated: int
    gradients: int
    temporaries: int  # activations, the batch and whatever else a step allocates
    checkpoint_copy: int
    process: int = 0  # the runtime, compiled code, buffers of a save; 0: the arrays alone

    @property
    def step(self) -> int:
        """Bytes of a step."""
        return self.total - self.checkpoint_copy

    @property
    def arrays(self) -> int:
        """Bytes without the process."""
        return self.total - self.process

    @property
    def total(self) -> int:
        """Bytes that the run needs."""
        return sum(dataclasses.astuple(self))


@functools.cache
def state_shapes(config: Config, mesh: Mesh | None = None) -> TrainState:
    """Shapes of the training state of a config."""
    return jax.eval_shape(lambda: init_state(config, mesh))


def device_shapes(config: Config) -> TrainState:
    """Shapes of what one device holds of the training state: of what is like a parameter, its part by `mesh.fsdp`."""

    def part(leaf: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        split = zip_longest(leaf.shape, spec)
        shape = tuple(size // config.mesh.fsdp if name == FSDP else size for size, name in split)
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    state = state_shapes(config)
    return jax.tree.map(part, state, state_specs(config.model, state))


def min_memory(config: Config) -> Memory:
    """The memory that no other setting avoids: all but the temporaries. Compiles nothing and allocates nothing."""
    state = device_shapes(config)
    weights = _size(state.params)
    moments, accumulated = _size((state.opt_state.inner_opt_state, state.average)), _size(state.opt_state.acc_grads)
    return Memory(weights, moments, accumulated, weights, 0, checkpoint_bytes(state) - META_BYTES)


def compile_step(config: Config, mesh: Mesh | None = None) -> Any:
    """The compiled training step of a resolved config, from shapes: allocates nothing."""
    state, rows = state_shapes(config, mesh), None
    if mesh:
        places, rows = state_shardings(config.model, mesh, state), NamedSharding(mesh, ROWS)
        state = jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), state, places)
    return make_train_step(config, mesh).lower(state, batch_shape(config, rows)).compile()


def step_memory(config: Config, compiled: Any) -> Memory | None:
    """The memory of a compiled step; None if the platform gives no analysis.

    The sum of the arguments (weights, moments, accumulated gradients, one micro-batch), the results that do not alias
    them, and the temporaries.
    """
    try:
        analysis = compiled.memory_analysis()
        step = analysis.argument_size_in_bytes + _allocated(analysis)
    except (AttributeError, NotImplementedError, jax.errors.JaxRuntimeError):
        return None
    least = min_memory(config)
    return dataclasses.replace(least, temporaries=max(step - least.step, 0))


def memory_elsewhere(config: Config) -> Memory | None:
    """The most memory of one device of a mesh that is not here, by compiling the step of one device for its rows.

    Beside its temporaries, a device holds gradients while they are summed: of a block and of all outside the blocks.
    One of `mesh.fsdp` also holds these parameters, gathered, beside what the gradient alone allocates; or, if that is
    more, its part of the temporaries of an update and of Muon's layers: momentum, gradient and result.
    """
    alone = share(config)
    by_step = step_memory(alone, compile_step(alone))
    if not by_step:
        return None
    table, fsdp, temporaries = parameter_table(config.model), config.mesh.fsdp, by_step.temporaries
    gathered = 4 * sum(p.size // config.model.layers if p.stacked else p.size for p in table)
    if fsdp == 1:
        most = temporaries + gathered
    else:
        layers = 4 * sum(p.size for p in table if p.optimizer == config.optimizer.name == "muon")
        of_gradient = min(_gradient_temporaries(alone), temporaries)
        most = max(of_gradient + 2 * gathered, (temporaries + 3 * layers) // fsdp)
    return dataclasses.replace(min_memory(config), temporaries=most)


def _gradient_temporaries(config: Config) -> int:
    """Bytes that the gradient of a chunk allocates beside the parameters and the accumulated gradients."""
    params = state_shapes(config).params
    ids_BT = jax.ShapeDtypeStruct((config.chunk_size, config.model.context), np.int32)

    def gradient(params: Params, grads: Params, inputs_BT: jax.Array, targets_BT: jax.Array) -> Any:
        return loss_and_gradient(config.model, params, inputs_BT, targets_BT, 1.0, grads)

    compiled = jax.jit(gradient, donate_argnums=1).lower(params, params, ids_BT, ids_BT).compile()
    return _allocated(compiled.memory_analysis())


def peak_bytes(device: jax.Device) -> int:
    """Peak memory of this process in bytes: of the allocator on an NVIDIA GPU, of the resident set elsewhere."""
    if device.platform == "gpu":
        return device.memory_stats()["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def batch_shape(config: Config, sharding: Sharding | None = None) -> jax.ShapeDtypeStruct:
    """Shape of a micro-batch: a sequence has one token more than the context."""
    return jax.ShapeDtypeStruct((config.batch_size, config.model.context + 1), np.int32, sharding=sharding)


def _allocated(analysis: Any) -> int:
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes


def _size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
