"""The split: every document is in exactly one of the two files."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.data.corpus import Corpus
from jaxlm.data.readers import TextChunk
from jaxlm.data.split import measure, split
from jaxlm.errors import UsageError


def corpus_of(documents, size=5):
    """A corpus of these documents, in chunks of `size` characters."""
    chunks = [TextChunk(text[i : i + size], i == 0) for text in documents for i in range(0, len(text), size)]
    return Corpus("", (), lambda: iter(chunks))


def split_documents(corpus, fraction):
    files = {"train.bin": [], "val.bin": []}
    for name, (text, starts_document) in split(corpus, measure(corpus, lambda size: None), fraction):
        assert starts_document or files[name], "a file starts in the middle of a document"
        files[name] = [*files[name], text] if starts_document else [*files[name][:-1], files[name][-1] + text]
    return files["train.bin"], files["val.bin"]


@given(st.lists(st.text("abcé", min_size=1, max_size=30), min_size=1, max_size=8), st.floats(0.01, 0.99))
def test_few_documents_are_split_by_characters(documents, fraction):
    text = "".join(documents)
    train_size = int(len(text) * (1 - fraction))
    if not 0 < train_size < len(text):
        with pytest.raises(UsageError, match="too few to split"):
            split_documents(corpus_of(documents), fraction)
        return
    train, val = split_documents(corpus_of(documents), fraction)
    assert ("".join(train), "".join(val)) == (text[:train_size], text[train_size:])
    ends = {sum(map(len, documents[:i])) for i in range(1, len(documents))}
    assert len(train) + len(val) == len(documents) + (train_size not in ends)


@pytest.mark.parametrize(("count", "fraction"), [(200, 0.01), (1000, 0.05), (777, 0.3), (250, 0.9)])
def test_many_documents_are_split_whole_and_evenly(count, fraction):
    documents = [f"document {i}." for i in range(count)]
    train, val = split_documents(corpus_of(documents), fraction)
    assert sorted(train + val) == sorted(documents)
    assert (train, val) == ([d for d in documents if d in set(train)], [d for d in documents if d in set(val)])
    assert abs(len(val) - count * fraction) < 1
    for tenth in range(10):
        part = set(documents[tenth * count // 10 : (tenth + 1) * count // 10])
        assert abs(len(part & set(val)) - len(part) * fraction) < 2


def test_too_small_a_fraction_of_many_documents_is_refused():
    with pytest.raises(UsageError, match="of 200 documents is 0"):
        split_documents(corpus_of(["text"] * 200), 0.001)


def test_a_corpus_with_its_own_validation_text_is_not_split():
    train, val = corpus_of(["one", "two"]).train, corpus_of(["three"]).train
    assert split_documents(Corpus("", (), train, val), 0.5) == (["one", "two"], ["three"])


def test_measure_counts_documents_characters_and_bytes():
    assert measure(corpus_of(["é…", "a" * 12]), lambda size: None) == (2, 14, 17)
    reported = []
    measure(corpus_of(["a" * 3_000_000], size=1000), reported.append)
    assert reported == [1_000_000, 2_000_000, 3_000_000]
