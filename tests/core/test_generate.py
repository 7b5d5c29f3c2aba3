"""Generation: neither chunks nor the other sequences of a batch change a token, and the window slides.

The context has 24 tokens, so the windows of SHORT slide after 21 new tokens and after 12 more.
"""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxlm.core import generate as generate_module
from jaxlm.core import sampling
from jaxlm.core.decoder import Decoder
from jaxlm.core.generate import generate, up_to_end, window_start
from jaxlm.core.model import prepare_decode_params
from jaxlm.core.sampling import SamplingParams

SAMPLED = SamplingParams(1.2)
GREEDY = SamplingParams(0.0)
SHORT, LONG = [7, 8, 9], list(range(30, 42))
TOKENS = 40
NEVER = -1  # no token is the end of a text


def chunks_of(model, prompts, *, params=SAMPLED, key=0, tokens=TOKENS, end_of_text=NEVER, chunk=None, indices=None):
    weights = prepare_decode_params(*model)
    return list(generate(model[0], weights, prompts, params, jax.random.key(key), tokens, end_of_text, chunk, indices))


@pytest.fixture(scope="module")
def padded_model(small_model):
    """`small_model` as on a GPU, where batches are padded to eight rows."""
    return replace(small_model[0], implementation="cuda"), small_model[1]


@pytest.fixture(scope="module")
def host_model(small_model):
    """`small_model` as on an Apple GPU, where the host calls one program a token."""
    return replace(small_model[0], implementation="apple"), small_model[1]


@pytest.fixture(scope="module")
def both(host_model):
    """The tokens after SHORT and LONG."""
    [tokens] = chunks_of(host_model, [SHORT, LONG])
    return tokens


@pytest.mark.parametrize("params", [pytest.param(SAMPLED, marks=pytest.mark.slow), GREEDY], ids=["sampled", "greedy"])
def test_neither_chunks_nor_padding_rows_nor_the_host_loop_change_a_token(padded_model, host_model, params):
    chunks = chunks_of(padded_model, [SHORT, LONG], params=params, chunk=3)
    assert {chunk.shape for chunk in chunks[:-1]} == {(2, 3)}
    [tokens] = chunks_of(host_model, [SHORT, LONG], params=params)
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), tokens)
    end_of_text = int(tokens[0, 3])
    chunks = chunks_of(padded_model, [SHORT, SHORT], params=params, end_of_text=end_of_text, chunk=3)
    [tokens] = chunks_of(host_model, [SHORT, SHORT], params=params, end_of_text=end_of_text)
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), tokens[:, : 3 * len(chunks)])
    assert (tokens[:, 3 * len(chunks) :] == end_of_text).all()


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 5, None])
def test_any_chunk_gives_the_same_tokens(small_model, both, chunk):
    """Without padding rows, on the device."""
    chunks = chunks_of(small_model, [SHORT, LONG], chunk=chunk)
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), both)


def test_each_sequence_has_its_own_random_numbers(host_model, both):
    assert (chunks_of(host_model, [SHORT, LONG], key=1)[0] != both).any(axis=1).all()
    [twins] = chunks_of(host_model, [SHORT, SHORT])
    np.testing.assert_array_equal(twins[0], both[0])
    assert (twins[1] != twins[0]).any()


def test_a_prompt_alone_gives_the_same_tokens(padded_model, both):
    chunks = chunks_of(padded_model, [SHORT], chunk=3)
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), both[:1])


@pytest.mark.slow
def test_a_longer_prompt_in_the_batch_changes_no_token(padded_model, both):
    """With it the prompts are padded to 32 tokens instead of 16, and its window slides after one token."""
    tokens = np.concatenate(chunks_of(padded_model, [SHORT, [7] * 23], chunk=3), axis=1)
    np.testing.assert_array_equal(tokens[0], both[0])
    assert tokens.shape == (2, TOKENS)


def test_padding_rows_delay_no_end(padded_model, both, monkeypatch):
    slots = []

    def decode(*args):
        state, tokens_BN = sampling.decode(*args)
        slots.append(int(state.slot))
        return state, tokens_BN

    monkeypatch.setattr(generate_module, "decode", decode)
    chunks = chunks_of(padded_model, [SHORT], end_of_text=int(both[0, 0]), chunk=3)
    assert [chunk.shape for chunk in chunks] == [(1, 1)]
    assert slots == [generate_module.PROMPT_BUCKET + 1]  # one token, not the whole chunk


def predictions(model, prompt, new):
    """What the model predicts, without a cache, at each new token: its logits, [N, V], and those of the token, [N].

    Every prediction reads its whole window from position 0 on.
    """
    config, params = model
    windows, rows, ends = list(prompt), [], []
    for token in new:
        if len(windows) == config.context:
            windows = windows[-(config.context // 2) :]
        rows.append(windows + [0] * (config.context - len(windows)))
        ends.append(len(windows) - 1)
        windows.append(int(token))
    logits = np.asarray(jax.jit(Decoder(config).apply)({"params": params}, np.array(rows)))[range(len(new)), ends]
    return logits, logits[range(len(new)), new]


@pytest.mark.parametrize(
    ("name", "changes", "tolerance"),
    [
        ("small_model", {"implementation": "cuda"}, 0),
        pytest.param("small_shared_model", {}, 0, marks=pytest.mark.slow),
        pytest.param("small_qk_norm_model", {}, 0, marks=pytest.mark.slow),
        pytest.param("small_model", {"context": 23, "implementation": "apple"}, 0, marks=pytest.mark.slow),
        pytest.param("small_model", {"precision": "bf16"}, 0.05, marks=pytest.mark.slow),
        pytest.param("small_qk_norm_model", {"precision": "bf16_matmul"}, 0.05, marks=pytest.mark.slow),
    ],
)
def test_greedy_tokens_are_those_without_a_cache_also_where_the_window_slides(name, changes, tolerance, request):
    """In float32 they are the same tokens. In bfloat16 two logits may be closer than the rounding, relative to all."""
    config, params = request.getfixturevalue(name)
    model, prompts = (replace(config, **changes), params), [SHORT, [7] * 16, LONG]
    tokens = np.concatenate(chunks_of(model, prompts, params=GREEDY, chunk=3), axis=1)
    assert tokens.shape == (3, TOKENS)
    for prompt, row in zip(prompts, tokens, strict=True):
        logits_NV, chosen_N = predictions(model, prompt, row)
        assert (logits_NV.max(-1) - chosen_N <= tolerance * np.abs(logits_NV).max()).all()
    assert len(np.unique(tokens[:, 21:])) > 3  # no repetition, which a wrong window would give too


def test_a_window_starts_where_the_slides_leave_it():
    for context in (2, 3, 24):
        window = 0
        for length in range(1, 5 * context):
            window = window + 1 if window + 1 < context else context // 2
            assert window_start(length, context) == length - window


def test_every_window_has_its_own_random_numbers(padded_model):
    """A model whose norm scale is 0 gives all tokens the same probability, so they depend on the numbers alone."""
    config, params = padded_model
    uniform = config, params | {"norm": np.zeros_like(params["norm"])}
    tokens = np.concatenate(chunks_of(uniform, [[index] * 12 for index in range(8)], chunk=3), axis=1)
    windows = tokens[:, :36].reshape(8, 3, 12)
    for first, second in ((0, 1), (1, 2), (0, 2)):
        assert np.mean(windows[:, first] == windows[:, second]) < 5 / 257


@pytest.mark.parametrize("chunk", [None, 4])
def test_prompts_of_one_bucket_share_a_program_also_where_the_context_ends(small_model, chunk, monkeypatch):
    """`prefill` and `decode` get the same shapes and static arguments."""
    calls = []

    def prefill(config, weights, ids_BP, lengths_B, keys_B, new_slots):
        calls.append((ids_BP.shape, new_slots))

    def decode(config, weights, state, params, end_of_text, count):
        calls.append(count)
        return state, np.zeros((1, count), np.int32)

    monkeypatch.setattr(generate_module, "prefill", prefill)
    monkeypatch.setattr(generate_module, "decode", decode)
    programs, context = [], small_model[0].context
    for length in (3, 12, 17, context - 1):
        calls.clear()
        generated = chunks_of(small_model, [[7] * length], tokens=2 * context, chunk=chunk)
        assert sum(tokens.shape[1] for tokens in generated) == 2 * context
        programs.append(set(calls))
        assert len(programs[-1]) == (2 if length <= 16 else 3)  # `prefill` of the prompt and of 12 tokens, `decode`
    assert programs[0] == programs[1] != programs[2] == programs[3]


def test_chunks_stop_once_all_sequences_have_ended(host_model, padded_model):
    [endless] = chunks_of(host_model, [SHORT, SHORT], params=GREEDY)
    end_of_text = int(endless[0, 4])
    end = endless[0].tolist().index(end_of_text)
    chunks = chunks_of(padded_model, [SHORT, SHORT], params=GREEDY, end_of_text=end_of_text, chunk=3)
    assert len(chunks) == end // 3 + 1 < 4
    for tokens in np.concatenate(chunks, axis=1):
        np.testing.assert_array_equal(up_to_end(tokens, end_of_text), endless[0, :end])


def test_chunks_continue_while_one_sequence_has_not_ended(padded_model, both):
    end = next(i for i, token in enumerate(both[0]) if token not in both[1])
    end_of_text = int(both[0, end])
    chunks = chunks_of(padded_model, [SHORT, LONG], end_of_text=end_of_text, chunk=3)
    assert sum(chunk.shape[1] for chunk in chunks) == TOKENS
    ended, whole = np.concatenate(chunks, axis=1)
    np.testing.assert_array_equal(up_to_end(whole, end_of_text), both[1])
    np.testing.assert_array_equal(up_to_end(ended, end_of_text), both[0, :end])
    assert (ended[end:] == end_of_text).all()


def test_indices_select_the_random_numbers(host_model):
    [tokens] = chunks_of(host_model, [SHORT] * 3)
    [selected] = chunks_of(host_model, [SHORT] * 2, indices=[2, 1])
    np.testing.assert_array_equal(selected, tokens[[2, 1]])


@pytest.mark.parametrize("name", ["padded_model", "host_model"])
def test_logits_that_are_not_finite_end_a_sequence_and_are_named(name, request):
    """The weights of one token are NaN, so that only the sequence that holds it is lost."""
    config, params = request.getfixturevalue(name)
    damaged = params["embedding"].at[LONG[0]].set(np.nan)
    model = replace(config, tied=False), params | {"embedding": damaged, "head": params["embedding"]}
    [tokens] = chunks_of(model, [SHORT, LONG], params=GREEDY, end_of_text=0)
    assert tokens[1].tolist() == [-1] + [0] * (tokens.shape[1] - 1)
    assert (tokens[0] >= 0).all()
    up_to_end(tokens[0], 0)
    with pytest.raises(FloatingPointError):
        up_to_end(tokens[1], 0)


def test_up_to_end_cuts_at_the_first_end_of_text():
    ids = np.array([4, 5, 0, 6, 0])
    assert up_to_end(ids, 0).tolist() == [4, 5]
    assert up_to_end(ids, 4).tolist() == []
    assert up_to_end(ids, 9).tolist() == [4, 5, 0, 6, 0]
