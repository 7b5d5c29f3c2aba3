"""Prompts from the text itself."""

from pathlib import Path

import numpy as np

from jaxlm.config import PROMPTS
from jaxlm.data.beginnings import COUNT, LONGEST, beginnings
from jaxlm.data.token_files import TokenFiles
from jaxlm.data.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(1000)
WORDS = [
    "Dear",
    "friend",
    "sister",
    "today",
    "tomorrow",
    "rain",
    "garden",
    "letter",
    "Monday",
    "evening",
    "house",
    "river",
]


def beginnings_of(text):
    ids = TOKENIZER.encode(text, marked=True)
    return beginnings(TokenFiles(Path(), TOKENIZER, ids[:1], ids, np.zeros(1000, np.uint8), ("", ""), None))


def paragraphs(count, seed=0):
    rng = np.random.default_rng(seed)
    return [f"{' '.join(rng.choice(WORDS, 9))}.\n{' '.join(rng.choice(WORDS, 5))} é." for _ in range(count)]


def test_they_begin_paragraphs_of_the_text_and_differ():
    parts = paragraphs(300)
    starts = beginnings_of("\n\n".join(parts))
    assert len(set(starts)) == len(starts) == COUNT
    places = [next(i for i, part in enumerate(parts) if part.startswith(start + " ")) for start in starts]
    assert places == sorted(places) and places[0] > 0 and places[-1] > 200
    assert beginnings_of("\n\n".join(parts)) == starts


def test_documents_lines_and_sentences_count_where_there_are_no_blank_lines():
    parts = [" ".join(part.split()) for part in paragraphs(300)]
    for text in ("<|endoftext|>".join(parts), "\n".join(parts), " ".join(parts)):
        starts = beginnings_of(text)
        assert len(starts) == COUNT
        sentences = text.replace(". ", ".\n").replace("<|endoftext|>", "\n").splitlines()
        assert all(any(sentence.startswith(f"{start} ") for sentence in sentences) for start in starts)


def test_short_and_odd_texts_have_some_too():
    assert beginnings_of("No more than a few words. Then there is one more sentence here.") == ("Then there is",)
    for text in ("", "a b", "\x00\x01 " * 500, "x" * 5000, "- - - - -\n\n" * 50):
        assert beginnings_of(text) == PROMPTS
    assert all(len(start) <= LONGEST for start in beginnings_of("\n".join(f"{'w' * n} a b c" for n in range(1, 200))))
