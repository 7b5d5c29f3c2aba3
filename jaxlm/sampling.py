"""Logits to tokens, and the jitted loop that writes texts with a cache of keys and values.

Prompts of different lengths stand at the right end of one array, so that every text's next token takes the same
slot of the cache; the padding on the left is never attended to, and positions count from each text's first token.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.model import Cache, Decoder, empty_cache


class Choice(NamedTuple):
    """How a token is chosen. Arrays or numbers: changing them compiles nothing anew."""

    temperature: Any  # 0: the likeliest token
    top_k: Any  # keep the k likeliest tokens; 0: all
    top_p: Any  # of these, keep the fewest that hold this share of the probability


class Texts(NamedTuple):
    """Texts being written, between two tokens."""

    cache: Cache
    logits_BV: jax.Array  # for the next token of each text
    slot: jax.Array  # [] int32: the one that the next token takes
    first_B: jax.Array  # the slot of each text's first token
    done_B: jax.Array  # True once a text has ended
    keys_B: jax.Array  # one random key a text


def likeliest(logits_BV: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Which tokens may be drawn: the top_k largest logits, and of these the nucleus (Holtzman et al. 2020).

    The nucleus is the smallest set of likeliest tokens whose probability, renormalised over the top_k, reaches
    top_p. Both cuts are thresholds on the logits, found by bisection: no sort, no cumulative sum.

    Args:
        logits_BV: float32.
        top_k: [] integer, 0 keeps all.
        top_p: [] float in (0, 1], 1 keeps all.

    Returns:
        [B, V] bool; tokens that tie with the last one kept are kept.
    """

    def cut(enough: Callable[[jax.Array], jax.Array], wanted: jax.Array) -> jax.Array:
        def halve(_, bounds):
            low_B1, high_B1 = bounds
            middle_B1 = (low_B1 + high_B1) / 2
            good_B1 = enough(logits_BV >= middle_B1)
            return jnp.where(good_B1, middle_B1, low_B1), jnp.where(good_B1, high_B1, middle_B1)

        bounds = jnp.min(logits_BV, axis=-1, keepdims=True), jnp.max(logits_BV, axis=-1, keepdims=True) + 1
        low_B1, _ = jax.lax.fori_loop(0, jnp.where(wanted, 40, 0), halve, bounds)
        return logits_BV >= low_B1

    in_top_k = cut(lambda kept_BV: jnp.sum(kept_BV, axis=-1, keepdims=True) >= top_k, top_k > 0)
    probability_BV = jax.nn.softmax(jnp.where(in_top_k, logits_BV, -jnp.inf), axis=-1)
    in_top_p = cut(
        lambda kept_BV: jnp.sum(jnp.where(kept_BV, probability_BV, 0), axis=-1, keepdims=True) >= top_p, top_p < 1
    )
    return in_top_k & in_top_p


def choose(logits_BV: jax.Array, keys_B: jax.Array, choice: Choice) -> jax.Array:
    """Draws a token for each text: argmax of logits / temperature plus Gumbel noise, over the likeliest.

    Args:
        logits_BV: float32.
        keys_B: one random key a text.
        choice: temperature, top_k, top_p.

    Returns:
        [B] int32.
    """
    temperature = jnp.asarray(choice.temperature, jnp.float32)
    kept_BV = likeliest(logits_BV / jnp.maximum(temperature, 1e-6), jnp.asarray(choice.top_k), choice.top_p)
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(keys_B)
    scores_BV = jnp.where(kept_BV, logits_BV + temperature * noise_BV, -jnp.inf)
    return jnp.argmax(scores_BV, axis=-1).astype(jnp.int32)


@partial(jax.jit, static_argnames=("config", "new_slots"))
def read(
    config: ModelConfig, params: Any, ids_BP: jax.Array, lengths_B: jax.Array, keys_B: jax.Array, new_slots: int
) -> Texts:
    """Reads the prompts in one pass.

    Args:
        config: the model's sizes.
        params: its parameters.
        ids_BP: prompts, each at the right end of its row; what stands left of them does not matter.
        lengths_B: tokens in each prompt, 1 to P.
        keys_B: one random key a text.
        new_slots: how many tokens `write` may add in all.

    Returns:
        The texts, ready for `write`.
    """
    B, P = ids_BP.shape
    slots_P = jnp.arange(P)
    first_B = P - lengths_B
    positions_BP = jnp.maximum(slots_P[None] - first_B[:, None], 0)
    slots_S = jnp.arange(P + new_slots)
    visible_BPS = (slots_S[None, None] <= slots_P[None, :, None]) & (slots_S[None, None] >= first_B[:, None, None])
    read_prompts: Any = Decoder(config).apply(
        {"params": params},
        ids_BP,
        positions_BP,
        empty_cache(config, B, P + new_slots),
        jnp.int32(0),
        visible_BPS,
        method="extend",
    )
    logits_BV, cache = read_prompts
    return Texts(cache, logits_BV, jnp.int32(P), first_B, jnp.zeros(B, bool), keys_B)


@partial(jax.jit, static_argnames=("config", "count"), donate_argnames=("texts",))
def write(
    config: ModelConfig, params: Any, texts: Texts, choice: Choice, end_of_text: jax.Array, count: int
) -> tuple[Texts, jax.Array]:
    """Writes up to `count` more tokens of each text, on the device, and stops early when all texts have ended.

    A text's tokens depend on its prompt, its key and the choice alone: not on the texts beside it, nor on how the
    writing is cut into calls.

    Returns:
        The texts (the argument is donated), and [B, count] int32: the tokens, `end_of_text` from each text's end on.
    """
    slots_S = jnp.arange(texts.cache.keys_BSHK[0].shape[1])

    def body(carry):
        i, t, tokens_BN = carry
        positions_B = t.slot - t.first_B
        token_B = choose(t.logits_BV, jax.vmap(jax.random.fold_in)(t.keys_B, positions_B), choice)
        token_B = jnp.where(t.done_B, end_of_text, token_B)
        visible_B1S = ((slots_S[None] <= t.slot) & (slots_S[None] >= t.first_B[:, None]))[:, None]
        logits_BV, cache = Decoder(config).apply(
            {"params": params}, token_B[:, None], positions_B[:, None], t.cache, t.slot, visible_B1S, method="extend"
        )
        done_B = token_B == end_of_text
        tokens_BN = jax.lax.dynamic_update_slice(tokens_BN, token_B[:, None], (0, i))
        return i + 1, Texts(cache, logits_BV, t.slot + 1, t.first_B, done_B, t.keys_B), tokens_BN

    tokens_BN = jnp.full((texts.done_B.shape[0], count), end_of_text, jnp.int32)
    start = (jnp.int32(0), texts, tokens_BN)
    _, texts, tokens_BN = jax.lax.while_loop(lambda c: (c[0] < count) & ~jnp.all(c[1].done_B), body, start)
    return texts, tokens_BN
