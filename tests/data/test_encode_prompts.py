"""Prompts to token ids: what is encoded and what is refused."""

import os

import pytest

from jaxlm.data.tokenizer import encode_prompts, load_tokenizer
from jaxlm.errors import UsageError


def test_prompts_are_encoded_and_an_empty_one_is_the_end_of_text():
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
