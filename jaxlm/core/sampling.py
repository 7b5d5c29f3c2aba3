"""Logits to tokens, and the jitted loop that writes texts with a cache of keys and values.

Prompts of different lengths stand at the right end of one array, so that every text's next token takes the same
slot of the cache; the padding on the left is never attended to, and positions count from each text's first token.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.core.model import Cache, empty_cache, forward_with_cache

counts_of_32_bits = partial(jax.threefry_partitionable, False)  # the other way to draw needs 64, which Metal lacks

WAYS, ROUNDS = 8, 10  # of the search for a threshold, which ends with 2**-30 of the logits' range at the latest
PARTS = 16  # of the vocabulary, counted in one expression: a CPU would write what a sum over it reads to memory first


class SamplingParams(NamedTuple):
    """How a token is chosen. Arrays or numbers: changing them compiles nothing anew."""

    temperature: Any  # 0: greedy
    top_k: Any = None  # keep the k most likely tokens; None: all, and the program has no search for them
    top_p: Any = None  # of these, keep the fewest that hold this share of the probability; None: all, likewise


def sampling_params(settings: Any) -> SamplingParams:
    """The temperature, top_k (0: all) and top_p (1: all) of what a person set, as arrays."""
    top_k, top_p = settings.top_k, settings.top_p
    return SamplingParams(
        np.float32(settings.temperature), np.int32(top_k) if top_k else None, np.float32(top_p) if top_p < 1 else None
    )


class DecodeState(NamedTuple):
    """Texts being written, between two tokens."""

    cache: Cache
    logits_BV: jax.Array  # for the next token of each text
    slot: jax.Array  # [] int32: the one that the next token takes
    first_B: jax.Array  # the slot of each text's first token
    done_B: jax.Array  # True once a text has ended
    keys_B: jax.Array  # one random key a text


def top_k_top_p_mask(
    logits_BV: jax.Array, top_k: jax.Array | None, top_p: jax.Array | None, unroll: bool = False
) -> jax.Array:
    """Which tokens may be drawn: the top_k largest logits, and of these the nucleus (Holtzman et al. 2020).

    The nucleus is the smallest set of most likely tokens whose probability, renormalised over the top_k, reaches
    top_p. Both cuts are thresholds on the logits: no sort, no cumulative sum.

    Args:
        logits_BV: float32; -inf is never drawn.
        top_k: [] integer, at least 1; None keeps all.
        top_p: [] float in (0, 1]; None keeps all.
        unroll: write the rounds of the search out.

    Returns:
        [B, V] bool; tokens that tie with the last one kept are kept.
    """
    kept = logits_BV > -jnp.inf
    if top_k is not None:
        kept &= logits_BV >= _threshold(logits_BV, None, top_k, unroll)
    if top_p is None:
        return kept
    share_BV = jnp.where(kept, jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)), 0)
    wanted_B1 = top_p * jnp.sum(share_BV, axis=-1, keepdims=True)
    return kept & (logits_BV >= _threshold(logits_BV, share_BV, wanted_B1, unroll))


def _threshold(logits_BV: jax.Array, weights_BV: jax.Array | None, wanted: jax.Array, unroll: bool) -> jax.Array:
    """[B, 1]: the largest number such that the weights (None: 1 each) of the logits from it on add up to `wanted`.

    In each round the interval in which it lies is cut into WAYS parts, until one logit is left in it (or several that
    hardly differ). Where all weights are too little: the smallest logit.
    """
    cuts_W = jnp.arange(1, WAYS) / WAYS
    padded_BV = jnp.pad(logits_BV, ((0, 0), (0, -logits_BV.shape[1] % PARTS)), constant_values=-jnp.inf)
    parts = [logits_BV] if unroll else jnp.split(padded_BV, PARTS, axis=1)

    def narrow(carry):
        left, low_B1, high_B1, from_low_B1, from_high_B1 = carry
        cut_BW = low_B1 + (high_B1 - low_B1) * cuts_W
        cut_BW1 = cut_BW[..., None]
        count_BW = jnp.sum(sum((part[:, None] >= cut_BW1).astype(jnp.int32) for part in parts), axis=-1)
        if weights_BV is None:
            enough_BW = count_BW >= wanted
        else:
            enough_BW = jnp.sum(jnp.where(logits_BV[:, None] >= cut_BW1, weights_BV[:, None], 0), axis=-1) >= wanted
        low_B1, high_B1, from_low_B1, from_high_B1 = (
            jnp.max(jnp.where(enough_BW, cut_BW, low_B1), axis=-1, keepdims=True),
            jnp.min(jnp.where(enough_BW, high_B1, cut_BW), axis=-1, keepdims=True),
            jnp.min(jnp.where(enough_BW, count_BW, from_low_B1), axis=-1, keepdims=True),
            jnp.max(jnp.where(enough_BW, from_high_B1, count_BW), axis=-1, keepdims=True),
        )
        return left - 1, low_B1, high_B1, from_low_B1, from_high_B1

    high_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    low_B1 = jnp.min(jnp.where(logits_BV > -jnp.inf, logits_BV, high_B1), axis=-1, keepdims=True)
    counts_B1 = (jnp.full(low_B1.shape, count, jnp.int32) for count in (logits_BV.shape[1], 0))
    start = (jnp.int32(ROUNDS), low_B1, high_B1, *counts_B1)
    if unroll:  # rounds beyond the last one needed choose the same logits
        carry = start
        for _ in range(ROUNDS):
            carry = narrow(carry)
        return carry[1]
    return jax.lax.while_loop(lambda c: (c[0] > 0) & jnp.any(c[3] - c[4] > 1), narrow, start)[1]


def sample_tokens(logits_BV: jax.Array, keys_B: jax.Array, choice: SamplingParams, unroll: bool = False) -> jax.Array:
    """A token for each text: greedy at temperature 0, else drawn from softmax(logits / temperature), cut to
    the top k and the nucleus.

    Args:
        logits_BV: float32.
        keys_B: one random key a text.
        choice: temperature, top_k, top_p.
        unroll: neither loop nor branch.

    Returns:
        [B] int32.
    """

    side = 4 * math.ceil(logits_BV.shape[1] ** 0.5 / 4)  # of a square with room for all tokens

    def draw_each() -> jax.Array:
        blank = ((0, 0), (0, side**2 - logits_BV.shape[1]))
        square_BV = jnp.pad(logits_BV, blank, constant_values=-jnp.inf)
        scaled_BV = (square_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / choice.temperature
        share_BV = jnp.where(top_k_top_p_mask(scaled_BV, choice.top_k, choice.top_p, unroll), jnp.exp(scaled_BV), 0)
        with counts_of_32_bits():
            return jax.vmap(_draw)(share_BV.reshape(-1, side, side), keys_B)

    if unroll:
        return jnp.where(choice.temperature > 0, draw_each(), _argmax(logits_BV))
    return jax.lax.cond(choice.temperature > 0, draw_each, lambda: _argmax(logits_BV))


def searches_unrolled(config: ModelConfig) -> bool:
    """Whether `sample_tokens` unrolls its searches: where no program may loop, and on an NVIDIA GPU, which would wait
    for the host after each round to hear whether it was the last."""
    return config.unrolled or jax.default_backend() == "gpu"


def _draw(share_RC: jax.Array, key: jax.Array) -> jax.Array:
    """[] int32: the place of a token, drawn with a probability in proportion to its share.

    First a row is drawn, then a token in it: that takes noise for two rows, not for the whole vocabulary.
    """
    for_row, for_column = jax.random.split(key)
    row = jax.random.categorical(for_row, jnp.log(jnp.sum(share_RC, axis=1)))
    # the row by a mask: by its index it were a batched gather, where there are several texts
    share_C = jnp.sum(jnp.where(jnp.arange(len(share_RC))[:, None] == row, share_RC, 0), axis=0)
    column = jax.random.categorical(for_column, jnp.log(share_C))
    return (row * share_RC.shape[1] + column).astype(jnp.int32)


def _argmax(logits_BV: jax.Array) -> jax.Array:
    """argmax, in two plain reductions: as one it takes ten times as long on a CPU."""
    best_BV = logits_BV == jnp.max(logits_BV, axis=-1, keepdims=True)
    ids_V, last = jnp.arange(logits_BV.shape[1]), logits_BV.shape[1] - 1
    return jnp.min(jnp.where(best_BV, ids_V, last), axis=-1).astype(jnp.int32)


@partial(jax.jit, static_argnames="count")
def sequence_keys(key: jax.Array, count: int) -> jax.Array:
    """A random key for each text, [count, 2] uint32, from a raw one (a typed key comes with a sharding, which a plugin
    may not know)."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))


@partial(jax.jit, static_argnames=("config", "new_slots"))
def prefill(
    config: ModelConfig, weights: Any, ids_BP: jax.Array, lengths_B: jax.Array, keys_B: jax.Array, new_slots: int
) -> DecodeState:
    """Reads the prompts in one pass.

    Args:
        config: the model's sizes.
        weights: its parameters, as `model.prepare_decode_params` gives them.
        ids_BP: prompts, each at the right end of its row; what stands left of them does not matter.
        lengths_B: tokens in each prompt, 0 to P; with none it is no text, and has ended.
        keys_B: one random key a text.
        new_slots: how many tokens `decode` may add in all.

    Returns:
        The texts, ready for `decode`.
    """
    B, P = ids_BP.shape
    slots_P = jnp.arange(P)
    first_B = P - lengths_B
    positions_BP = jnp.maximum(slots_P[None] - first_B[:, None], 0)
    slots_S = jnp.arange(P + new_slots)
    visible_BPS = (slots_S[None, None] <= slots_P[None, :, None]) & (slots_S[None, None] >= first_B[:, None, None])
    cache = empty_cache(config, B, P + new_slots)
    logits_BV, cache = forward_with_cache(config, weights, ids_BP, positions_BP, cache, jnp.int32(0), visible_BPS)
    return DecodeState(cache, logits_BV, jnp.int32(P), first_B, lengths_B == 0, keys_B)


@partial(jax.jit, static_argnames="config")
def decode_step(
    config: ModelConfig, weights: Any, texts: DecodeState, choice: SamplingParams, end_of_text: Any
) -> tuple[DecodeState, jax.Array]:
    """Writes one more token of each text.

    Returns:
        The texts, and [B] int32: the tokens, `end_of_text` for a text that has ended.
    """
    t, slots_S = texts, jnp.arange(texts.cache.keys_GSK[0].shape[1])
    positions_B = t.slot - t.first_B
    keys_B = jax.vmap(jax.random.fold_in)(t.keys_B, positions_B)
    token_B = sample_tokens(t.logits_BV, keys_B, choice, searches_unrolled(config))
    token_B = jnp.where(t.done_B, end_of_text, token_B)
    visible_B1S = ((slots_S[None] <= t.slot) & (slots_S[None] >= t.first_B[:, None]))[:, None]
    logits_BV, cache = forward_with_cache(
        config, weights, token_B[:, None], positions_B[:, None], t.cache, t.slot, visible_B1S
    )
    return DecodeState(cache, logits_BV, t.slot + 1, t.first_B, token_B == end_of_text, t.keys_B), token_B


def decode(
    config: ModelConfig, weights: Any, texts: DecodeState, choice: SamplingParams, end_of_text: Any, count: int
) -> tuple[DecodeState, jax.Array | np.ndarray]:
    """Writes up to `count` more tokens of each text, and stops early when all texts have ended.

    A text's tokens depend on its prompt, its key and the choice alone: not on the texts beside it, nor on how the
    writing is cut into calls. One program writes them all, or, where loops are unrolled, the host calls one a token.

    Returns:
        The texts (the argument is donated), and [B, count] int32: the tokens, `end_of_text` from each text's end on.
    """
    if not config.unrolled:
        return _decode_on_device(config, weights, texts, choice, end_of_text, count)
    tokens_BN = np.full((len(texts.done_B), count), end_of_text, np.int32)
    for i in range(count):
        if np.all(texts.done_B):
            break
        texts, tokens_BN[:, i] = decode_step(config, weights, texts, choice, end_of_text)
    return texts, tokens_BN


@partial(jax.jit, static_argnames=("config", "count"), donate_argnames=("texts",))
def _decode_on_device(config, weights, texts, choice, end_of_text, count):
    def body(carry):
        i, texts, tokens_BN = carry
        texts, token_B = decode_step(config, weights, texts, choice, end_of_text)
        return i + 1, texts, jax.lax.dynamic_update_slice(tokens_BN, token_B[:, None], (0, i))

    tokens_BN = jnp.full((texts.done_B.shape[0], count), end_of_text, jnp.int32)
    start = (jnp.int32(0), texts, tokens_BN)
    _, texts, tokens_BN = jax.lax.while_loop(lambda c: (c[0] < count) & ~jnp.all(c[1].done_B), body, start)
    return texts, tokens_BN
