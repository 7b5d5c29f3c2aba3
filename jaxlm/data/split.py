"""Which text trains and which validates."""

from collections.abc import Callable, Iterable, Iterator
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
    """Reads the whole text once, telling `on_bytes` every megabyte how many bytes so far.

    That is much quicker than encoding it, and shows bad input before anything is written. Raises what reading raises.
    """
    documents = characters = size = told = 0
    for pieces in (corpus.train, corpus.validation):
        for piece in pieces() if pieces else ():
            documents += piece.starts_document
            characters += len(piece.text)
            size += len(piece.text.encode())
            if size - told >= 1e6:
                on_bytes(told := size)
    return Size(documents, characters, size)


def split(corpus: Corpus, size: Size, fraction: float) -> Iterator[tuple[str, TextChunk]]:
    """Each piece of a corpus with the name of the file it belongs to, TRAIN or VAL; each file starts a document.

    A corpus with validation documents of its own keeps them apart. Of many documents, `fraction` go to VAL, evenly
    spread. Where documents are few, what follows the first int(characters * (1 - fraction)) characters goes to VAL.

    Raises UsageError when nothing would be left for one of the two.
    """
    if corpus.validation:
        return _label(corpus.train(), corpus.validation())
    if size.documents >= _MANY_DOCUMENTS:
        if int(size.documents * fraction) == 0:
            raise UsageError(f"validation {fraction} of {size.documents} documents is none: choose a larger fraction")
        return _spread(corpus.train(), fraction)
    train_characters = int(size.characters * (1 - fraction))
    if not 0 < train_characters < size.characters:
        raise UsageError(f"{size.characters} characters of text are too few to split: use more text")
    return _end(corpus.train(), train_characters)


def _label(train: Iterable[TextChunk], validation: Iterable[TextChunk]) -> Iterator[tuple[str, TextChunk]]:
    yield from ((TRAIN, piece) for piece in train)
    yield from ((VAL, piece) for piece in validation)


def _spread(pieces: Iterable[TextChunk], fraction: float) -> Iterator[tuple[str, TextChunk]]:
    document = 0
    for piece in pieces:
        document += piece.starts_document
        yield VAL if int(document * fraction) > int((document - 1) * fraction) else TRAIN, piece


def _end(pieces: Iterable[TextChunk], train_characters: int) -> Iterator[tuple[str, TextChunk]]:
    left, val_begun = train_characters, False
    for text, starts_document in pieces:
        head, tail = text[:left], text[left:]
        left -= len(head)
        if head:
            yield TRAIN, TextChunk(head, starts_document)
        if tail:
            yield VAL, TextChunk(tail, starts_document or not val_begun)
            val_begun = True
