"""Generation: neither chunks nor the other sequences of a batch change a token."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxlm.core import generate as generate_module
from jaxlm.core import sampling
from jaxlm.core.generate import generate, up_to_end
from jaxlm.core.model import Decoder, prepare_decode_params
from jaxlm.core.sampling import SamplingParams

SAMPLED = SamplingParams(1.2)
GREEDY = SamplingParams(0.0)
SHORT, LONG = [7, 8, 9], list(range(30, 42))
NEVER = -1  # no token is the end of a text


def chunks_of(model, prompts, *, params=SAMPLED, key=0, tokens=100, end_of_text=NEVER, chunk=None, indices=None):
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
    """The tokens after SHORT and LONG up to the end of the context: 21 and 12, then NEVER."""
    [tokens] = chunks_of(host_model, [SHORT, LONG])
    return tokens


@pytest.mark.parametrize("params", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
def test_neither_chunks_nor_padding_rows_nor_the_host_loop_change_a_token(padded_model, host_model, params):
    chunks = chunks_of(padded_model, [SHORT, LONG], params=params, chunk=3)
    assert [chunk.shape for chunk in chunks] == [(2, 3)] * 7
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
    """With it the prompts are padded to 32 tokens instead of 16, and it fills the context with one token."""
    tokens = np.concatenate(chunks_of(padded_model, [SHORT, [7] * 23], chunk=3), axis=1)
    np.testing.assert_array_equal(tokens[0], both[0])
    assert tokens[1, 0] != NEVER
    assert (tokens[1, 1:] == NEVER).all()


def test_padding_rows_delay_no_end(padded_model, both, monkeypatch):
    slots = []

    def decode(*args):
        state, tokens_BN = sampling.decode(*args)
        slots.append(int(state.slot))
        return state, tokens_BN

    monkeypatch.setattr(generate_module, "decode", decode)
    chunks = chunks_of(padded_model, [SHORT], end_of_text=int(both[0, 0]), chunk=3)
    assert [chunk.shape for chunk in chunks] == [(1, 3)]
    assert slots == [generate_module.PROMPT_BUCKET + 1]  # one token, not the whole chunk


@pytest.mark.parametrize(
    "name",
    [
        "padded_model",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("small_qk_norm_model", "small_shared_model")),
    ],
)
def test_greedy_tokens_fill_the_context(name, request):
    model = config, params = request.getfixturevalue(name)
    forward = jax.jit(Decoder(config).apply)
    prompts = [list(range(30, 44)), SHORT]
    tokens = np.concatenate(chunks_of(model, prompts, params=GREEDY, chunk=3), axis=1)
    assert tokens.shape == (2, config.context - len(SHORT))
    assert (tokens[0, config.context - 14 :] == NEVER).all()
    ids = np.array([(prompt + row)[: config.context] for prompt, row in zip(prompts, tokens.tolist(), strict=True)])
    expected = np.argmax(forward({"params": params}, ids), axis=-1)
    for row, prompt, predicted in zip(ids, prompts, expected, strict=True):
        np.testing.assert_array_equal(predicted[len(prompt) - 1 : -1], row[len(prompt) :])


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
        assert sum(tokens.shape[1] for tokens in generated) == context - length
        programs.append(set(calls))
        assert len(programs[-1]) == 2
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
    assert len(chunks) == 5  # LONG fills the context with the fourth
    ended, whole = np.concatenate(chunks, axis=1)
    np.testing.assert_array_equal(up_to_end(whole, end_of_text), both[1, :12])
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
