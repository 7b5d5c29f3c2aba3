"""Sampling against sorting and exact probabilities, decoding against the forward pass without a cache."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import ops
from jaxlm.core.decoder import Decoder
from jaxlm.core.model import prepare_decode_params
from jaxlm.core.sampling import (
    NOT_FINITE,
    SamplingParams,
    decode,
    decode_step,
    prefill,
    sample_tokens,
    top_k_top_p_mask,
)

GREEDY = SamplingParams(0.0)
SAMPLED = SamplingParams(1.5)  # with the program of GREEDY
RESTRICTED = SamplingParams(1.5, 40, 0.95)
LENGTHS = np.array([1, 5, 12, 8])
NEW = 10
NEVER = np.int32(-1)  # no token is the end of a text
ROWS = 20_000
SLOW = pytest.mark.slow
TOP_KS, TOP_PS = (1, 2, 7, 49, 50, 51, 1000), (1e-9, 0.1, 0.5, 0.9, 0.999)

jitted_mask = jax.jit(top_k_top_p_mask, static_argnums=0)
jitted_sample = jax.jit(sample_tokens, static_argnums=0)


def mask_by_sorting(logits, top_k, top_p):
    """One row of `top_k_top_p_mask` by its definition. It includes ties with the least likely token."""
    ordered = np.sort(logits)[::-1]
    ordered = ordered[ordered >= ordered[min(top_k or len(logits), len(logits)) - 1]]
    cumulative = np.cumsum(np.exp(ordered - ordered[0]) / np.exp(ordered - ordered[0]).sum())
    last = len(ordered) - 1 if top_p is None else np.argmax(cumulative >= top_p)
    return logits >= ordered[last]


def exact_distribution(logits, params):
    scaled = np.float64(logits) / params.temperature
    weights = np.where(mask_by_sorting(scaled, params.top_k, params.top_p), np.exp(scaled), 0)
    return weights / weights.sum()


def chi_square(tokens, distribution):
    counts = np.bincount(tokens, minlength=len(distribution))
    if counts[distribution == 0].any():
        return np.inf
    expected = (len(tokens) * distribution)[distribution > 0]
    return np.sum((counts[distribution > 0] - expected) ** 2 / expected)


def sample(logits, params, seed=0, implementation="xla"):
    """A token for each of ROWS rows of 8 logits: always the same shape, so that few programs are compiled."""
    keys = jax.random.split(jax.random.key(seed), ROWS)
    return np.asarray(jitted_sample(ops.get(implementation), np.broadcast_to(logits, (ROWS, 8)), keys, params))


@pytest.fixture(scope="module")
def prompts():
    """Four prompts of LENGTHS at the right end of their rows, other ids to their left, and a key for each."""
    return np.random.default_rng(2).integers(0, 257, (4, 12)), jax.random.split(jax.random.key(5), 4)


@pytest.fixture(scope="module")
def model(small_model):
    """The settings and the weights for decoding."""
    config = dataclasses.replace(small_model[0], implementation="cpu")
    return config, prepare_decode_params(config, small_model[1])


@pytest.fixture(scope="module")
def forward(small_model):
    """Logits of whole sequences, without a cache."""
    config, params = small_model
    run = jax.jit(lambda ids: Decoder(config).apply({"params": params}, ids))
    return lambda ids: np.asarray(run(ids))


def continued(model, prompts, params, end_of_text=NEVER, lengths=LENGTHS):
    """The state after NEW tokens, and the tokens."""
    config, weights = model
    state = prefill(config, weights, prompts[0], lengths, prompts[1], NEW)
    state, tokens = decode(config, weights, state, params, end_of_text, NEW)
    return state, np.asarray(tokens)


def left_aligned(prompts, tokens):
    """Each prompt and its tokens at the left end of a row, then zeros."""
    rows = np.zeros((len(tokens), prompts[0].shape[1] + tokens.shape[1]), np.int32)
    for row, ids, length, new in zip(rows, prompts[0], LENGTHS, tokens, strict=False):
        row[: length + len(new)] = np.concatenate([ids[len(ids) - length :], new])
    return rows


@pytest.mark.parametrize(
    ("implementation", "vocabulary", "cuts"),
    [
        ("xla", 50, itertools.product(TOP_KS, TOP_PS)),
        ("xla", 50, [(top_k, None) for top_k in (*TOP_KS, None)]),
        pytest.param("xla", 50, [(None, top_p) for top_p in TOP_PS], marks=SLOW),
        pytest.param("xla", 1, itertools.product(TOP_KS, TOP_PS), marks=SLOW),
        pytest.param("apple", 50, itertools.product(TOP_KS, TOP_PS), marks=SLOW),
    ],
    ids=["both", "top_k", "top_p", "one token", "apple"],
)
def test_mask_equals_sorting(implementation, vocabulary, cuts):
    rng = np.random.default_rng(vocabulary)
    logits = np.float32(rng.normal(size=(40, vocabulary)) * rng.choice([0.1, 1, 10, 1000], (40, 1)))
    logits[::2] = np.round(logits[::2])  # ties
    for top_k, top_p in cuts:
        expected = [mask_by_sorting(row, top_k, top_p) for row in logits.astype(np.float64)]
        mask = jitted_mask(ops.get(implementation), logits, top_k, top_p)
        np.testing.assert_array_equal(mask, expected, err_msg=f"{top_k}, {top_p}")


def test_minus_infinity_is_never_sampled():
    logits = np.float32(np.random.default_rng(3).normal(size=(40, 50)))
    logits[np.random.default_rng(4).random(logits.shape) < 0.5] = -np.inf
    for top_k, top_p in ((3, None), (50, 0.7), (20, 0.9), (None, None)):
        expected = [mask_by_sorting(row, top_k, top_p) for row in logits.astype(np.float64)]
        mask = jitted_mask(ops.get("xla"), logits, top_k, top_p)
        np.testing.assert_array_equal(mask, expected & (logits > -np.inf))
    for params in (GREEDY, RESTRICTED, SAMPLED):
        tokens = sample(np.float32([0, -np.inf, 1, -np.inf, 2, 0, -np.inf, -1]), params)
        assert not np.isin(tokens, (1, 3, 6)).any()


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(0.0, 3, 0.5),
        SamplingParams(1e-38),
        SamplingParams(2.0, 1, 0.999),
        SamplingParams(2.0, 8, 1e-6),
        pytest.param(SamplingParams(2.0, 1), marks=SLOW),
        pytest.param(SamplingParams(2.0, None, 1e-6), marks=SLOW),
    ],
)
def test_limits_of_sampling_are_greedy(params):
    logits = np.random.default_rng(0).normal(size=(ROWS, 8)).astype(np.float32)
    tokens = sample(logits, params)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize(
    ("params", "others"),
    [
        (SamplingParams(1.0), [SamplingParams(0.9), SamplingParams(1.1), SamplingParams(1.0, 7)]),
        (SamplingParams(0.7), [SamplingParams(0.77), SamplingParams(1 / 0.7)]),
        pytest.param(
            SamplingParams(1.5, 5),
            [SamplingParams(1.5, 4), SamplingParams(1.5, 6), SamplingParams(1.35, 5)],
            marks=SLOW,
        ),
        pytest.param(
            SamplingParams(1.0, None, 0.8),
            [SamplingParams(1.0, None, 0.7), SamplingParams(1.0, None, 0.9), SamplingParams(1.0)],
            marks=SLOW,
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
def test_tokens_follow_the_exact_distribution_and_no_other(params, others):
    logits = np.array([0.5, 2.0, -3.0, 1.5, -0.5, 1.0, 0.0, -1.0], np.float32)
    tokens = sample(logits, params, seed=7)
    limit = 35  # a correct sampler exceeds it in one of 100,000 seeds: at most 7 degrees of freedom
    assert chi_square(tokens, exact_distribution(logits, params)) < limit
    for other in others:
        assert chi_square(tokens, exact_distribution(logits, other)) > limit, other


@pytest.mark.parametrize("implementation", ["xla", "apple"])
@pytest.mark.parametrize("params", [GREEDY, RESTRICTED])
def test_rows_without_a_finite_maximum_are_marked(implementation, params):
    logits = np.random.default_rng(1).normal(size=(ROWS, 8)).astype(np.float32)
    for start, value in enumerate((np.nan, np.inf, -np.inf), 1):
        logits[start::4] = value
    tokens = sample(logits, params, implementation=implementation)
    finite = np.arange(ROWS) % 4 == 0
    assert (tokens[~finite] == NOT_FINITE).all()
    assert ((tokens[finite] >= 0) & (tokens[finite] < 8)).all()


@pytest.mark.parametrize("temperature", [1e-38, 1e6])
def test_the_extreme_temperatures_are_exact(temperature):
    """The least is greedy, the largest draws from the top_k alike."""
    logits = np.array([0.5, 2.0, -3.0, 1.5, -0.5, 1.0, 0.0, -1.0], np.float32)
    expected = [0, 1, 0, 0, 0, 0, 0, 0] if temperature < 1 else [0, 1 / 3, 0, 1 / 3, 0, 1 / 3, 0, 0]
    assert chi_square(sample(logits, SamplingParams(temperature, 3, 1.0)), np.array(expected)) < 35


def test_apple_samples_without_loop_or_branch():
    logits, keys = np.zeros((2, 8), np.float32), jax.random.split(jax.random.key(0), 2)
    for implementation in ("xla", "apple"):
        device_ops = ops.get(implementation)
        jaxpr = str(jax.make_jaxpr(sample_tokens, static_argnums=0)(device_ops, logits, keys, RESTRICTED))
        assert ("while" in jaxpr, "cond" in jaxpr) == ((True, True) if implementation == "xla" else (False, False))


@SLOW
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_apple_samples_the_same_tokens(temperature):
    logits, params = np.random.default_rng(1).normal(size=(ROWS, 8)), SamplingParams(temperature, 5, 0.9)
    logits = logits.astype(np.float32)
    np.testing.assert_array_equal(sample(logits, params, implementation="apple"), sample(logits, params))


def test_successive_tokens_are_independent(model, prompts):
    """A model whose norm scale is 0 gives all 257 tokens the same probability at every position."""
    config, weights = model
    uniform = config, weights | {"norm": np.zeros_like(weights["norm"])}
    keys = [jax.random.split(jax.random.key(seed), 4) for seed in range(15)]
    tokens_KBN = np.array([continued(uniform, (prompts[0], k), SamplingParams(1.0))[1] for k in keys])
    assert chi_square(tokens_KBN.ravel(), np.full(257, 1 / 257)) < 256 + 5 * (2 * 256) ** 0.5
    for axis in range(3):
        assert np.mean(np.diff(tokens_KBN, axis=axis) == 0) < 3 / 257


def test_cached_logits_equal_the_forward_pass(model, prompts, forward):
    prompt_logits_BV = prefill(*model, prompts[0], LENGTHS, prompts[1], NEW).logits_BV
    state, tokens = continued(model, prompts, SAMPLED)
    expected = forward(left_aligned(prompts, tokens))
    for logits_BV, positions in ((prompt_logits_BV, LENGTHS - 1), (state.logits_BV, LENGTHS - 1 + NEW)):
        np.testing.assert_allclose(logits_BV, expected[range(4), positions], rtol=1e-4, atol=1e-4)


@SLOW
def test_single_steps_give_the_logits_at_every_position_and_the_tokens_of_one_call(model, prompts, forward):
    state = prefill(*model, prompts[0], LENGTHS, prompts[1], NEW)
    logits, tokens = [], []
    for _ in range(NEW):
        state, token_B = decode_step(*model, state, SAMPLED, NEVER)
        logits.append(state.logits_BV)
        tokens.append(token_B)
    tokens = np.stack(tokens, axis=1)
    expected = forward(left_aligned(prompts, tokens))
    for i, logits_BV in enumerate(logits):
        np.testing.assert_allclose(logits_BV, expected[range(4), LENGTHS + i], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(continued(model, prompts, SAMPLED)[1], tokens)


@pytest.mark.parametrize(
    ("shape", "steps"), [((1, 1), 0), pytest.param((4, 12), 3, marks=SLOW)], ids=["one row", "48 rows"]
)
def test_bf16_weights_give_the_logits_up_to_rounding(small_model, prompts, forward, shape, steps):
    """A matmul of one row, as when one sequence is decoded, has a form of its own on a CPU."""
    config = dataclasses.replace(small_model[0], implementation="cpu", precision="bf16_matmul")
    weights = prepare_decode_params(config, small_model[1])
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves((weights["head"], weights["blocks"][0]["down"])))
    B, P = shape
    lengths = np.minimum(LENGTHS[:B], P)
    state = prefill(config, weights, prompts[0][:B, -P:], lengths, prompts[1][:B], NEW)
    tokens = np.zeros((4, NEW), np.int32)
    for step in range(steps + 1):
        expected = forward(left_aligned(prompts, tokens))[range(B), lengths - 1 + step]
        error = np.linalg.norm(state.logits_BV - expected) / np.linalg.norm(expected)
        assert 1e-5 < error < 0.03
        if step < steps:
            state, tokens[:, step] = decode_step(config, weights, state, SAMPLED, NEVER)


def test_greedy_tokens_equal_those_without_a_cache(model, prompts, forward):
    _, tokens = continued(model, prompts, GREEDY)
    rows = left_aligned(prompts, np.zeros((4, NEW), np.int32))
    for i in range(NEW):
        rows[range(4), LENGTHS + i] = forward(rows)[range(4), LENGTHS - 1 + i].argmax(-1)
    np.testing.assert_array_equal(left_aligned(prompts, tokens), rows)
    assert len(np.unique(tokens)) > NEW  # not a repetition that a broken cache would give too


@pytest.mark.parametrize("params", [SAMPLED, pytest.param(RESTRICTED, marks=SLOW)])
def test_a_sequence_does_not_depend_on_the_others(model, prompts, params):
    ids, keys = prompts
    _, tokens = continued(model, prompts, params)
    order = np.array([2, 0, 3, 1])
    _, reordered = continued(model, (ids[order], keys[order]), params, lengths=LENGTHS[order])
    np.testing.assert_array_equal(reordered, tokens[order])
    other_ids, lengths = (ids + 1) % 257, np.array([12, 5, 3, 1])
    other_ids[1] = ids[1]
    _, beside_others = continued(model, (other_ids, keys), params, lengths=lengths)
    np.testing.assert_array_equal(beside_others[1], tokens[1])
    assert (beside_others[0] != tokens[0]).any()
    _, with_other_keys = continued(model, (ids, keys[order]), params)
    assert (with_other_keys != tokens).any(axis=1).all()


def test_a_sequence_ends_with_end_of_text_and_the_others_continue(model, prompts):
    _, endless = continued(model, prompts, GREEDY)
    end_of_text = endless[2, 3]
    state, tokens = continued(model, prompts, GREEDY, np.int32(end_of_text))
    ends = [list(row).index(end_of_text) if end_of_text in row else NEW for row in endless]
    assert ends[2] <= 3
    assert NEW in ends
    for expected, row, end in zip(endless, tokens, ends, strict=True):
        np.testing.assert_array_equal(row[:end], expected[:end])
        assert (row[end:] == end_of_text).all()
    np.testing.assert_array_equal(state.done_B, np.array(ends) < NEW)


def test_decoding_stops_once_all_sequences_have_ended(model, prompts):
    config, lengths = model[0], np.full(4, 12)
    same = np.tile(prompts[0][2], (4, 1)), prompts[1]
    _, endless = continued(model, same, GREEDY, lengths=lengths)
    end_of_text = np.int32(endless[0, 4])
    end = list(endless[0]).index(end_of_text)
    state, tokens = continued(model, same, GREEDY, end_of_text, lengths)
    assert state.slot == 12 + end + 1
    assert (tokens[:, end:] == end_of_text).all()
    state, tokens = decode(config, model[1], state, GREEDY, end_of_text, NEW)
    assert state.slot == 12 + end + 1
    assert (np.asarray(tokens) == end_of_text).all()
    # the host loop needs no weights, as it calls no program
    on_host = dataclasses.replace(config, implementation="apple")
    same_state, tokens = decode(on_host, None, state, GREEDY, end_of_text, NEW)
    assert same_state is state
    assert (tokens == end_of_text).all()


def test_a_row_without_tokens_counts_as_ended(model, prompts):
    state = prefill(*model, prompts[0], np.array([0, 5, 12, 8]), prompts[1], NEW)
    assert state.done_B.tolist() == [True, False, False, False]
