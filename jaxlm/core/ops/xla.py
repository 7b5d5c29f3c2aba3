"""The operations in plain JAX: every device can run them, and the records of the others derive from these."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core.layers import MASK_VALUE, linear, merge_heads, rms_norm_rope, split_heads, swiglu_activation
from jaxlm.core.loss import cross_entropy, cross_entropy_and_grad
from jaxlm.core.ops.record import Ops

QUERY_BLOCK = 128  # queries of causal attention that are computed at a time

_einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)


def causal_attention(
    q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array, matmul_dtype: Any, saved: Any = None
) -> tuple[jax.Array, Any]:
    """`Ops.attention` in blocks of queries.

    The scores of a block exist only while it is computed, once forward and once backward, and positions after the
    block are skipped (the idea of Dao et al. 2022, the gradient as in their appendix B). The softmax is in float32.
    """
    saved = _causal(q_BTHK, k_BTHK, v_BTHK, saved, matmul_dtype)
    return saved[0], saved


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _causal(q_BTHK, k_BTHK, v_BTHK, saved, dtype):
    return saved or _attend_in_blocks(q_BTHK, k_BTHK, v_BTHK, dtype)


def _attend_in_blocks(q_BTHK, k_BTHK, v_BTHK, dtype):
    """[B, T, H, K], and logsumexp(scores) [G, T] of each query."""
    q, k, v = (split_heads(x.astype(dtype)) for x in (q_BTHK * q_BTHK.shape[-1] ** -0.5, k_BTHK, v_BTHK))
    out, logsumexp = [], []
    for block in _query_blocks(q.shape[1]):
        keys = slice(block.stop)
        scores_GTS = jnp.where(_causal_mask(block), _einsum("GTK,GSK->GTS", q[:, block], k[:, keys]), MASK_VALUE)
        max_GT1 = jnp.max(scores_GTS, axis=-1, keepdims=True)
        weights_GTS = jnp.exp(scores_GTS - max_GT1)
        sum_GT1 = jnp.sum(weights_GTS, axis=-1, keepdims=True)
        out.append(_einsum("GTS,GSK->GTK", weights_GTS.astype(dtype), v[:, keys]) / sum_GT1)
        logsumexp.append((max_GT1 + jnp.log(sum_GT1))[..., 0])
    out_BTHK = merge_heads(jnp.concatenate(out, axis=1), v_BTHK.shape[2]).astype(v_BTHK.dtype)
    return out_BTHK, jnp.concatenate(logsumexp, axis=1)


def _causal_forward(q_BTHK, k_BTHK, v_BTHK, saved, dtype):
    saved = _causal(q_BTHK, k_BTHK, v_BTHK, saved, dtype)
    return saved, (q_BTHK, k_BTHK, v_BTHK, *saved)


def _causal_backward(dtype, residuals, d_saved):
    d_out_BTHK, _ = d_saved
    q_BTHK, k_BTHK, v_BTHK, out_BTHK, logsumexp_GT = residuals
    scale = q_BTHK.shape[-1] ** -0.5
    q, k, v, d_out, out = (split_heads(x.astype(dtype)) for x in (q_BTHK * scale, k_BTHK, v_BTHK, d_out_BTHK, out_BTHK))
    # the sum over S of weights * d_weights
    mean_GT = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    k_GKT = k.swapaxes(1, 2)
    d_q, d_k, d_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for block in _query_blocks(q.shape[1]):
        keys = slice(block.stop)
        scores_GST = _einsum("GSK,GTK->GST", k[:, keys], q[:, block])
        weights_GST = jnp.where(_causal_mask(block).T, jnp.exp(scores_GST - logsumexp_GT[:, block][:, None]), 0)
        d_weights_GST = _einsum("GSK,GTK->GST", v[:, keys], d_out[:, block])
        d_scores_GST = (weights_GST * (d_weights_GST - mean_GT[:, block][:, None])).astype(dtype)
        d_v = _add_to_start(d_v, _einsum("GST,GTK->GSK", weights_GST.astype(dtype), d_out[:, block]))
        d_k = _add_to_start(d_k, _einsum("GST,GTK->GSK", d_scores_GST, q[:, block]))
        d_q.append(_einsum("GKS,GST->GKT", k_GKT[:, :, keys], d_scores_GST))
    d_q = (jnp.concatenate(d_q, axis=2) * scale).swapaxes(1, 2)
    heads = q_BTHK.shape[2]
    return *(merge_heads(d, heads).astype(x.dtype) for d, x in ((d_q, q_BTHK), (d_k, k_BTHK), (d_v, v_BTHK))), None


_causal.defvjp(_causal_forward, _causal_backward)


def _add_to_start(sum_GSK, part_GSK):
    """Adds a part that holds only the first positions."""
    return jax.lax.dynamic_update_slice(sum_GSK, sum_GSK[:, : part_GSK.shape[1]] + part_GSK, (0, 0, 0))


def _query_blocks(length: int) -> list[slice]:
    return [slice(start, min(start + QUERY_BLOCK, length)) for start in range(0, length, QUERY_BLOCK)]


def _causal_mask(block: slice) -> jax.Array:
    """[T, S]: which positions before the end of a block its queries attend to."""
    return jnp.arange(block.start, block.stop)[:, None] >= jnp.arange(block.stop)[None]


def weight_gradient(a_ND: jax.Array, b_NF: jax.Array) -> jax.Array:
    """`Ops.weight_gradient`."""
    return jnp.matmul(a_ND.T, b_NF, preferred_element_type=jnp.float32)


def fused_linear(ops: Ops, x_BTD: jax.Array, weights: Sequence[jax.Array], matmul_dtype: Any) -> list[jax.Array]:
    """x times each of several matrices, by a matmul for each."""
    return [linear(x_BTD, w_DF, matmul_dtype, ops.weight_gradient) for w_DF in weights]


def query_key_value(
    ops: Ops,
    x_BTD: jax.Array,
    weights: Sequence[jax.Array],
    scales: Sequence[jax.Array],
    rope_cos_sin: tuple[jax.Array, jax.Array],
    eps: float,
    matmul_dtype: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`Ops.query_key_value` by a matmul for each, then the norms."""
    query_scale_K, key_scale_K = scales
    q_BTHK, k_BTHK, v_BTHK = (
        array.reshape(*x_BTD.shape[:2], -1, len(query_scale_K))
        for array in ops.fused_linear(ops, x_BTD, weights, matmul_dtype)
    )
    q_BTHK = rms_norm_rope(q_BTHK, query_scale_K, rope_cos_sin, eps)
    return q_BTHK, rms_norm_rope(k_BTHK, key_scale_K, rope_cos_sin, eps), v_BTHK


def swiglu(
    ops: Ops, x_BTD: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, down_FD: jax.Array, matmul_dtype: Any
) -> jax.Array:
    """`Ops.swiglu` in plain matmuls."""
    gate_BTF, up_BTF = fused_linear(ops, x_BTD, (gate_DF, up_DF), matmul_dtype)
    return linear(swiglu_activation(gate_BTF, up_BTF), down_FD, matmul_dtype, ops.weight_gradient)


def search_loop(condition: Callable[[Any], jax.Array], body: Callable[[Any], Any], carry: Any, rounds: int) -> Any:
    """Repeats `body` while `condition` holds, which it does for at most `rounds` rounds."""
    return jax.lax.while_loop(condition, body, carry)


def stack_by_stack(function: Callable, stacks: Sequence[jax.Array]) -> list[jax.Array]:
    """`Ops.map_matrices` in matmuls of all layers."""
    return [function(stack_LDF) for stack_LDF in stacks]


def select(predicate: jax.Array, true_fun: Callable, false_fun: Callable, *operands: Any) -> Any:
    """`jax.lax.cond` without a branch: computes both and selects."""
    both = true_fun(*operands), false_fun(*operands)
    return jax.tree.map(lambda true, false: jnp.where(predicate, true, false), *both)


def unrolled_search(condition: Callable, body: Callable[[Any], Any], carry: Any, rounds: int) -> Any:
    """`search_loop`, unrolled: always `rounds` rounds."""
    for _ in range(rounds):
        carry = body(carry)
    return carry


def train_step(
    start: Callable,
    accumulate_chunk: Callable,
    update: Callable,
    chunks: int,
    spread: Callable = lambda accumulate: accumulate,
    **jit_options: Any,
) -> jax.stages.Wrapped:
    """`Ops.train_step` as one program, which reuses the buffers of the state it is given."""

    def accumulate(params: Any, ids_BT: jax.Array) -> Any:
        def body(accumulator: Any, _: None) -> tuple[Any, None]:
            return accumulate_chunk(params, accumulator, ids_BT), None

        accumulator = start(params)
        return (jax.lax.scan(body, accumulator, length=chunks) if chunks > 1 else body(accumulator, None))[0]

    def step(state: Any, ids_BT: jax.Array) -> tuple[Any, Any]:
        return update(state, spread(accumulate)(state.params, ids_BT))

    return jax.jit(step, donate_argnums=0, **jit_options)


XLA = Ops(
    attention=causal_attention,
    weight_gradient=weight_gradient,
    fused_linear=fused_linear,
    query_key_value=query_key_value,
    swiglu=swiglu,
    cross_entropy=cross_entropy,
    cross_entropy_and_grad=cross_entropy_and_grad,
    vocab_tile=1536,
    exp_buffer_bytes=2**27,  # less than the backward pass of a block takes in the preset
    exp_buffer_as_bits=True,
    scan=jax.lax.scan,
    map_matrices=stack_by_stack,
    cond=jax.lax.cond,
    sampling_cond=jax.lax.cond,
    search_loop=search_loop,
    search_parts=16,
    decode_layout=jnp.transpose,
    head_row_multiple=8,
    row_multiple=1,
    train_step=train_step,
    decode_on_device=True,
)
