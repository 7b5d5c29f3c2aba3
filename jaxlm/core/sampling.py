"""Logits to tokens, and decoding of several sequences at once with a cache of keys and values.

Prompts are aligned to the right in one array, so that the next token of every sequence takes the same slot of the
cache. A mask hides the padding to their left, and positions count from the first token of each sequence.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.core import ops
from jaxlm.core.model import Cache, empty_cache, forward_with_cache
from jaxlm.core.parameters import Params

NOT_FINITE = -1  # in place of a token whose logits are NaN or infinite
SEARCH_FAN_OUT = 8  # parts into which a round of the threshold search divides its interval
SEARCH_ROUNDS = 10  # at most; the interval is then 2**-30 of the logits' range

counts_of_32_bits = partial(jax.threefry_partitionable, False)  # the other way to draw needs 64, which Metal lacks


class SamplingParams(NamedTuple):
    """How a token is chosen. The values are arrays or numbers: changing them compiles nothing."""

    temperature: Any  # 0: greedy
    top_k: Any = None  # keep the k most likely tokens; None: all, and the program has no search for them
    top_p: Any = None  # of these, keep the fewest with this probability together; None: likewise


def sampling_params(settings: Any) -> SamplingParams:
    """The SamplingParams of settings with a `temperature`, a `top_k` (0: all) and a `top_p` (1: all)."""
    top_k = np.int32(settings.top_k) if settings.top_k else None
    top_p = np.float32(settings.top_p) if settings.top_p < 1 else None
    return SamplingParams(np.float32(settings.temperature), top_k, top_p)


class DecodeState(NamedTuple):
    """Sequences between two tokens."""

    cache: Cache
    logits_BV: jax.Array  # of the next token
    slot: jax.Array  # [] int32: slot of the cache that the next token takes
    first_B: jax.Array  # slot of each sequence's first token
    done_B: jax.Array  # True once a sequence has ended
    keys_B: jax.Array  # a random key for each sequence


def top_k_top_p_mask(
    device_ops: ops.Ops, logits_BV: jax.Array, top_k: jax.Array | None, top_p: jax.Array | None
) -> jax.Array:
    """Which tokens may be sampled: those with the top_k largest logits, and of these the nucleus.

    The nucleus is the smallest set of most likely tokens whose probability, renormalised over the top_k, reaches top_p
    (Holtzman et al. 2020, arXiv 1904.09751). Both are thresholds on the logits, so nothing is sorted.

    Args:
        device_ops: the device's operations.
        logits_BV: float32; -inf is never sampled.
        top_k: [] integer, at least 1; None keeps all.
        top_p: [] float in (0, 1]; None keeps all.

    Returns:
        [B, V] bool. It includes tokens that tie with the least likely of these.
    """
    mask_BV = logits_BV > -jnp.inf
    if top_k is not None:
        mask_BV &= logits_BV >= _threshold(device_ops, logits_BV, None, top_k)
    if top_p is None:
        return mask_BV
    weights_BV = jnp.where(mask_BV, jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)), 0)
    target_B1 = top_p * jnp.sum(weights_BV, axis=-1, keepdims=True)
    return mask_BV & (logits_BV >= _threshold(device_ops, logits_BV, weights_BV, target_B1))


def _threshold(device_ops: ops.Ops, logits_BV: jax.Array, weights_BV: jax.Array | None, target: jax.Array) -> jax.Array:
    """The largest x such that the weights (None: 1 each) of the logits at or above x sum to at least `target`, [B, 1].

    Each round divides the interval into SEARCH_FAN_OUT parts and keeps the one with the threshold, until it holds one
    logit, or several that hardly differ. If all weights together are less than `target`, x is the smallest logit.
    """
    steps_W = jnp.arange(1, SEARCH_FAN_OUT) / SEARCH_FAN_OUT
    parts = [logits_BV]
    if device_ops.search_parts > 1:  # counted in one expression: XLA for the CPU stores the operand of one large sum
        padding = ((0, 0), (0, -logits_BV.shape[1] % device_ops.search_parts))
        parts = jnp.split(jnp.pad(logits_BV, padding, constant_values=-jnp.inf), device_ops.search_parts, axis=1)

    def search(carry):
        rounds_left, low_B1, high_B1, count_low_B1, count_high_B1 = carry  # counts of logits at or above each end
        cuts_BW = low_B1 + (high_B1 - low_B1) * steps_W
        cuts_BW1 = cuts_BW[..., None]
        count_BW = jnp.sum(sum((part[:, None] >= cuts_BW1).astype(jnp.int32) for part in parts), axis=-1)
        sum_BW = count_BW
        if weights_BV is not None:
            sum_BW = jnp.sum(jnp.where(logits_BV[:, None] >= cuts_BW1, weights_BV[:, None], 0), axis=-1)
        enough_BW = sum_BW >= target
        interval = (
            jnp.max(jnp.where(enough_BW, cuts_BW, low_B1), axis=-1, keepdims=True),
            jnp.min(jnp.where(enough_BW, high_B1, cuts_BW), axis=-1, keepdims=True),
            jnp.min(jnp.where(enough_BW, count_BW, count_low_B1), axis=-1, keepdims=True),
            jnp.max(jnp.where(enough_BW, count_high_B1, count_BW), axis=-1, keepdims=True),
        )
        return rounds_left - 1, *interval

    def unfinished(carry):
        rounds_left, *_, count_low_B1, count_high_B1 = carry
        return (rounds_left > 0) & jnp.any(count_low_B1 - count_high_B1 > 1)

    high_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    low_B1 = jnp.min(jnp.where(logits_BV > -jnp.inf, logits_BV, high_B1), axis=-1, keepdims=True)
    counts_B1 = (jnp.full(low_B1.shape, count, jnp.int32) for count in (logits_BV.shape[1], 0))
    start = (jnp.int32(SEARCH_ROUNDS), low_B1, high_B1, *counts_B1)
    return device_ops.search_loop(unfinished, search, start, SEARCH_ROUNDS)[1]


def sample_tokens(device_ops: ops.Ops, logits_BV: jax.Array, keys_B: jax.Array, params: SamplingParams) -> jax.Array:
    """A token for each sequence: the most likely one at temperature 0, else a random one.

    The probabilities are softmax(logits / temperature), restricted by `top_k_top_p_mask`.

    Returns:
        [B] int32; NOT_FINITE where the logits have no finite maximum.
    """
    best_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    side = 4 * math.ceil(logits_BV.shape[1] ** 0.5 / 4)  # of a square with room for all tokens

    def sample() -> jax.Array:
        padding = ((0, 0), (0, side**2 - logits_BV.shape[1]))
        square_BV = jnp.pad(logits_BV, padding, constant_values=-jnp.inf)
        scaled_BV = (square_BV - best_B1) / params.temperature
        mask_BV = top_k_top_p_mask(device_ops, scaled_BV, params.top_k, params.top_p)
        weights_BV = jnp.where(mask_BV, jnp.exp(scaled_BV), 0)
        with counts_of_32_bits():
            return jax.vmap(_sample_index)(weights_BV.reshape(-1, side, side), keys_B)

    token_B = device_ops.sampling_cond(params.temperature > 0, sample, lambda: _argmax(logits_BV, best_B1))
    return jnp.where(jnp.abs(best_B1[:, 0]) < jnp.inf, token_B, NOT_FINITE)


def _sample_index(weights_RC: jax.Array, key: jax.Array) -> jax.Array:
    """An index into the flattened weights, sampled in proportion to them, [] int32.

    It samples a row, then a column of it. That takes random numbers for two rows instead of the whole vocabulary.
    """
    row_key, column_key = jax.random.split(key)
    row = jax.random.categorical(row_key, jnp.log(jnp.sum(weights_RC, axis=1)))
    # selects the row by a mask: under vmap, indexing would be a batched gather
    weights_C = jnp.sum(jnp.where(jnp.arange(len(weights_RC))[:, None] == row, weights_RC, 0), axis=0)
    column = jax.random.categorical(column_key, jnp.log(weights_C))
    return (row * weights_RC.shape[1] + column).astype(jnp.int32)


def _argmax(logits_BV: jax.Array, best_B1: jax.Array) -> jax.Array:
    """`jnp.argmax` over the vocabulary, given the maximum: its own takes ten times as long on a CPU."""
    ids_V, last = jnp.arange(logits_BV.shape[1]), logits_BV.shape[1] - 1
    return jnp.min(jnp.where(logits_BV == best_B1, ids_V, last), axis=-1).astype(jnp.int32)


@jax.jit
def sequence_keys(key: jax.Array, indices_B: jax.Array) -> jax.Array:
    """The random keys of the sequences of these indices, [B, 2] uint32, from a raw key. (A typed key has a sharding,
    which a plugin may not support.)"""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, indices_B)


@jax.jit
def next_window_keys(keys_B: jax.Array, context: Any) -> jax.Array:
    """The random keys of the sequences in their next windows. A window's positions, which `decode_step` folds into its
    keys, end before `context`."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys_B, context)


@partial(jax.jit, static_argnames=("config", "new_slots"))
def prefill(
    config: ModelConfig, weights: Params, ids_BP: jax.Array, lengths_B: jax.Array, keys_B: jax.Array, new_slots: int
) -> DecodeState:
    """Fills the cache with the prompts in one pass; gives the state that `decode` continues.

    Args:
        config: the model's settings, resolved for the device.
        weights: its parameters, from `model.prepare_decode_params`.
        ids_BP: prompts, each at the right end of its row. The ids to their left are ignored.
        lengths_B: tokens of each prompt, 0 to P. A row without tokens is padding and counts as ended.
        keys_B: a random key for each sequence.
        new_slots: how many tokens `decode` may add.
    """
    B, P = ids_BP.shape
    slots_P = jnp.arange(P)
    first_B = P - lengths_B
    positions_BP = jnp.maximum(slots_P[None] - first_B[:, None], 0)
    slots_S = jnp.arange(P + new_slots)
    mask_BPS = (slots_S[None, None] <= slots_P[None, :, None]) & (slots_S[None, None] >= first_B[:, None, None])
    cache = empty_cache(config, B, P + new_slots)
    logits_BV, cache = forward_with_cache(config, weights, ids_BP, positions_BP, cache, jnp.int32(0), mask_BPS)
    return DecodeState(cache, logits_BV, jnp.int32(P), first_B, lengths_B == 0, keys_B)


@partial(jax.jit, static_argnames="config")
def decode_step(
    config: ModelConfig, weights: Params, state: DecodeState, params: SamplingParams, end_of_text: Any
) -> tuple[DecodeState, jax.Array]:
    """Adds one token to each sequence: the next state, and [B] int32, `end_of_text` for a sequence that has ended.

    A sequence ends with `end_of_text`, with NOT_FINITE or with the last token that its context has room for.
    """
    s, slots_S = state, jnp.arange(state.cache.keys_GSK[0].shape[1])
    positions_B = s.slot - s.first_B
    keys_B = jax.vmap(jax.random.fold_in)(s.keys_B, positions_B)
    token_B = sample_tokens(ops.get(config.implementation), s.logits_BV, keys_B, params)
    token_B = jnp.where(s.done_B, end_of_text, token_B)
    mask_B1S = ((slots_S[None] <= s.slot) & (slots_S[None] >= s.first_B[:, None]))[:, None]
    logits_BV, cache = forward_with_cache(
        config, weights, token_B[:, None], positions_B[:, None], s.cache, s.slot, mask_B1S
    )
    done_B = (token_B == end_of_text) | (token_B == NOT_FINITE) | (positions_B >= config.context - 1)
    return DecodeState(cache, logits_BV, s.slot + 1, s.first_B, done_B, s.keys_B), token_B


def decode(
    config: ModelConfig, weights: Params, state: DecodeState, params: SamplingParams, end_of_text: Any, count: int
) -> tuple[DecodeState, jax.Array | np.ndarray]:
    """Adds up to `count` tokens to each sequence; stops when all have ended.

    The tokens of a sequence depend only on its prompt, its key and `params`: not on the other sequences, nor on how
    many tokens each call adds.

    Returns:
        The next state (`state` is donated), and the tokens, [B, count] int32: `end_of_text` from the end of each
        sequence on.
    """
    if ops.get(config.implementation).decode_on_device:
        return _decode_on_device(config, weights, state, params, end_of_text, count)
    tokens_BN = np.full((len(state.done_B), count), end_of_text, np.int32)
    for i in range(count):
        if np.all(state.done_B):
            break
        state, tokens_BN[:, i] = decode_step(config, weights, state, params, end_of_text)
    return state, tokens_BN


@partial(jax.jit, static_argnames=("config", "count"), donate_argnames=("state",))
def _decode_on_device(config, weights, state, params, end_of_text, count):
    def body(carry):
        i, state, tokens_BN = carry
        state, token_B = decode_step(config, weights, state, params, end_of_text)
        return i + 1, state, jax.lax.dynamic_update_slice(tokens_BN, token_B[:, None], (0, i))

    tokens_BN = jnp.full((state.done_B.shape[0], count), end_of_text, jnp.int32)
    start = (jnp.int32(0), state, tokens_BN)
    _, state, tokens_BN = jax.lax.while_loop(lambda c: (c[0] < count) & ~jnp.all(c[1].done_B), body, start)
    return state, tokens_BN
