"""The record of operations that a kind of device may compute in its own way."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Ops:
    """Functions and sizes for one kind of device. A function that builds on others takes the record first.

    Attributes:
        attention: (q, k, v [B, T, H, K], matmul_dtype, saved=None) -> [B, T, H, K] and its residuals. Causal. With the
            residuals of an earlier call on the same arrays as `saved`, it computes only the gradient.
        weight_gradient: (a [N, D], b [N, F]) -> a^T b [D, F] float32, the gradient of a weight.
        fused_linear: (ops, x [B, T, D], weights [D, F] each, matmul_dtype) -> a list of [B, T, F], x times each.
        swiglu: (ops, x [B, T, D], gate, up [D, F], down [F, D], matmul_dtype) -> [B, T, D].
        cross_entropy: as `loss.cross_entropy`.
        cross_entropy_and_grad: as `loss.cross_entropy_and_grad`.
        vocab_tile: entries of the vocabulary whose logits exist at one time.
        exp_buffer_bytes: bytes of exponentials that the loss saves for its gradient.
        exp_buffer_as_bits: whether it saves bfloat16 as uint16. XLA for the CPU would convert the tiles of all
            iterations to float32 before the next loop.
        scan: `jax.lax.scan` (body, carry, xs, reverse=False).
        cond: `jax.lax.cond` (predicate, true_fun, false_fun, *operands), for the optimizer's update.
        sampling_cond: the same, for what a temperature chooses.
        search_loop: (condition, body, carry, rounds) -> carry. Repeats body while the condition holds, or `rounds`
            times; rounds after the condition fails change no result.
        search_parts: parts of the vocabulary that the search counts in one expression.
        decode_layout: a matrix stored as [F, D], in the form in which `layers.linear` reads it fastest.
        row_multiple: number of sequences to pad a batch of prompts to.
        train_step: (start, accumulate_chunk, update, chunks) -> the micro-step, (state, ids) -> (state, metrics).
        decode_on_device: whether one program decodes all tokens; else the host calls one program a token.
    """

    attention: Callable[..., tuple[jax.Array, Any]]
    weight_gradient: Callable[[jax.Array, jax.Array], jax.Array]
    fused_linear: Callable[..., list[jax.Array]]
    swiglu: Callable[..., jax.Array]
    cross_entropy: Callable[..., jax.Array]
    cross_entropy_and_grad: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
    vocab_tile: int
    exp_buffer_bytes: int
    exp_buffer_as_bits: bool
    scan: Callable[..., tuple[Any, Any]]
    cond: Callable[..., Any]
    sampling_cond: Callable[..., Any]
    search_loop: Callable[..., Any]
    search_parts: int
    decode_layout: Callable[[jax.Array], Any]
    row_multiple: int
    train_step: Callable[..., Any]
    decode_on_device: bool
