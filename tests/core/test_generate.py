"""Prompts to texts: what is refused, and how the pieces add up to one text."""

import os
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxlm.core import sampling
from jaxlm.core.generate import generate, up_to_end
from jaxlm.core.model import Decoder, prepare_decode_params
from jaxlm.core.sampling import SamplingParams
from jaxlm.data.tokenizer import encode_prompts, load_tokenizer
from jaxlm.errors import UsageError

CHOICE = SamplingParams(1.2)
GREEDY = SamplingParams(0.0)
SHORT, LONG = [7, 8, 9], list(range(30, 42))
NEVER = -1  # no token is the end of a text


def pieces(small_model, prompts, *, choice=CHOICE, key=0, tokens=10, end_of_text=NEVER, chunk=None):
    config, params = small_model
    return list(
        generate(
            config,
            prepare_decode_params(config, params),
            prompts,
            choice,
            jax.random.key(key),
            tokens,
            end_of_text,
            chunk,
        )
    )


@pytest.fixture(scope="module")
def both(small_model):
    [tokens] = pieces(small_model, [SHORT, LONG])
    return tokens


def test_chunks_make_the_text_that_is_written_at_once(small_model, both):
    chunks = pieces(small_model, [SHORT, LONG], chunk=3)
    assert [chunk.shape for chunk in chunks] == [(2, 3), (2, 3), (2, 3), (2, 1)]
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), both)


def test_the_key_decides_the_texts_and_each_text_has_its_own(small_model, both):
    assert both.shape == (2, 10)
    assert (pieces(small_model, [SHORT, LONG], key=1)[0] != both).any(axis=1).all()
    [twins] = pieces(small_model, [SHORT, SHORT])
    np.testing.assert_array_equal(twins[0], both[0])
    assert (twins[1] != twins[0]).any()


def test_a_text_is_the_same_alone(small_model, both):
    [alone] = pieces(small_model, [SHORT])
    np.testing.assert_array_equal(alone[0], both[0])


def test_rows_added_for_a_gpu_change_no_text_and_delay_no_end(small_model, both, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    [tokens] = pieces(small_model, [SHORT, LONG])
    np.testing.assert_array_equal(tokens, both)
    first = int(tokens[0, 0])
    assert [chunk.shape for chunk in pieces(small_model, [SHORT], end_of_text=first, chunk=3)] == [(1, 3)]


def test_keys_and_values_that_heads_share_are_remembered_like_others(small_shared_model):
    config, params = small_shared_model
    [tokens] = pieces(small_shared_model, [LONG, SHORT], choice=GREEDY)
    forward = jax.jit(Decoder(config).apply)
    for prompt, written in zip([LONG, SHORT], tokens.tolist(), strict=True):
        logits = forward({"params": params}, np.array([prompt + written]))[0]
        np.testing.assert_array_equal(np.argmax(logits[len(prompt) - 1 : -1], axis=-1), written)


def test_texts_end_where_the_context_is_full(small_model):
    config, params = small_model
    longest = np.random.default_rng(0).integers(0, 257, config.context - 1).tolist()
    [tokens] = pieces(small_model, [longest, SHORT], choice=GREEDY)
    assert tokens.shape == (2, 1)
    logits = jax.jit(Decoder(config).apply)({"params": params}, np.array([longest]))
    assert tokens[0, 0] == np.argmax(logits[0, -1])


@pytest.mark.parametrize("chunk", [None, 4])
def test_prompts_of_like_lengths_share_one_program_also_where_the_context_ends(small_model, chunk):
    tokens = 2 * small_model[0].context
    pieces(small_model, [SHORT], tokens=tokens, chunk=chunk)
    compiled = sampling.prefill._cache_size(), sampling._decode_on_device._cache_size()
    pieces(small_model, [LONG], tokens=tokens, chunk=chunk)
    assert (sampling.prefill._cache_size(), sampling._decode_on_device._cache_size()) == compiled


def test_chunks_stop_coming_once_all_texts_have_ended(small_model):
    [free] = pieces(small_model, [SHORT, SHORT], choice=GREEDY)
    end_of_text = int(free[0, 4])
    end = free[0].tolist().index(end_of_text)
    chunks = pieces(small_model, [SHORT, SHORT], choice=GREEDY, end_of_text=end_of_text, chunk=3)
    assert len(chunks) == end // 3 + 1 < 4
    for text in np.concatenate(chunks, axis=1):
        np.testing.assert_array_equal(up_to_end(text, end_of_text), free[0, :end])


@pytest.mark.parametrize("choice", [CHOICE, GREEDY, SamplingParams(1.5, 40, 0.9)])
def test_the_host_writes_token_by_token_what_the_device_writes_at_once(small_model, choice):
    config, params = small_model
    by_host = replace(config, loops="unrolled"), params
    [written] = pieces(small_model, [SHORT, LONG], choice=choice)
    np.testing.assert_array_equal(np.concatenate(pieces(by_host, [SHORT, LONG], choice=choice, chunk=4), 1), written)
    end_of_text = int(written[0, 3])
    ended, [expected] = (
        pieces(model, [SHORT, SHORT], choice=choice, end_of_text=end_of_text) for model in (by_host, small_model)
    )
    np.testing.assert_array_equal(ended[0], expected)


def test_chunks_keep_coming_while_one_text_goes_on(small_model, both):
    end = next(i for i, token in enumerate(both[0]) if token not in both[1])
    chunks = pieces(small_model, [SHORT, LONG], end_of_text=int(both[0, end]), chunk=3)
    ended, whole = np.concatenate(chunks, axis=1)
    np.testing.assert_array_equal(whole, both[1])
    np.testing.assert_array_equal(ended, [*both[0, :end], *[both[0, end]] * (10 - end)])


def test_up_to_end_cuts_at_the_first_end_of_text():
    ids = np.array([4, 5, 0, 6, 0])
    assert up_to_end(ids, 0).tolist() == [4, 5]
    assert up_to_end(ids, 4).tolist() == []
    assert up_to_end(ids, 9).tolist() == [4, 5, 0, 6, 0]


def test_prompts_are_encoded_and_an_empty_one_begins_a_text():
    tokenizer = load_tokenizer(257)
    first, empty = encode_prompts(tokenizer, ["abc", ""], context=4)
    assert tokenizer.decode(first) == "abc"
    assert empty == [tokenizer.end_of_text]


def test_a_prompt_that_is_not_utf8_is_refused():
    with pytest.raises(UsageError, match="is not UTF-8 text") as refused:
        encode_prompts(load_tokenizer(257), ["é", os.fsdecode(b"caf\xe9")], context=16)
    assert refused.value.args[0].isprintable()


@pytest.mark.parametrize("prompt", ["abcd", "a" * 100, "one\ntwo\nthree"])
def test_a_prompt_that_fills_the_context_is_refused_in_one_line(prompt):
    with pytest.raises(UsageError) as refused:
        encode_prompts(load_tokenizer(257), ["abc", prompt], context=4)
    message = str(refused.value)
    assert f"{len(prompt)} tokens" in message
    assert "4 tokens" in message
    assert len(message.splitlines()) == 1
