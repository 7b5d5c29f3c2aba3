"""The record of operations that a kind of device may compute in its own way."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Ops:
    """Functions and sizes for one kind of device. A function that builds on others takes the record first."""

    # (q, k, v [B, T, H, K], matmul_dtype, saved=None) -> [B, T, H, K] in the dtype of v, and residuals without a
    # gradient. Causal. With the residuals of a call on the same arrays as `saved`, it computes only the gradient.
    attention: Callable[..., Any]
    weight_gradient: Callable[..., Any]  # (a [N, D], b [N, F]) -> a^T b [D, F] float32, the gradient of a weight
    fused_linear: Callable[..., Any]  # (ops, x [B, T, D], weights [D, F] each, matmul_dtype) -> list of [B, T, F]
    # (ops, x [B, T, D], weights [D, F] of queries, keys and values, scales [K] of queries and keys, the pair of
    # `layers.rope_cos_sin`, eps, matmul_dtype) -> q, k, v [B, T, H, K], q and k by `layers.rms_norm_rope`
    query_key_value: Callable[..., Any]
    # (ops, x [B, T, D], gate, up [D, F], down [F, D], matmul_dtype) -> (silu(x gate) * (x up)) down (Shazeer 2020)
    swiglu: Callable[..., Any]
    cross_entropy: Callable[..., Any]  # as `loss.cross_entropy`
    cross_entropy_and_grad: Callable[..., Any]  # as `loss.cross_entropy_and_grad`
    vocab_tile: int  # entries of the vocabulary whose logits exist at one time
    exp_buffer_bytes: int  # of exponentials that the loss saves for its gradient
    # Whether it saves bfloat16 as uint16. XLA for the CPU would convert the tiles of all iterations to float32 before
    # the next loop.
    exp_buffer_as_bits: bool
    scan: Callable[..., Any]  # `jax.lax.scan` (body, carry, xs, reverse=False)
    # (function, stacks [L, D, F] each) -> list of the function of each. The function maps each matrix of [N, D, F] by
    # itself, to the same shape. For the optimizer's matmuls.
    map_matrices: Callable[..., Any]
    cond: Callable[..., Any]  # `jax.lax.cond` (predicate, true_fun, false_fun, *operands), for the optimizer's update
    sampling_cond: Callable[..., Any]  # the same, for what a temperature chooses
    # (condition, body, carry, rounds) -> carry. Repeats body while the condition holds, or `rounds` times; rounds after
    # the condition fails change no result.
    search_loop: Callable[..., Any]
    search_parts: int  # parts of the vocabulary that the search counts in one expression
    decode_layout: Callable[..., Any]  # a matrix stored as [F, D] -> what `layers.linear` reads fastest
    # number of rows to pad the head to for decoding: a GPU would pad it again for each matmul in bfloat16
    head_row_multiple: int
    row_multiple: int  # number of sequences to pad a batch of prompts to
    # (start, accumulate_chunk, update, chunks) -> the jitted micro-step, (state, ids [B, T + 1]) -> (state, metrics).
    # start: params -> accumulator. accumulate_chunk: params, accumulator, ids -> accumulator, called for each chunk.
    # update: state, accumulator -> state, metrics. For several devices also `spread`, which makes of the function that
    # accumulates a micro-batch, (params, ids) -> accumulator, one for all devices, and options of `jax.jit`.
    train_step: Callable[..., Any]
    decode_on_device: bool  # whether one program decodes all tokens; else the host calls one program a token
