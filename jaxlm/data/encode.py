"""Encodes a corpus into token files, on all cores; the files appear only when they are complete."""

import dataclasses
import hashlib
import json
import math
import os
import shlex
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from jaxlm.config import check_vocab_size
from jaxlm.data.corpus import Corpus, files_sha256, same_corpus, source_changed
from jaxlm.data.readers import CHUNK_CHARACTERS, TextChunk
from jaxlm.data.split import Size, measure, split
from jaxlm.data.text_files import names_of
from jaxlm.data.token_files import META, TOKEN_DTYPE, TRAIN, VAL, VOCABULARY, FileMeta, Meta, read_meta
from jaxlm.data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer
from jaxlm.data.vocabulary import SAMPLE_BYTES, learn_tokenizer
from jaxlm.errors import RunError, UsageError, disk_advice
from jaxlm.storage import atomic
from jaxlm.storage.lock import only_writer

_FILES = (TRAIN, VAL, VOCABULARY, META)
_COUNTED_BYTES = 1 << 20
_LONGEST_TOKEN = 128  # bytes
_MAX_WORKERS = 12  # one thread reads; more workers than this wait for it

Progress = Callable[[str, int, int], None]
_Encoded = tuple[bytes, Counter[str]]  # the ids, and the numbers of FileMeta


class Flags(NamedTuple):
    """The flags of a command that prepares text, for its messages."""

    corpus: str = "--corpus"
    directory: str = "--out"
    vocab_size: str = "--vocab_size"
    fraction: str = "--val_fraction"
    tokenizer: str = "--tokenizer"


PREPARE_FLAGS = Flags()
TRAINING_FLAGS = Flags(
    "--config.data.corpus",
    "--config.data.dir",
    "--config.model.vocab_size",
    "--config.data.val_fraction",
    "--config.data.tokenizer",
)


def prepare_command(
    source: str,
    directory: Path,
    vocab_size: int,
    validation_fraction: float,
    tokenizer: str = "gpt2",
    exclude: Sequence[str] = (),
) -> str:
    """The command that prepares a corpus in `directory`, or beside it if that is a file or has a token file or META."""
    is_used = os.path.isfile(directory) or any(os.path.lexists(directory / name) for name in _FILES)
    words = ["--corpus", *names_of(source), "--out", f"{directory}{'-new' * is_used}", "--vocab_size", str(vocab_size)]
    words += ["--exclude", *exclude] * bool(exclude) + ["--tokenizer", tokenizer] * (tokenizer != "gpt2")
    return shlex.join(["python", "-m", "jaxlm.prepare", *words, "--val_fraction", str(validation_fraction)])


def find_prepared(
    source: str,
    directory: Path,
    vocab_size: int,
    validation_fraction: float,
    flags: Flags = PREPARE_FLAGS,
    tokenizer: str = "gpt2",
    exclude: Sequence[str] = (),
    vocabulary: Tokenizer | None = None,
) -> Meta | None:
    """The meta.json of `directory` if it holds exactly these token files; None if they are missing or incomplete.

    `vocabulary` is that of an own tokenizer which is not learnt from the text.

    Raises UsageError, which names the flags, if a setting is out of bounds, or `directory` holds token files of another
    source, of other settings or of another program.
    """
    check_vocab_size(tokenizer, vocab_size, flags.vocab_size)
    elsewhere = f"choose another {flags.directory}"
    if flags is TRAINING_FLAGS:  # whose directory is not made
        elsewhere = f"set {flags.directory} to what this prepares: "
        elsewhere += prepare_command(source, directory, vocab_size, validation_fraction, tokenizer, exclude)
    if not 0 < validation_fraction < 1:
        raise UsageError(f"{flags.fraction} is {validation_fraction}: choose one between 0 and 1, such as 0.01")
    if os.path.exists(directory) and not os.path.isdir(directory):
        raise UsageError(f"{directory} is a file: {elsewhere}")
    meta = read_meta(directory)
    for path in (directory / name for name in _FILES):
        if os.path.isdir(path):
            raise UsageError(f"{path} is a directory: {elsewhere}")
        if meta is None and os.path.exists(path):
            raise UsageError(f"{path} exists without {META}: {elsewhere}")
    if meta is None:
        return None
    for flag, prepared, requested, fits in (
        (flags.corpus, meta.source, source, same_corpus(meta.source, source)),
        (flags.tokenizer, meta.tokenizer, tokenizer, meta.tokenizer == tokenizer),
        (flags.vocab_size, meta.vocab_size, vocab_size, meta.vocab_size == vocab_size),
        (flags.fraction, meta.validation_fraction, validation_fraction, meta.is_of(source, validation_fraction)),
    ):
        if not fits:
            raise UsageError(f"{directory} was prepared with {flag} {prepared}, not {requested}: {elsewhere}")
    if not meta.fits_files(directory):
        return None
    if vocabulary and meta.tokenizer_sha256 != hashlib.sha256(vocabulary.to_bytes()).hexdigest():
        raise UsageError(f"{directory} was prepared with another vocabulary: {elsewhere}")
    if source_changed(source, meta.source_sha256, exclude):
        raise UsageError(f"{source} has changed since {directory} was prepared: {elsewhere}")
    return meta


def write_token_files(
    corpus: Corpus,
    directory: Path,
    vocab_size: int,
    validation_fraction: float,
    on_progress: Progress = lambda stage, done, total: None,
    flags: Flags = PREPARE_FLAGS,
    tokenizer: str = "gpt2",
    vocabulary: Tokenizer | None = None,
    context: int = 0,
) -> Meta:
    """Encodes a corpus into `directory`, which must have passed `find_prepared` with the same `vocabulary`.

    `on_progress` is called with what is done, the bytes of text that it has done and their total; the total is 0 if it
    is not known.

    Raises UsageError if the corpus cannot be read or split, is too small to learn such a vocabulary from, or gives no
    sequence of `context` tokens and the next one to validate on; RunError if the disk fails.
    """
    size = measure(corpus, lambda counted: on_progress("Reading", counted, 0))
    encoder = vocabulary
    if tokenizer == "gpt2":
        encoder = load_tokenizer(vocab_size)
    elif not encoder:
        texts = _training_texts(split(corpus, size, validation_fraction, flags.fraction), size, on_progress)
        encoder = learn_tokenizer(sample(texts, min(1.0, SAMPLE_BYTES / size.bytes)), vocab_size, flags.vocab_size)
    own = encoder.to_bytes() if tokenizer != "gpt2" else b""
    if context and not corpus.validation:
        _check_share(corpus, size, encoder, validation_fraction, context, flags)
    chunks = split(corpus, size, validation_fraction, flags.fraction)
    source_sha256 = files_sha256(corpus.files)
    hashes = {TRAIN: hashlib.sha256(), VAL: hashlib.sha256()}
    counts: dict[str, Counter[str]] = {TRAIN: Counter(), VAL: Counter()}
    with _new_files(directory, [TRAIN, VAL, *[VOCABULARY] * bool(own), META]) as files:
        for name, (ids, group_counts) in _encode_all(chunks, encoder, min(os.cpu_count() or 1, _MAX_WORKERS)):
            files[name].write(ids)
            hashes[name].update(ids)
            counts[name].update(group_counts)
            on_progress("Encoding", counts[TRAIN]["bytes"] + counts[VAL]["bytes"], size.bytes)
        train, val = (FileMeta(**counts[name], sha256=hashes[name].hexdigest()) for name in (TRAIN, VAL))
        fraction = None if corpus.validation else validation_fraction
        sha256 = hashlib.sha256(own).hexdigest() if own else None
        meta = Meta(tokenizer, vocab_size, corpus.source, source_sha256, fraction, train, val, sha256)
        if own:
            files[VOCABULARY].write(own)
        files[META].write((json.dumps(dataclasses.asdict(meta), indent=2) + "\n").encode())
    return meta


def _check_share(corpus: Corpus, size: Size, encoder: Tokenizer, fraction: float, context: int, flags: Flags) -> None:
    """Raises UsageError, with the share that would do, if there is too little text to validate on.

    The tokens are estimated from those of evenly spaced parts, or counted if there is no more than _COUNTED_BYTES.
    """
    if size.bytes * fraction > _LONGEST_TOKEN * (context + 1):
        return
    part = "".join(sample((chunk.text for chunk in corpus.train()), min(1.0, _COUNTED_BYTES / size.bytes)))
    tokens = size.documents + int(size.bytes * len(encoder.encode(part)) / len(part.encode()))
    if tokens < 2 * (context + 1):
        raise UsageError(
            f"{corpus.source} has about {tokens:,} tokens, too few to train and to validate on sequences of"
            f" {context + 1}: use more text or a smaller --config.model.context"
        )
    if tokens * fraction < context + 1:
        share = math.ceil(1100 * (context + 1) / tokens) / 1000  # a tenth more than that
        raise UsageError(
            f"{fraction} of {corpus.source} is about {int(tokens * fraction):,} tokens, fewer than a sequence of"
            f" {context + 1} to validate on: use {flags.fraction}={min(share, 0.5)}"
        )


def _training_texts(chunks: Iterable[tuple[str, TextChunk]], size: Size, on_progress: Progress) -> Iterator[str]:
    done = 0
    for name, chunk in chunks:
        if name == TRAIN:
            yield chunk.text
        done += len(chunk.text.encode())
        on_progress("Learning the vocabulary", done, size.bytes)


def sample(texts: Iterable[str], share: float) -> Iterator[str]:
    """Evenly spaced ones of `texts`, with at most this share of their bytes."""
    read = taken = 0
    for text in texts:
        text_bytes = len(text.encode())
        read += text_bytes
        if taken + text_bytes <= share * read:
            taken += text_bytes
            yield text


@contextmanager
def _new_files(directory: Path, names: Sequence[str]) -> Iterator[dict[str, BinaryIO]]:
    """Opens files that appear at the end, or not at all on failure.

    The last, META, appears first, so that an incomplete set is never mistaken for token files without META.
    """
    try:
        with atomic.new_directory(directory), only_writer(directory), ExitStack() as stack:
            paths = {name: stack.enter_context(atomic.new_file(directory / name)) for name in names}
            yield {name: stack.enter_context(path.open("wb")) for name, path in paths.items()}
    except OSError as error:
        raise RunError(f"cannot write to {directory} ({error.strerror}): {disk_advice(error)}") from error


def _encode_all(
    chunks: Iterable[tuple[str, TextChunk]], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[str, _Encoded]]:
    """Encodes in threads, as tiktoken releases Python's lock, and preserves the order within each file."""
    pending: deque[tuple[str, Future[_Encoded]]] = deque()
    local = threading.local()

    def encode(group: list[TextChunk]) -> _Encoded:
        if not hasattr(local, "tokenizer"):
            local.tokenizer = tokenizer.copy()
        return _encode(local.tokenizer, group)

    with ThreadPoolExecutor(workers) as pool:
        for name, group in _groups(chunks):
            pending.append((name, pool.submit(encode, group)))
            if len(pending) > 2 * workers:
                name, encoded = pending.popleft()
                yield name, encoded.result()
        for name, encoded in pending:
            yield name, encoded.result()


def _groups(chunks: Iterable[tuple[str, TextChunk]]) -> Iterator[tuple[str, list[TextChunk]]]:
    """Groups the chunks of each file, so that many small documents are encoded in one call."""
    groups: dict[str, list[TextChunk]] = {TRAIN: [], VAL: []}
    characters = {TRAIN: 0, VAL: 0}
    for name, chunk in chunks:
        groups[name].append(chunk)
        characters[name] += len(chunk.text)
        if characters[name] >= CHUNK_CHARACTERS:
            yield name, groups[name]
            groups[name], characters[name] = [], 0
    yield from groups.items()


def _encode(tokenizer: Tokenizer, group: list[TextChunk]) -> _Encoded:
    """The ids of `group`, with the end-of-text id before each document."""
    if any(END_OF_TEXT in chunk.text for chunk in group):  # there it is ordinary text: encode the chunks one by one
        mark = np.full(1, tokenizer.end_of_text, np.uint16)
        parts = [part for chunk in group for part in (mark[: chunk.starts_document], tokenizer.encode(chunk.text))]
        ids = np.concatenate(parts)
    else:
        text = "".join([END_OF_TEXT * chunk.starts_document + chunk.text for chunk in group])
        ids = tokenizer.encode(text, marked=True)
    text_bytes, documents = sum(len(chunk.text.encode()) for chunk in group), sum(c.starts_document for c in group)
    return ids.astype(TOKEN_DTYPE).tobytes(), Counter(tokens=len(ids), bytes=text_bytes, documents=documents)
