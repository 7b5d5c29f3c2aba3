"""Documents to token files: encode on all cores, write beside and rename."""

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from jaxlm.data.corpus import WITH_OWN_VALIDATION, Corpus, files_sha256, source_changed
from jaxlm.data.readers import CHUNK_CHARACTERS, TextChunk
from jaxlm.data.split import measure, split
from jaxlm.data.token_files import META, TOKEN_DTYPE, TOKENIZER_NAME, TRAIN, VAL, FileMeta, Meta, read_meta
from jaxlm.data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer
from jaxlm.errors import RunError, UsageError
from jaxlm.storage import atomic
from jaxlm.storage.lock import only_writer

_MOST_WORKERS = 12


class _Encoded(NamedTuple):
    ids: bytes
    text_bytes: int
    documents: int


def find_prepared(source: str, directory: Path, vocab_size: int, validation_fraction: float) -> Meta | None:
    """What `directory` holds if it is just this, whole; None when there is nothing yet, or an unfinished attempt.

    Raises UsageError when the settings make no sense or `directory` holds token files of another source, other
    settings or another program.
    """
    load_tokenizer(vocab_size)
    if not 0 < validation_fraction < 1:
        raise UsageError(f"validation is {validation_fraction}: choose a fraction between 0 and 1, such as 0.01")
    if os.path.exists(directory) and not os.path.isdir(directory):
        raise UsageError(f"{directory} is a file: choose another directory")
    for path in (directory / name for name in (TRAIN, VAL, META)):
        if os.path.isdir(path):
            raise UsageError(f"{path} is a directory: choose another place or delete it")
    meta = read_meta(directory)
    if meta is None:
        for path in (directory / TRAIN, directory / VAL):
            if os.path.exists(path):
                raise UsageError(f"{path} is there already, without {META}: choose another directory or delete it")
        return None
    for what, there, asked in (
        ("source", meta.source, source),
        ("tokenizer", meta.tokenizer, TOKENIZER_NAME),
        ("vocab_size", meta.vocab_size, vocab_size),
        ("validation", meta.validation_fraction, None if source in WITH_OWN_VALIDATION else validation_fraction),
    ):
        if there != asked:
            raise UsageError(
                f"{directory} was prepared with {what} {there}, not {asked}: choose another directory or delete it"
            )
    if not meta.fits_files(directory):
        return None
    if source_changed(source, meta.source_sha256):
        raise UsageError(f"{source} has changed since {directory} was prepared: choose another place or delete it")
    return meta


def write_token_files(
    corpus: Corpus,
    directory: Path,
    vocab_size: int,
    validation_fraction: float,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    workers: int | None = None,
) -> Meta:
    """Encodes a corpus into `directory`, which `find_prepared` has found to be free for it.

    `on_progress` is told the bytes of text done and in all; in all is 0 while they are being counted. `workers` is
    the number of encoding threads; unless told, one for each core, up to 12, which take all that one thread reads.

    Raises UsageError when the corpus cannot be read or split, RunError when the disk fails.
    """
    tokenizer = load_tokenizer(vocab_size)
    size = measure(corpus, lambda counted: on_progress(counted, 0))
    pieces = split(corpus, size, validation_fraction)
    sha256 = files_sha256(corpus.files)
    with _new_files(directory) as (train_file, val_file, meta_file):
        writers = {TRAIN: _Writer(train_file), VAL: _Writer(val_file)}
        done = 0
        for name, encoded in _encode_all(pieces, tokenizer, workers or min(os.cpu_count() or 1, _MOST_WORKERS)):
            writers[name].write(encoded)
            done += encoded.text_bytes
            on_progress(done, size.bytes)
        fraction = None if corpus.validation else validation_fraction
        train, val = (writers[name].meta() for name in (TRAIN, VAL))
        meta = Meta(TOKENIZER_NAME, vocab_size, corpus.source, sha256, fraction, train, val)
        meta_file.write(meta.to_json().encode())
    return meta


@contextmanager
def _new_files(directory: Path) -> Iterator[Sequence[BinaryIO]]:
    """TRAIN, VAL and META, open beside their places; all are moved there at the end, or nothing is left of them.

    META moves first: so no part of the set passes for whole, nor for token files from elsewhere, which have none.
    """
    names = (TRAIN, VAL, META)
    beside = {name: directory / f"{name}.partial" for name in names}
    made = [path for path in (directory, *directory.parents) if not os.path.exists(path)]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with only_writer(directory), ExitStack() as stack:
            for path in beside.values():
                stack.callback(path.unlink, missing_ok=True)
            files = [stack.enter_context(beside[name].open("wb")) for name in names]
            yield files
            for file in files:
                file.flush()
                atomic.sync_descriptor(file.fileno())
            for name in reversed(names):
                beside[name].replace(directory / name)
            atomic.sync(directory)
            made.clear()
    except OSError as error:
        raise RunError(
            f"cannot write to {directory} ({error.strerror}): make room or choose another directory"
        ) from error
    finally:
        for path in made:
            with suppress(OSError):  # not empty, so no longer ours alone
                path.rmdir()


class _Writer:
    """Writes a token file, counting and hashing what goes in."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._sha256 = file, hashlib.sha256()
        self._tokens = self._text_bytes = self._documents = 0

    def write(self, encoded: _Encoded) -> None:
        self._file.write(encoded.ids)
        self._sha256.update(encoded.ids)
        self._tokens += len(encoded.ids) // TOKEN_DTYPE.itemsize
        self._text_bytes += encoded.text_bytes
        self._documents += encoded.documents

    def meta(self) -> FileMeta:
        return FileMeta(self._tokens, self._text_bytes, self._documents, self._sha256.hexdigest())


def _encode_all(
    pieces: Iterable[tuple[str, TextChunk]], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[str, _Encoded]]:
    """Encodes on all cores, for tiktoken lets go of Python's lock; the order within each file is kept."""
    waiting: deque[tuple[str, Future[_Encoded]]] = deque()
    own = threading.local()

    def begin() -> None:
        own.tokenizer = tokenizer.copy()

    def encode(group: list[TextChunk]) -> _Encoded:
        return _encode(own.tokenizer, group)

    with ThreadPoolExecutor(workers, initializer=begin) as pool:
        for name, group in _groups(pieces):
            waiting.append((name, pool.submit(encode, group)))
            if len(waiting) > 2 * workers:
                name, encoded = waiting.popleft()
                yield name, encoded.result()
        for name, encoded in waiting:
            yield name, encoded.result()


def _groups(pieces: Iterable[tuple[str, TextChunk]]) -> Iterator[tuple[str, list[TextChunk]]]:
    """Gathers pieces that go to the same file, small ones many together."""
    groups: dict[str, list[TextChunk]] = {TRAIN: [], VAL: []}
    characters = {TRAIN: 0, VAL: 0}
    for name, piece in pieces:
        groups[name].append(piece)
        characters[name] += len(piece.text)
        if characters[name] >= CHUNK_CHARACTERS:
            yield name, groups[name]
            groups[name], characters[name] = [], 0
    yield from groups.items()


def _encode(tokenizer: Tokenizer, group: list[TextChunk]) -> _Encoded:
    """The ids of `group`, with the end-of-text id before each document."""
    if any(END_OF_TEXT in piece.text for piece in group):  # it is ordinary text there, so each piece by itself
        mark = np.full(1, tokenizer.end_of_text, np.uint16)
        parts = [part for piece in group for part in (mark[: piece.starts_document], tokenizer.encode(piece.text))]
        ids = np.concatenate(parts)
    else:
        text = "".join([END_OF_TEXT * piece.starts_document + piece.text for piece in group])
        ids = tokenizer.encode(text, marked=True)
    return _Encoded(
        ids.astype(TOKEN_DTYPE).tobytes(),
        sum(len(piece.text.encode()) for piece in group),
        sum(piece.starts_document for piece in group),
    )
