"""The operations for an Apple GPU, whose plugins take no loop and no conditional: all is unrolled or on the host."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core.ops import xla


def unrolled_scan(body: Callable, carry: Any, xs: Any, reverse: bool = False) -> tuple[Any, Any]:
    """`jax.lax.scan`, unrolled, with no loop in the program (jax 0.4.34 leaves one with `unroll`).

    A barrier orders the iterations, so that buffers can be reused. (XLA's compiler for the CPU ignores it.)
    """
    order, outs = range(len(jax.tree.leaves(xs)[0])), []
    for index in order[::-1] if reverse else order:
        x = jax.tree.map(lambda stacked, index=index: jax.lax.index_in_dim(stacked, index, keepdims=False), xs)
        carry, out = body(*jax.lax.optimization_barrier((carry, x)))
        outs.append(out)
    return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *(outs[::-1] if reverse else outs))


@dataclass(frozen=True)
class HostLoopStep:
    """A micro-step of several programs, the jitted arguments of `Ops.train_step`; the host loops over the chunks.

    The host waits for each chunk. Where no buffer is reused, the next one would allocate before this one has freed.
    """

    start: Any
    accumulate_chunk: Any
    update: Any
    chunks: int
    argument_bytes: int = 0  # of the state and a micro-batch, once it is lowered

    def __call__(self, state: Any, ids_BT: jax.Array) -> tuple[Any, Any]:
        accumulator = self.start(state.params)
        for _ in range(self.chunks):
            accumulator = jax.block_until_ready(self.accumulate_chunk(state.params, accumulator, ids_BT))
        return self.update(state, accumulator)

    def lower(self, state: Any, ids_BT: Any) -> "HostLoopStep":
        """Lowers the programs for these arrays or shapes, as `jax.jit` does one."""
        accumulator = jax.eval_shape(self.start, state.params)
        return HostLoopStep(
            self.start.lower(state.params),
            self.accumulate_chunk.lower(state.params, accumulator, ids_BT),
            self.update.lower(state, accumulator),
            self.chunks,
            sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves((state, ids_BT))),
        )

    def compile(self) -> "HostLoopStep":
        """Compiles what `lower` gave."""
        start, accumulate_chunk, update = (p.compile() for p in (self.start, self.accumulate_chunk, self.update))
        return HostLoopStep(start, accumulate_chunk, update, self.chunks, self.argument_bytes)

    def memory_analysis(self) -> SimpleNamespace:
        """The bytes of what `compile` gave, as a compiled `jax.jit` tells them.

        No buffer is reused: they are those of the program with the highest peak and of the arrays that exist beside it.
        """
        start, *others = (program.memory_analysis() for program in (self.start, self.accumulate_chunk, self.update))
        peak = max(_allocated(start), *(start.output_size_in_bytes + _allocated(other) for other in others))
        sizes = {"temp_size_in_bytes": peak, "output_size_in_bytes": 0, "alias_size_in_bytes": 0}
        return SimpleNamespace(argument_size_in_bytes=self.argument_bytes, **sizes)


def _allocated(analysis: Any) -> int:
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes


def train_step(start: Callable, accumulate_chunk: Callable, update: Callable, chunks: int) -> HostLoopStep:
    """`Ops.train_step` as several programs. The state is not donated: Apple's plugins reuse no buffer."""
    return HostLoopStep(jax.jit(start), jax.jit(accumulate_chunk), jax.jit(update), chunks)


APPLE = replace(
    xla.XLA,
    vocab_tile=12_565,  # a quarter of GPT-2's vocabulary: few tiles to unroll, none as wide as 32,767
    exp_buffer_as_bits=False,
    scan=unrolled_scan,
    cond=xla.select,
    sampling_cond=xla.select,
    search_loop=xla.unrolled_search,
    search_parts=1,
    train_step=train_step,
    decode_on_device=False,
)
