"""Sampling against sorting, exact probabilities, and the forward pass without a cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.model import Decoder, prepare_decode_params
from jaxlm.core.sampling import SamplingParams, decode, decode_step, prefill, sample_tokens, top_k_top_p_mask

GREEDY = SamplingParams(0.0)
VARIED = SamplingParams(1.5, 40, 0.95)
LENGTHS = np.array([1, 5, 12, 8])
NEW = 10
NEVER = np.int32(-1)  # no token is the end of a text

quick_likeliest, quick_choose = jax.jit(top_k_top_p_mask, static_argnames="unroll"), jax.jit(sample_tokens)


def kept_by_sorting(logits, top_k, top_p):
    """One row of `top_k_top_p_mask` as its definition has it; ties with the last token kept are kept."""
    ordered = np.sort(logits)[::-1]
    ordered = ordered[ordered >= ordered[min(top_k or len(logits), len(logits)) - 1]]
    share = np.cumsum(np.exp(ordered - ordered[0]) / np.exp(ordered - ordered[0]).sum())
    last = len(ordered) - 1 if top_p is None else np.argmax(share >= top_p)
    return logits >= ordered[last]


def exact_distribution(logits, choice):
    scaled = np.float64(logits) / choice.temperature
    weights = np.where(kept_by_sorting(scaled, choice.top_k, choice.top_p), np.exp(scaled), 0)
    return weights / weights.sum()


def chi_square(tokens, distribution):
    counts = np.bincount(tokens, minlength=len(distribution))
    if counts[distribution == 0].any():
        return np.inf
    expected = (len(tokens) * distribution)[distribution > 0]
    return np.sum((counts[distribution > 0] - expected) ** 2 / expected)


@pytest.fixture(scope="module")
def prompts():
    """Four of different lengths at the right end of their rows, something left of them, and a key for each."""
    return np.random.default_rng(2).integers(0, 257, (4, 12)), jax.random.split(jax.random.key(5), 4)


@pytest.fixture(scope="module")
def forward(small_model):
    """Logits of whole texts, without a cache."""
    config, params = small_model
    run = jax.jit(lambda ids: Decoder(config).apply({"params": params}, ids))
    return lambda ids: np.asarray(run(ids))


def continued(small_model, prompts, choice, end_of_text=NEVER, lengths=LENGTHS):
    config, params = small_model
    ids, keys = prompts
    weights = prepare_decode_params(config, params)
    texts, tokens = decode(config, weights, prefill(config, weights, ids, lengths, keys, NEW), choice, end_of_text, NEW)
    return texts, np.asarray(tokens)


def whole_texts(prompts, tokens):
    """Prompts and tokens from the left end of each row on, zeros behind."""
    rows = np.zeros((len(tokens), prompts[0].shape[1] + tokens.shape[1]), np.int32)
    for row, ids, length, new in zip(rows, prompts[0], LENGTHS, tokens, strict=False):
        row[: length + len(new)] = np.concatenate([ids[len(ids) - length :], new])
    return rows


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("vocabulary", [1, 50])
@pytest.mark.parametrize("unroll", [False, True])
def test_likeliest_equals_sorting(vocabulary, ties, unroll):
    rng = np.random.default_rng(vocabulary)
    logits = np.float32(rng.normal(size=(100, vocabulary)) * rng.choice([0.1, 1, 10, 1000], (100, 1)))
    logits = np.round(logits) if ties else logits
    for top_k in (None, 1, 2, 7, 49, 50, 51, 1000):
        for top_p in (1e-9, 0.1, 0.5, 0.9, 0.999, None):
            expected = [kept_by_sorting(row, top_k, top_p) for row in logits.astype(np.float64)]
            found = quick_likeliest(logits, top_k, top_p, unroll=unroll)
            np.testing.assert_array_equal(found, expected, err_msg=f"{top_k}, {top_p}")


def test_minus_infinity_is_never_kept_by_a_cut_nor_drawn():
    logits = np.float32(np.random.default_rng(3).normal(size=(60, 31)))
    logits[np.random.default_rng(4).random(logits.shape) < 0.5] = -np.inf
    for top_k, top_p in ((3, None), (None, 0.7), (20, 0.9)):
        expected = [kept_by_sorting(row, top_k, top_p) for row in logits.astype(np.float64)]
        kept = np.asarray(quick_likeliest(logits, top_k, top_p))
        np.testing.assert_array_equal(kept & (logits > -np.inf), expected & (logits > -np.inf))
    for choice in (GREEDY, VARIED, SamplingParams(1.0)):
        tokens = quick_choose(logits, jax.random.split(jax.random.key(0), 60), choice)
        assert (logits[range(60), tokens] > -np.inf).all()


@pytest.mark.parametrize(
    "choice",
    [
        GREEDY,
        SamplingParams(0.0, 3, 0.5),
        SamplingParams(1e-38),
        SamplingParams(2.0, 1),
        SamplingParams(2.0, None, 1e-6),
    ],
)
def test_no_temperature_or_one_token_or_a_tiny_nucleus_is_the_likeliest_token(choice):
    logits = np.random.default_rng(0).normal(size=(200, 31)).astype(np.float32)
    tokens = quick_choose(logits, jax.random.split(jax.random.key(0), 200), choice)
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize(
    ("choice", "wrong"),
    [
        (SamplingParams(1.0), [SamplingParams(0.9), SamplingParams(1.1), SamplingParams(1.0, 7)]),
        (SamplingParams(0.7), [SamplingParams(0.77), SamplingParams(1 / 0.7)]),
        (SamplingParams(1.5, 5), [SamplingParams(1.5, 4), SamplingParams(1.5, 6), SamplingParams(1.35, 5)]),
        (
            SamplingParams(1.0, None, 0.8),
            [SamplingParams(1.0, None, 0.7), SamplingParams(1.0, None, 0.9), SamplingParams(1.0)],
        ),
        (
            SamplingParams(2.0, 6, 0.8),
            [
                SamplingParams(2.0, None, 0.8),
                SamplingParams(2.0, 6, 0.65),
                SamplingParams(1.0, 6, 0.8),
                SamplingParams(2.0, 6),
            ],
        ),
    ],
)
def test_draws_follow_the_exact_distribution_and_no_other(choice, wrong):
    logits = np.array([0.5, 2.0, -3.0, 1.5, -0.5, 1.0, 0.0, -1.0], np.float32)
    count = 20_000
    tokens = quick_choose(np.tile(logits, (count, 1)), jax.random.split(jax.random.key(7), count), choice)
    limit = 35  # with up to 7 degrees of freedom a right sampler exceeds it once in 100,000 seeds
    assert chi_square(tokens, exact_distribution(logits, choice)) < limit
    for other in wrong:
        assert chi_square(tokens, exact_distribution(logits, other)) > limit, other


def test_successive_tokens_are_drawn_afresh(small_model, prompts):
    """A model whose norm scale is 0 finds all 257 tokens equally likely at every position."""
    config, params = small_model
    blank = config, params | {"norm": jnp.zeros_like(params["norm"])}
    keys = [jax.random.split(jax.random.key(seed), 4) for seed in range(50)]
    tokens_KBN = np.array([continued(blank, (prompts[0], k), SamplingParams(1.0))[1] for k in keys])
    assert chi_square(tokens_KBN.ravel(), np.full(257, 1 / 257)) < 256 + 5 * (2 * 256) ** 0.5
    for axis in range(3):
        assert np.mean(np.diff(tokens_KBN, axis=axis) == 0) < 3 / 257


def test_cached_logits_equal_the_forward_pass_at_every_position(small_model, prompts, forward):
    config, params = small_model
    weights = prepare_decode_params(config, params)
    texts = prefill(config, weights, prompts[0], LENGTHS, prompts[1], NEW)
    logits, tokens = [np.asarray(texts.logits_BV)], []
    for _ in range(NEW):
        texts, token = decode(config, weights, texts, VARIED, NEVER, 1)
        logits.append(np.asarray(texts.logits_BV))
        tokens.append(np.asarray(token))
    tokens = np.concatenate(tokens, axis=1)
    expected = forward(whole_texts(prompts, tokens))
    for i, found in enumerate(logits):
        np.testing.assert_allclose(found, expected[range(4), LENGTHS - 1 + i], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(continued(small_model, prompts, VARIED)[1], tokens)


def test_weights_of_16_bits_give_the_logits_to_their_rounding_for_one_text_and_for_several(
    small_model, prompts, forward
):
    config, params = dataclasses.replace(small_model[0], precision="bf16_matmul"), small_model[1]
    weights = prepare_decode_params(config, params)
    assert weights["head"].dtype == weights["blocks"][0]["down"].dtype == jnp.bfloat16
    for count in (4, 1):
        ids, keys, lengths = prompts[0][:count], prompts[1][:count], LENGTHS[:count]
        texts, tokens = decode(config, weights, prefill(config, weights, ids, lengths, keys, NEW), VARIED, NEVER, NEW)
        expected = forward(whole_texts(prompts, np.asarray(tokens)))[range(count), lengths + NEW - 1]
        error = np.linalg.norm(texts.logits_BV - expected) / np.linalg.norm(expected)
        assert 1e-5 < error < 0.03


def test_a_token_at_a_time_is_the_same_text(small_model, prompts):
    config, params = small_model
    weights = prepare_decode_params(config, params)
    one_more = jax.jit(decode_step, static_argnums=0)
    texts, tokens = prefill(config, weights, prompts[0], LENGTHS, prompts[1], NEW), []
    for _ in range(NEW):
        texts, token_B = one_more(config, weights, texts, VARIED, NEVER)
        tokens.append(np.asarray(token_B))
    np.testing.assert_array_equal(np.stack(tokens, axis=1), continued(small_model, prompts, VARIED)[1])


def test_greedy_texts_equal_those_of_reading_everything_anew_for_each_token(small_model, prompts, forward):
    _, tokens = continued(small_model, prompts, GREEDY)
    texts = whole_texts(prompts, np.zeros((4, NEW), np.int32))
    for i in range(NEW):
        texts[range(4), LENGTHS + i] = forward(texts)[range(4), LENGTHS - 1 + i].argmax(-1)
    np.testing.assert_array_equal(whole_texts(prompts, tokens), texts)
    assert len(np.unique(tokens)) > NEW  # no text that a broken cache would write as well


def test_a_text_does_not_depend_on_the_texts_beside_it(small_model, prompts):
    ids, keys = prompts
    _, tokens = continued(small_model, prompts, VARIED)
    order = np.array([2, 0, 3, 1])
    _, moved = continued(small_model, (ids[order], keys[order]), VARIED, lengths=LENGTHS[order])
    np.testing.assert_array_equal(moved, tokens[order])
    others, lengths = (ids + 1) % 257, np.array([12, 5, 3, 1])
    others[1] = ids[1]
    _, beside_others = continued(small_model, (others, keys), VARIED, lengths=lengths)
    np.testing.assert_array_equal(beside_others[1], tokens[1])
    assert (beside_others[0] != tokens[0]).any()
    _, of_other_keys = continued(small_model, (ids, keys[order]), VARIED)
    assert (of_other_keys != tokens).any(axis=1).all()


def test_a_text_ends_with_end_of_text_and_the_others_go_on(small_model, prompts):
    _, free = continued(small_model, prompts, GREEDY)
    end_of_text = free[2, 3]
    texts, tokens = continued(small_model, prompts, GREEDY, np.int32(end_of_text))
    ends = [list(row).index(end_of_text) if end_of_text in row else NEW for row in free]
    assert ends[2] <= 3
    assert NEW in ends
    for row, found, end in zip(free, tokens, ends, strict=True):
        np.testing.assert_array_equal(found[:end], row[:end])
        assert (found[end:] == end_of_text).all()
    np.testing.assert_array_equal(texts.done_B, np.array(ends) < NEW)


def test_writing_stops_once_all_texts_have_ended(small_model, prompts):
    config, params = small_model
    same = np.tile(prompts[0][2], (4, 1)), prompts[1]
    _, free = continued(small_model, same, GREEDY, lengths=np.full(4, 12))
    end = list(free[0]).index(free[0, 4])
    texts, tokens = continued(small_model, same, GREEDY, np.int32(free[0, end]), lengths=np.full(4, 12))
    assert texts.slot == 12 + end + 1
    assert (tokens[:, end:] == free[0, end]).all()
    texts, tokens = decode(config, prepare_decode_params(config, params), texts, GREEDY, np.int32(free[0, end]), NEW)
    assert texts.slot == 12 + end + 1
    assert (np.asarray(tokens) == free[0, end]).all()
