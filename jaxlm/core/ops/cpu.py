"""The operations for a CPU."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.core.ops import xla

ROW_GROUP = 8  # rows of float32 that XLA multiplies at a time


def weight_gradient(a_ND: jax.Array, b_NF: jax.Array) -> jax.Array:
    """`xla.weight_gradient` in a form that is fast on a CPU.

    XLA has fast matmuls on a CPU, but not for this form. So the narrower operand is transposed first, by tiles of
    16 x 16: XLA would fold a plain transpose back into the matmul.
    """
    if any(size % 16 for size in (*a_ND.shape, *b_NF.shape)):
        return xla.weight_gradient(a_ND, b_NF)
    if a_ND.shape[1] <= b_NF.shape[1]:
        return jnp.matmul(_transposed(a_ND), b_NF, preferred_element_type=jnp.float32)
    return _transposed(jnp.matmul(_transposed(b_NF), a_ND, preferred_element_type=jnp.float32))


def _transposed(x_ND: jax.Array) -> jax.Array:
    N, D = x_ND.shape
    return x_ND.reshape(N // 16, 16, D // 16, 16).transpose(2, 3, 0, 1).reshape(D, N)


class Transposed(NamedTuple):
    """A matrix [D, F] that is stored as F rows of D numbers, as `layers.linear` multiplies with it in decoding."""

    w_FD: jax.Array

    def product(self, x_ND: jax.Array, dtype: Any) -> jax.Array:
        """x w in the fastest form: w on the left, which the barrier keeps there. On the right, XLA would pack it.

        In float32 XLA multiplies one row in place, and whole groups of rows faster than others. It would convert a
        bfloat16 w for one row, but not for two.
        """
        N, x_lowp_ND, w_FD = len(x_ND), x_ND.astype(dtype), self.w_FD.astype(dtype)
        is_bfloat16 = w_FD.dtype == jnp.bfloat16
        if N == 1 and not is_bfloat16:
            return jnp.einsum("ND,FD->NF", x_lowp_ND, w_FD)
        rows = max(N, 2) if is_bfloat16 else N + -N % ROW_GROUP
        x_lowp_ND = jnp.pad(x_lowp_ND, ((0, rows - N), (0, 0)))
        out_FN = jnp.einsum("FD,ND->FN", w_FD, x_lowp_ND, preferred_element_type=x_ND.dtype)
        return jax.lax.optimization_barrier(out_FN)[:, :N].T


# XLA's default scheduler, for parallel work, updates all parameters at once and keeps the temporaries of all. It is no
# faster here. jax 0.4.34 does not have it.
_SCHEDULER = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
_OPTIONS: Any = {"compiler_options": _SCHEDULER} if jax.__version_info__ >= (0, 5) else {}


def layer_by_layer(function: Callable, stacks: Sequence[jax.Array]) -> list[jax.Array]:
    """`Ops.map_matrices` in loops: XLA for the CPU would keep the temporaries of all layers."""
    return [jax.lax.map(lambda matrix_DF: function(matrix_DF[None])[0], stack_LDF) for stack_LDF in stacks]


CPU = replace(
    xla.XLA,
    vocab_tile=8192,
    weight_gradient=weight_gradient,
    map_matrices=layer_by_layer,
    decode_layout=Transposed,
    head_row_multiple=1,  # a tied head is the embedding itself
    train_step=partial(xla.train_step, **_OPTIONS),
)
