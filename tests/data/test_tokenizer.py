"""The tokenizer, compared with GPT-2's ids, tiktoken's pattern and a plain byte-pair encoding."""

import functools
import itertools
import os
import socket
import sys
from unittest import mock

import numpy as np
import pytest
import tiktoken
from hypothesis import example, given
from hypothesis import strategies as st
from tiktoken_ext.openai_public import r50k_pat_str

from jaxlm.data import tokenizer
from jaxlm.data.tokenizer import encode_prompts, load_tokenizer
from jaxlm.errors import UsageError

SIZES = [257, 1000, 50257]


@functools.cache
def ranks_of(size):
    return {token: rank for rank, token in enumerate(load_tokenizer().vocabulary[: size - 1])}


def merge_bytes(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Byte-pair encoding by definition: merge the leftmost pair of the lowest rank until there is none."""
    parts = [word[i : i + 1] for i in range(len(word))]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Once upon a time", [7454, 2402, 257, 640]),
        ("Hello world", [15496, 995]),
        ("hello world", [31373, 995]),
        ("Hello, I'm a language model,", [15496, 11, 314, 1101, 257, 3303, 2746, 11]),
        ("\n\nHello", [198, 198, 15496]),
        ("<|endoftext|>", [27, 91, 437, 1659, 5239, 91, 29]),
        ("", []),
    ],
)
def test_full_vocabulary_gives_gpt2_ids(text, ids):
    assert load_tokenizer().encode(text).tolist() == ids


def test_end_of_text_is_the_last_id():
    assert (load_tokenizer().end_of_text, load_tokenizer().vocab_size) == (50256, 50257)
    small = load_tokenizer(1000)
    assert (small.end_of_text, small.decode([999])) == (999, "<|endoftext|>")
    assert small.encode("a <|endoftext|> b").max() < 999


@pytest.fixture(scope="module")
def openai():
    """tiktoken's GPT-2 pattern with our vocabulary."""
    return tiktoken.Encoding("openai", pat_str=r50k_pat_str, mergeable_ranks=ranks_of(50257), special_tokens={})


SPACES = [" ", "  ", "\n", "\r\n", "\t", "\u2003", "\x1c", "\u200b"]
WORDS = ["word", "Éé", "漢", "e\u0301", "7", "½", "٣", "...", "_", "🙂", "<|endoftext|>"]
ENDINGS = ["'", "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'x"]


@given(
    st.lists(st.sampled_from(SPACES + WORDS + ENDINGS) | st.characters(exclude_categories=["Cs"]), max_size=60).map(
        "".join
    )
)
def test_ids_are_those_of_tiktokens_pattern(openai, text):
    assert load_tokenizer().encode(text).tolist() == openai.encode_ordinary(text)


@pytest.mark.slow
def test_every_character_is_split_as_by_tiktokens_pattern(openai):
    characters = [chr(i) for i in range(sys.maxunicode + 1) if not 0xD800 <= i <= 0xDFFF]
    for first in range(0, len(characters), 1 << 16):
        text = "".join([f"a{c}1 {c}.  {c}{c}" for c in characters[first : first + (1 << 16)]])
        assert np.array_equal(load_tokenizer().encode(text), openai.encode_to_numpy(text))


def test_a_million_spaces_at_the_end(openai):
    text = "end" + " " * 1_100_000
    assert np.array_equal(load_tokenizer().encode(text), openai.encode_to_numpy(text))


MARK = "<|endoftext|>"
BLANKS = [" ", "\n", "\t", "\r", "\x85", "\xa0", "\u2003", "\u3000"]


@given(
    st.lists(st.sampled_from([*BLANKS, *BLANKS, *SPACES, "word", "7", "'s", "…", MARK]), max_size=60).map("".join),
    st.integers(2, 9),
    st.booleans(),
)
@example("a\n\n\n\n\x1cb", 2, False)
def test_cutting_long_runs_of_blanks_changes_no_id(text, longest, marked):
    tokens = load_tokenizer(1000)
    special = {MARK} if marked else set()
    whole = tokens.encoding.encode(text, allowed_special=special, disallowed_special=())
    with mock.patch.object(tokenizer, "_LONG_RUN", longest):
        assert tokens.encode(text, marked).tolist() == whole


def test_long_runs_are_cut():
    with mock.patch.object(tokenizer, "_LONG_RUN", 4):
        assert tokenizer._cuts("a" + " " * 8 + "b" + "\n" * 9 + "c", marked=False) == [8, 18]
        assert tokenizer._cuts("a" + " " * 8 + MARK + "\n" * 9, marked=True) == []
        assert tokenizer._cuts("ab" + " " * 5 + "c", marked=False) == [6]
        assert tokenizer._cuts(" " * 3 + "b " * 20, marked=False) == []


@pytest.mark.parametrize(
    "run", [*" \na\u3000", *(pytest.param(run, marks=pytest.mark.slow) for run in (*"\t7!é\x1c", " \n"))]
)
def test_a_million_of_anything_before_text_is_encoded(run):
    tokens, text = load_tokenizer(), "one" + run * 1_100_000 + "two"
    ids = tokens.encode(text)
    assert tokens.decode(ids) == text
    if run == " ":
        assert ids.tolist() == [505, *[220] * 1_099_999, 734]  # "one", blanks, " two"


def test_a_prompt_of_a_million_blanks_is_refused_for_its_length():
    with pytest.raises(UsageError, match=r"is 1000001 tokens long"):
        encode_prompts(load_tokenizer(), ["a" + " " * 1_000_000 + "b"], 1024)


def test_a_copy_has_an_encoding_of_its_own_and_the_same_ids():
    tokens = load_tokenizer(1000)
    copy = tokens.copy()
    assert copy.encoding._core_bpe is not tokens.encoding._core_bpe
    for text in ("", "Once upon a time", " é漢🙂\n"):
        assert copy.encode(text + "<|endoftext|>", marked=True).tolist() == [*tokens.encode(text).tolist(), 999]


@pytest.mark.parametrize("size", SIZES)
def test_every_byte_is_a_token(size):
    tokens = load_tokenizer(size)
    ids = [tokens.vocabulary.index(bytes([byte])) for byte in range(256)]
    assert sorted(ids) == list(range(256))
    assert tokens.decode_bytes(ids) == bytes(range(256))
    assert tokens.encode(bytes(range(128)).decode()).max() < size - 1


@pytest.mark.parametrize("size", SIZES)
@given(text=st.text(max_size=200))
def test_round_trip_of_any_unicode(size, text):
    ids = load_tokenizer(size).encode(text)
    assert ids.dtype == np.uint16
    assert load_tokenizer(size).decode(ids) == text


@pytest.mark.parametrize("size", SIZES)
@given(word=st.text("aehinorstd", min_size=1, max_size=12))
def test_a_smaller_vocabulary_is_a_byte_pair_encoding(size, word):
    ranks = ranks_of(size)
    ids = load_tokenizer(size).encode(f"{word} {word}").tolist()
    assert ids == merge_bytes(word.encode(), ranks) + merge_bytes(f" {word}".encode(), ranks)


def test_lone_surrogates_and_invalid_utf8_do_not_fail():
    tokens = load_tokenizer()
    assert tokens.decode(tokens.encode("a\ud800b")) == "a?b"
    assert tokens.decode(tokens.encode("é")[:1]) in ("é", "\ufffd")
    assert load_tokenizer(257).decode(load_tokenizer(257).encode("é")[:1]) == "\ufffd"


@pytest.mark.parametrize("size", [-1, 0, 256, 50258])
def test_sizes_outside_the_vocabulary_are_refused(size):
    with pytest.raises(UsageError, match="257 to 50257"):
        load_tokenizer(size)


def test_a_damaged_vocabulary_is_refused(monkeypatch, tmp_path):
    packaged = tokenizer.resources.files("jaxlm.data").joinpath("gpt2.tiktoken").read_bytes()
    (tmp_path / "gpt2.tiktoken").write_bytes(packaged.replace(b"IQ== 0\n", b"Ig== 0\n", 1))
    monkeypatch.setattr(tokenizer.resources, "files", lambda package: tmp_path)
    with pytest.raises(UsageError, match="reinstall"):
        load_tokenizer.__wrapped__(50257)
    (tmp_path / "gpt2.tiktoken").unlink()
    with pytest.raises(UsageError, match="reinstall"):
        load_tokenizer.__wrapped__(50257)


def test_no_network_is_used(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a network request")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert load_tokenizer.__wrapped__(50257).encode("Once").tolist() == [7454]


@pytest.mark.parametrize("size", [300, pytest.param(50257, marks=pytest.mark.slow)])
def test_each_merge_makes_the_next_token_of_two_earlier_ones(size):
    tokens = load_tokenizer(size)
    lines, names = tokens.merges(), tokens.names()
    assert [line.replace(" ", "") for line in lines] == names[256:-1]
    ids = {name: i for i, name in enumerate(names)}
    assert all(ids[name] < 256 + number for number, line in enumerate(lines) for name in line.split(" "))
    assert lines[:9] == ["Ġ t", "Ġ a", "h e", "i n", "r e", "o n", "Ġt he", "e r", "Ġ s"]  # as in GPT-2's merges.txt
    if size == 50257:
        assert lines[-2:] == ["Ġinform ants", "Ġg azed"]
        assert len(lines) == 50_000


def test_names_are_distinct_and_have_one_printable_character_for_each_byte():
    tokens = load_tokenizer()
    names = tokens.names()
    assert len(set(names)) == tokens.vocab_size
    for name, token in zip(names, tokens.vocabulary, strict=True):
        assert len(name) == len(token) and name.isprintable() and " " not in name


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
