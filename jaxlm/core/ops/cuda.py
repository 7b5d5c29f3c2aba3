"""The operations for an NVIDIA GPU."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core.ops import xla


def causal_attention(
    q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array, matmul_dtype: Any, saved: Any = None
) -> tuple[jax.Array, Any]:
    """`xla.causal_attention`; in bfloat16 by cuDNN's fused kernel, where jax accepts the shapes."""
    if q_BTHK.dtype == jnp.bfloat16 and _cudnn_fits(q_BTHK, k_BTHK, v_BTHK):
        return _fused_attention(q_BTHK, k_BTHK, v_BTHK), None
    return xla.causal_attention(q_BTHK, k_BTHK, v_BTHK, matmul_dtype, saved)


def _fused_attention(q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q_BTHK, k_BTHK, v_BTHK, is_causal=True, implementation="cudnn")


def _cudnn_fits(*qkv: jax.Array) -> bool:
    """Whether jax accepts these arrays for this GPU and its version of cuDNN. It checks them when it traces."""
    try:
        jax.eval_shape(_fused_attention, *qkv)
    except RuntimeError:  # NotImplementedError too
        return False
    return True


def all_of_a_shape(function: Callable, stacks: Sequence[jax.Array]) -> list[jax.Array]:
    """`Ops.map_matrices` for all matrices of a shape at once: a matmul of few small ones leaves a GPU idle."""
    done: dict[int, jax.Array] = {}
    for shape in {stack.shape: None for stack in stacks}:
        places = [place for place, stack in enumerate(stacks) if stack.shape == shape]
        together = function(jnp.concatenate([stacks[place] for place in places]))
        done |= zip(places, jnp.split(together, len(places)), strict=True)
    return [done[place] for place in range(len(stacks))]


def train_step(*functions: Any, **options: Any) -> jax.stages.Wrapped:
    """`xla.train_step`. On several devices, XLA is told to overlap communication with computation."""
    if "spread" in options:
        options["compiler_options"] = {"xla_gpu_enable_latency_hiding_scheduler": True}
    return xla.train_step(*functions, **options)


CUDA = replace(
    xla.XLA,
    attention=causal_attention,
    vocab_tile=6144,
    exp_buffer_bytes=2**30,  # matmuls of many rows are faster
    # a loop or a branch on a value makes the GPU wait for the host
    sampling_cond=xla.select,
    search_loop=xla.unrolled_search,
    search_parts=1,
    map_matrices=all_of_a_shape,
    row_multiple=8,  # else each bfloat16 matmul pads its rows again
    train_step=train_step,
)
