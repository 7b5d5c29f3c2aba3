"""The split of a corpus into training and validation text."""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from typing import NamedTuple

from jaxlm.data.corpus import Corpus
from jaxlm.data.readers import TextChunk
from jaxlm.data.token_files import TRAIN, VAL
from jaxlm.errors import UsageError

_MANY_DOCUMENTS = 200


class Size(NamedTuple):
    documents: int
    characters: int
    bytes: int


def measure(corpus: Corpus, on_bytes: Callable[[int], None]) -> Size:
    """Counts documents, characters and UTF-8 bytes; calls `on_bytes` with the bytes so far after each megabyte.

    This pass is much faster than encoding, and detects bad input before anything is written. Raises what the readers
    raise.
    """
    documents = characters = size = reported = 0
    for read in (corpus.train, corpus.validation):
        for chunk in read() if read else ():
            documents += chunk.starts_document
            characters += len(chunk.text)
            size += len(chunk.text.encode())
            if size - reported >= 1e6:
                on_bytes(reported := size)
    return Size(documents, characters, size)


def split(
    corpus: Corpus, size: Size, fraction: float, fraction_flag: str = "--val_fraction"
) -> Iterator[tuple[str, TextChunk]]:
    """Labels each chunk of a corpus with its file, TRAIN or VAL. Each file begins with a new document.

    A corpus with its own validation documents keeps this split. With 200 documents or more, `fraction` of them go to
    VAL, evenly spaced. With fewer, the text after the first int(characters * (1 - fraction)) characters goes to VAL.

    Raises UsageError, which names `fraction_flag`, if one of the two would be empty.
    """
    if corpus.validation:
        return chain(zip(repeat(TRAIN), corpus.train()), zip(repeat(VAL), corpus.validation()))
    if size.documents >= _MANY_DOCUMENTS:
        if int(size.documents * fraction) == 0:
            share = f"{fraction_flag}={math.ceil(1000 / size.documents) / 1000}"
            raise UsageError(f"{fraction} of {size.documents} documents is 0: use at least {share}")
        return _split_documents(corpus.train(), fraction)
    train_characters = int(size.characters * (1 - fraction))
    if not 0 < train_characters < size.characters:
        raise UsageError(
            f"{size.characters} characters of text are too few to split by {fraction_flag} {fraction}: use more text"
        )
    return _split_characters(corpus.train(), train_characters)


def _split_documents(chunks: Iterable[TextChunk], fraction: float) -> Iterator[tuple[str, TextChunk]]:
    document = 0
    for chunk in chunks:
        document += chunk.starts_document
        yield VAL if int(document * fraction) > int((document - 1) * fraction) else TRAIN, chunk


def _split_characters(chunks: Iterable[TextChunk], train_characters: int) -> Iterator[tuple[str, TextChunk]]:
    remaining, val_started = train_characters, False
    for text, starts_document in chunks:
        train_text, val_text = text[:remaining], text[remaining:]
        remaining -= len(train_text)
        if train_text:
            yield TRAIN, TextChunk(train_text, starts_document)
        if val_text:
            yield VAL, TextChunk(val_text, starts_document or not val_started)
            val_started = True
