"""An own vocabulary: learnt as by the definition, the same each time, and refused where the text is too small."""

import itertools
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.data import encode
from jaxlm.data.corpus import open_corpus
from jaxlm.data.encode import write_token_files
from jaxlm.data.token_files import open_tokens
from jaxlm.data.tokenizer import from_bytes, load_tokenizer, merged_from
from jaxlm.data.vocabulary import learn_tokenizer
from jaxlm.errors import UsageError
from tests.tiny_run import is_one_line

ODD = ["it's", "'10", "000'", "é日本", "naïve\n\n", "", "\tend", "cats;"]


def some_text(size, seed=0):
    """Words of up to four syllables, and odd ones; half of all words are among fifty."""
    rng, language = np.random.default_rng(seed), np.random.default_rng(1)
    syllables = ["".join(pair) for pair in itertools.product("bdknrst", "aeiou")]
    words = ["".join(language.choice(syllables, language.integers(1, 5))) for _ in range(500)] + ODD
    places = np.where(rng.random(size) < 0.5, rng.integers(50, size=size), rng.integers(len(words), size=size))
    return " ".join(words[place] for place in places)


def words_of(text):
    """GPT-2's pattern, with Python's classes: letters, digits, others."""
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"
    return [match.group().encode() for match in re.finditer(pattern, text)]


def tokens_by_definition(text, count):
    """The first `count` tokens: the most frequent pair is merged in all words; of equals, that of the lowest ids."""
    tokens = list(load_tokenizer(257).vocabulary[:-1])
    words = Counter(tuple(tokens.index(bytes([byte])) for byte in word) for word in words_of(text))
    while len(tokens) < count:
        pairs = Counter()
        for word, times in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += times
        pair = min(pairs, key=lambda pair: (-pairs[pair], pair))
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        words = Counter({_merged(word, pair, len(tokens) - 1): times for word, times in words.items()})
    return tokens


def _merged(word, pair, new):
    ids = []
    for i in word:
        if ids and (ids[-1], i) == pair:
            ids[-1] = new
        else:
            ids.append(i)
    return tuple(ids)


@pytest.mark.parametrize("size", [257, 258, 330, 600])
def test_the_vocabulary_is_that_of_the_definition(size):
    text = some_text(3000)
    assert list(learn_tokenizer([text], size).vocabulary[:-1]) == tokens_by_definition(text, size - 1)


@given(st.text(max_size=200))
def test_round_trip_of_any_unicode(text):
    own = learnt()
    assert own.decode(own.encode(text)) == text


_learnt = []


def learnt():
    if not _learnt:
        _learnt.append(learn_tokenizer([some_text(3000)], 330))
    return _learnt[0]


@given(st.text("ab -é", min_size=1, max_size=60), st.integers(2, 5))
def test_every_token_is_a_merge_of_two_before_it(text, times):
    try:
        own = learn_tokenizer([text] * times, 500)
    except UsageError as refusal:
        size = int(re.search(r"--vocab_size=(\d+)$", str(refusal)).group(1))
        own = learn_tokenizer([text] * times, size)
    ids = {}
    for index, token in enumerate(own.vocabulary[:-1]):
        assert len(token) == 1 or len(merged_from(token, ids)) == 2
        ids[token] = index
    assert max(own.encode(text)) < own.end_of_text


def test_no_token_is_longer_than_128_bytes():
    own = learn_tokenizer([f"{'=' * length}\n" for length in range(200, 400) for _ in range(3)], 270)
    assert 100 < max(map(len, own.vocabulary)) <= 128


def test_a_vocabulary_is_read_as_it_was_written():
    raw = learnt().to_bytes()
    assert raw.startswith(b"IQ== 0\nIg== 1\n")
    assert from_bytes(raw).vocabulary == learnt().vocabulary
    for damaged in (b"", raw[:-1], raw[:100], raw.replace(b" 7\n", b" 8\n"), raw.replace(b"IQ==", b"I"), raw + b"\n"):
        with pytest.raises(ValueError):
            from_bytes(damaged)


LEARN = """
import sys
from pathlib import Path
from jaxlm.data.corpus import open_corpus
from jaxlm.data.encode import write_token_files
print(write_token_files(open_corpus(sys.argv[1]), Path(sys.argv[2]), 400, 0.1, tokenizer="own").tokenizer_sha256)
"""


@pytest.mark.slow
def test_every_number_of_threads_gives_the_same_vocabulary(tmp_path):
    lines = [json.dumps({"text": some_text(40, seed)}) + "\n" for seed in range(300)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    hashes = set()
    for threads in ("1", "2", "7"):
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        command = [sys.executable, "-c", LEARN, str(tmp_path / "a.jsonl"), str(tmp_path / threads)]
        hashes.add(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    assert len(hashes) == 1 and len(hashes.pop()) == 65
    files = [[(tmp_path / threads / name).read_bytes() for name in os.listdir(tmp_path / "1")] for threads in "127"]
    assert files[0] == files[1] == files[2]


@pytest.mark.slow
def test_the_vocabulary_is_that_of_the_training_text(tmp_path, monkeypatch):
    """Every second of the documents has its own words, and none of the validation text counts."""
    documents = [some_text(40, seed) for seed in range(300)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    corpus = open_corpus(str(tmp_path / "a.jsonl"))
    write_token_files(corpus, tmp_path / "out", 300, 0.5, tokenizer="own")
    own = open_tokens(tmp_path / "out", 300, 8, "own").tokenizer
    assert own.vocabulary == learn_tokenizer(documents[::2], 300).vocabulary
    assert own.vocabulary != learn_tokenizer(documents, 300).vocabulary

    size = sum(len(text.encode()) for text in documents)
    monkeypatch.setattr(encode, "SAMPLE_BYTES", size // 5)
    taken = []
    monkeypatch.setattr(encode, "learn_tokenizer", lambda texts, *_: taken.extend(texts) or own)
    write_token_files(corpus, tmp_path / "sampled", 300, 0.5, tokenizer="own")
    places = [documents.index(text) for text in taken]
    assert sum(len(text.encode()) for text in taken) <= size // 5
    assert set(np.diff(places)) <= {8, 10, 12} and places[-1] > 280
    assert all(place % 2 == 0 for place in places)


def test_each_stage_ends_at_its_total(tmp_path):
    text, last = some_text(4000), {}
    (tmp_path / "a.txt").write_text(text)
    meta = write_token_files(
        open_corpus(str(tmp_path / "a.txt")),
        tmp_path / "out",
        300,
        0.5,
        lambda stage, *counts: last.update({stage: counts}),
        tokenizer="own",
    )
    size = len(text.encode())
    assert meta.train.bytes + meta.val.bytes == size
    assert last["Learning the vocabulary"] == last["Encoding"] == (size, size)


@pytest.mark.parametrize("flag", ["--vocab_size", "--config.model.vocab_size"])
def test_too_little_text_is_refused_with_the_size_that_fits(tmp_path, flag):
    texts = ["abab cd cd"] * 3
    with pytest.raises(UsageError) as refused:
        learn_tokenizer(texts, 1000, flag)
    assert is_one_line(refused.value)
    size = int(str(refused.value).rpartition(f"{flag}=")[2])
    assert learn_tokenizer(texts, size).vocabulary[256:-1] == (b"ab", b"cd", b" cd", b"abab")
    with pytest.raises(UsageError):
        learn_tokenizer(texts, size + 1)


def test_own_token_files_have_the_bytes_of_the_text(tmp_path):
    (tmp_path / "a.txt").write_text(some_text(5000), newline="")
    meta = write_token_files(open_corpus(str(tmp_path / "a.txt")), tmp_path / "out", 300, 0.1, tokenizer="own")
    files = open_tokens(tmp_path / "out", 300, 8, "own")
    assert files.meta == meta
    assert files.text_bytes(files.val[1:]) == meta.val.bytes
    text = files.tokenizer.decode(files.train[1:]) + files.tokenizer.decode(files.val[1:])
    assert text == Path(tmp_path / "a.txt").read_text()


def test_an_error_in_the_text_is_raised():
    def texts():
        yield "the king went home"
        raise UsageError("it cannot be read")

    with pytest.raises(UsageError, match="it cannot be read"):
        learn_tokenizer(texts(), 257)


def test_the_library_runs_in_a_thread_that_no_exit_waits_for():
    """In the main thread, it would delay Ctrl-C until it is done."""
    threads = []

    def texts():
        threads.append(threading.current_thread())
        yield "the king went home"

    learn_tokenizer(texts(), 257)
    assert threads[0] is not threading.main_thread()
    assert threads[0].daemon
