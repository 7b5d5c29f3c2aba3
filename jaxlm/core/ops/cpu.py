"""The operations for a CPU."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core.layers import Transposed
from jaxlm.core.ops import xla


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
