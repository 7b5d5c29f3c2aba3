"""Token files and the batches read from them. data/README.md describes the format."""

import hashlib
import json
import os
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxlm.data.corpus import WITH_OWN_VALIDATION, same_corpus
from jaxlm.data.foreign import PREPARE, refuse_foreign
from jaxlm.data.tokenizer import GPT2_VOCAB_SIZE, Tokenizer, from_bytes, load_tokenizer
from jaxlm.errors import UsageError

TRAIN, VAL, META = "train.bin", "val.bin", "meta.json"
VOCABULARY = "tokenizer.tiktoken"  # of an own tokenizer
TOKEN_DTYPE = np.dtype("<u2")
IGNORED_TARGET = -1
_EPOCHS = 2**31  # practically endless, and within grain's integers for any batch size

_Record = typing.TypeVar("_Record")
Ids = npt.NDArray[np.uint16]
Batch = npt.NDArray[np.int32]


@dataclass(frozen=True)
class FileMeta:
    """One token file: its number of ids, the UTF-8 bytes of their text (without end-of-text), documents, sha256."""

    tokens: int
    bytes: int
    documents: int
    sha256: str


@dataclass(frozen=True)
class Meta:
    """The contents of meta.json.

    `validation_fraction` is None if the corpus has its own validation text. `tokenizer_sha256` is that of VOCABULARY,
    None for GPT-2's.
    """

    tokenizer: str
    vocab_size: int
    source: str
    source_sha256: str
    validation_fraction: float | None
    train: FileMeta
    val: FileMeta
    tokenizer_sha256: str | None = None

    def is_of(self, source: str, validation_fraction: float) -> bool:
        """Whether the files were made of this corpus with this split."""
        fraction = None if source in WITH_OWN_VALIDATION else validation_fraction
        return same_corpus(self.source, source) and self.validation_fraction == fraction

    def fits_files(self, directory: Path) -> bool:
        """Whether both token files exist and have the recorded size, and there is the vocabulary that they need."""
        files = {directory / TRAIN: self.train, directory / VAL: self.val}
        size = TOKEN_DTYPE.itemsize
        if self.tokenizer != "gpt2" and not (directory / VOCABULARY).is_file():
            return False
        return all(path.is_file() and path.stat().st_size == size * file.tokens for path, file in files.items())


def read_meta(directory: Path) -> Meta | None:
    """Reads `directory`/meta.json; None if it does not exist. Raises UsageError if it is not as jaxlm writes it."""
    path = directory / META
    if not os.path.isfile(path):
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        files = {name: _typed(FileMeta, fields[name]) for name in ("train", "val")}
        return _typed(Meta, {"tokenizer_sha256": None} | fields | files)
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}): check the file") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UsageError(
            f"{path} is not as jaxlm writes it: move it away, and set --config.data.dir={directory} to use the tokens"
            " beside it"
        ) from error


def _typed(cls: type[_Record], fields: dict[str, Any]) -> _Record:
    """`cls(**fields)`. Raises TypeError or KeyError if a name or type is not that of `cls`."""
    for name, kind in typing.get_type_hints(cls).items():
        if not isinstance(fields[name], kind):
            raise TypeError(name)
    return cls(**fields)


@dataclass(frozen=True)
class TokenFiles:
    """The token ids of a corpus, memory-mapped and read-only.

    `token_bytes` [V] is the number of UTF-8 bytes of each token, 0 for end-of-text. `sha256` holds the hashes of
    train.bin and val.bin. `meta` is None for files without meta.json.
    """

    directory: Path
    tokenizer: Tokenizer
    train: Ids
    val: Ids
    token_bytes: npt.NDArray[np.uint8]
    sha256: tuple[str, str]
    meta: Meta | None

    def text_bytes(self, targets: Ids | Batch) -> int:
        """The UTF-8 bytes of `targets`, of any shape. IGNORED_TARGET has none: it indexes the end-of-text id."""
        return int(self.token_bytes[targets].sum(dtype=np.int64))


def bits_per_byte(loss: float, targets: int, text_bytes: int) -> float:
    """Converts the mean loss of `targets` tokens, in nats, to bits per byte of their text; no text counts as a byte."""
    return float(loss / np.log(2) * targets / max(text_bytes, 1))


def open_tokens(directory: Path, vocab_size: int, context: int, tokenizer: str = "gpt2") -> TokenFiles:
    """Opens and checks the files of `directory`. Without meta.json, they are taken as GPT-2 tokens of `vocab_size`.

    Raises UsageError if a file is missing, does not fit `vocab_size` or its meta.json, holds fewer than `context` + 1
    tokens, holds no text to validate on, or is known to be something else (see `refuse_foreign`).
    """
    for path in (directory / TRAIN, directory / VAL):
        if not os.path.isfile(path):
            raise UsageError(f"{path} is missing: {PREPARE}")
    meta = read_meta(directory)
    train, val = (_open_ids(directory / name, vocab_size, meta) for name in (TRAIN, VAL))
    if meta is None and tokenizer != "gpt2":
        raise UsageError(
            f"{directory} has no {META}, so its tokens are GPT-2's: set --config.data.tokenizer=gpt2, or"
            " --config.data.dir to tokens that jaxlm.prepare --tokenizer own made"
        )
    if meta and (meta.tokenizer, meta.vocab_size) != (tokenizer, vocab_size):
        flags = [f"--config.data.tokenizer={meta.tokenizer}"] * (meta.tokenizer != tokenizer)
        flags += [f"--config.model.vocab_size={meta.vocab_size}"] * (meta.vocab_size != vocab_size)
        raise UsageError(
            f"{directory} was prepared with tokenizer {meta.tokenizer} of {meta.vocab_size} tokens, not {tokenizer} of"
            f" {vocab_size}: set {' '.join(flags)} or prepare the text again"
        )
    opened = _open_tokenizer(directory, vocab_size, meta)
    sha256 = hashlib.sha256(train.data).hexdigest(), hashlib.sha256(val.data).hexdigest()
    if meta and (meta.train.sha256, meta.val.sha256) != sha256:
        raise UsageError(
            f"the token files in {directory} do not match {META}: restore them, or move {META} away and set"
            f" --config.data.dir={directory} to use them as they are"
        )
    for path, ids in ((directory / TRAIN, train), (directory / VAL, val)):
        if len(ids) < context + 1:
            raise UsageError(
                f"{path} holds {len(ids)} tokens, fewer than a sequence of {context + 1}: use more text, a smaller "
                f"--config.model.context{' or a larger --config.data.val_fraction' * (path.name == VAL)}"
            )
        if (largest := int(ids.max())) >= vocab_size:
            in_gpt2 = largest < GPT2_VOCAB_SIZE
            raise UsageError(
                f"{path} has token id {largest}, outside the vocabulary of {vocab_size}: "
                + (f"set --config.model.vocab_size={GPT2_VOCAB_SIZE}" if in_gpt2 else PREPARE)
            )
    token_bytes = np.array([*map(len, opened.vocabulary[:-1]), 0], np.uint8)
    files = TokenFiles(directory, opened, train, val, token_bytes, sha256, meta)
    if not files.text_bytes(val[1:]):
        raise UsageError(f"{directory / VAL} holds no text after its first token: use more text")
    return files


def _open_tokenizer(directory: Path, vocab_size: int, meta: Meta | None) -> Tokenizer:
    """The tokenizer of the files in `directory`. Raises UsageError if VOCABULARY is not what `meta` says."""
    file = directory / VOCABULARY
    if meta is None and os.path.lexists(file):
        raise UsageError(f"{file} is not GPT-2's vocabulary, and {META} is missing beside it: restore it, or {PREPARE}")
    if meta is None or meta.tokenizer == "gpt2":
        return load_tokenizer(vocab_size)
    try:
        raw = file.read_bytes()
        if hashlib.sha256(raw).hexdigest() != meta.tokenizer_sha256:
            raise ValueError("it does not match")
        tokenizer = from_bytes(raw)
        if tokenizer.vocab_size != vocab_size:
            raise ValueError("it has another size")
        return tokenizer
    except OSError as error:
        raise UsageError(f"cannot read {file} ({error.strerror}): restore it, or prepare the text again") from error
    except ValueError as error:
        raise UsageError(
            f"{file} is not the vocabulary of {META}: restore it, or delete it and prepare the text again"
        ) from error


def _open_ids(path: Path, vocab_size: int, meta: Meta | None) -> Ids:
    try:
        if meta is None:
            refuse_foreign(path, vocab_size)
        size = path.stat().st_size
        if size == 0 or size % TOKEN_DTYPE.itemsize:
            raise UsageError(f"{path} is {size} bytes, not a file of 2-byte tokens: {PREPARE}")
        return np.memmap(path, TOKEN_DTYPE, mode="r")
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}): check the file") from error


def train_batch_stream(
    ids: Ids, context: int, batch_size: int, seed: int, start_batch: int = 0, rows: slice = slice(None)
) -> Iterator[Batch]:
    """An endless stream of batches [batch_size, context + 1] from number `start_batch` on, prefetched by a thread.

    Only `rows` of each batch are read and returned. Batch n is a pure function of the arguments and n. The ids are cut
    into windows of `context` + 1, which overlap by one. Each epoch visits all windows in a new random order, so that
    each token is a target once, but for the first and the last (len(ids) - 1) % context, which never are. A batch may
    span two epochs. `seed` is 0 to 2**32 - 1.
    """
    import grain  # imported here because it takes more than a second

    def windows(indices: npt.NDArray[np.int64]) -> Batch:
        return np.stack([ids[i * context : (i + 1) * context + 1].astype(np.int32) for i in indices[rows].tolist()])

    order = grain.MapDataset.range((len(ids) - 1) // context).shuffle(seed=seed).repeat(_EPOCHS)
    batches = order.batch(batch_size)[start_batch:].map(windows)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def val_batches(ids: Ids, context: int, batch_size: int, limit: int = 0) -> Iterator[tuple[Batch, Batch]]:
    """Inputs and targets, [batch_size, context] each. With `limit` 0, every token but the first is a target once.

    A positive `limit` selects at most that many sequences of `context` tokens, evenly spaced: the first and, if any
    is left out, never the last. The last sequence of the text and the last batch are padded with input 0 and target
    IGNORED_TARGET.
    """
    available = -(-(len(ids) - 1) // context)
    count = min(limit or available, available)
    for first in range(0, count, batch_size):
        inputs = np.zeros((batch_size, context), np.int32)
        targets = np.full((batch_size, context), IGNORED_TARGET, np.int32)
        for row in range(min(batch_size, count - first)):
            start = (first + row) * available // count * context
            window = ids[start : start + context + 1]
            inputs[row, : len(window) - 1] = window[:-1]
            targets[row, : len(window) - 1] = window[1:]
        yield inputs, targets
