"""Token files and the batches read from them. data/README.md describes the format."""

import hashlib
import json
import os
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxlm.config import Config
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.errors import UsageError

TRAIN, VAL, META = "train.bin", "val.bin", "meta.json"
TOKEN_DTYPE = np.dtype("<u2")
TOKENIZER_NAME = "gpt2"
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
    """The contents of meta.json. `validation_fraction` is None if the corpus has its own validation text."""

    tokenizer: str
    vocab_size: int
    source: str
    source_sha256: str
    validation_fraction: float | None
    train: FileMeta
    val: FileMeta

    def fits_files(self, directory: Path) -> bool:
        """Whether both token files exist and have the recorded size."""
        files = {directory / TRAIN: self.train, directory / VAL: self.val}
        size = TOKEN_DTYPE.itemsize
        return all(path.is_file() and path.stat().st_size == size * file.tokens for path, file in files.items())


def read_meta(directory: Path) -> Meta | None:
    """Reads `directory`/meta.json; None if it does not exist. Raises UsageError if it is damaged."""
    path = directory / META
    if not os.path.isfile(path):
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        files = {name: _typed(FileMeta, fields[name]) for name in ("train", "val")}
        return _typed(Meta, fields | files)
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}): check the file") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UsageError(f"{path} is damaged: delete {directory} and prepare it again") from error


def _typed(cls: type[_Record], fields: dict[str, Any]) -> _Record:
    """`cls(**fields)`. Raises TypeError or KeyError if a name or type is not that of `cls`."""
    for name, kind in typing.get_type_hints(cls).items():
        if not isinstance(fields[name], kind):
            raise TypeError(name)
    return cls(**fields)


@dataclass(frozen=True)
class TokenFiles:
    """The token ids of a corpus, memory-mapped and read-only.

    `val_bytes` is the number of UTF-8 bytes of all validation tokens but the first, which is not predicted. `sha256`
    holds the hashes of train.bin and val.bin. `meta` is None for files without meta.json.
    """

    directory: Path
    train: Ids
    val: Ids
    val_bytes: int
    sha256: tuple[str, str]
    meta: Meta | None

    def bits_per_byte(self, val_loss: float) -> float:
        """Converts the mean validation loss, in nats per predicted token, to bits per byte."""
        return val_loss / np.log(2) * (len(self.val) - 1) / self.val_bytes


def open_tokens(directory: Path, vocab_size: int, context: int) -> TokenFiles:
    """Opens and checks train.bin and val.bin. Without meta.json, they are taken as GPT-2 tokens of `vocab_size`.

    Raises UsageError if a file is missing, does not fit `vocab_size` or its meta.json, holds fewer than `context` + 1
    tokens, or holds no text to validate on.
    """
    train, val = _open_ids(directory / TRAIN), _open_ids(directory / VAL)
    meta = read_meta(directory)
    if meta and (meta.tokenizer, meta.vocab_size) != (TOKENIZER_NAME, vocab_size):
        raise UsageError(
            f"{directory} was prepared with tokenizer {meta.tokenizer} of {meta.vocab_size} tokens, not "
            f"{TOKENIZER_NAME} of {vocab_size}: set model.vocab_size to match or prepare the text again"
        )
    sha256 = hashlib.sha256(train.data).hexdigest(), hashlib.sha256(val.data).hexdigest()
    if meta and (meta.train.sha256, meta.val.sha256) != sha256:
        raise UsageError(f"the token files in {directory} do not match {META}: delete them and prepare again")
    for path, ids in ((directory / TRAIN, train), (directory / VAL, val)):
        if len(ids) < context + 1:
            raise UsageError(
                f"{path} holds {len(ids)} tokens, fewer than a sequence of {context + 1}: use more text or less context"
            )
        if (largest := int(ids.max())) >= vocab_size:
            raise UsageError(
                f"{path} has token id {largest}, outside the vocabulary of {vocab_size}: raise model.vocab_size or "
                "prepare the text again"
            )
    val_bytes = _text_bytes(val[1:], vocab_size)
    if not val_bytes:
        raise UsageError(f"{directory / VAL} holds no text after its first token: use more text")
    return TokenFiles(directory, train, val, val_bytes, sha256, meta)


def _open_ids(path: Path) -> Ids:
    if not os.path.isfile(path):
        raise UsageError(f"{path} is missing: create it with python -m jaxlm.prepare --corpus TEXT --out {path.parent}")
    size = path.stat().st_size
    if size == 0 or size % TOKEN_DTYPE.itemsize:
        raise UsageError(f"{path} is {size} bytes, not a file of 2-byte tokens: delete it and prepare again")
    try:
        return np.memmap(path, TOKEN_DTYPE, mode="r")
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}): check the file") from error


def _text_bytes(ids: Ids, vocab_size: int) -> int:
    tokenizer = load_tokenizer(vocab_size)
    counts = np.bincount(ids, minlength=vocab_size)
    counts[tokenizer.end_of_text] = 0
    return int(counts @ np.array([len(token) for token in tokenizer.vocabulary]))


def train_batch_stream(ids: Ids, context: int, batch_size: int, seed: int, start_batch: int = 0) -> Iterator[Batch]:
    """An endless stream of batches [batch_size, context + 1] from number `start_batch` on, prefetched by a thread.

    Batch n is a pure function of the arguments and n. The ids are cut into windows of `context` + 1, which overlap by
    one, so that each token is a target once per epoch. Each epoch visits all windows in a new random order. A batch
    may span two epochs. `seed` is 0 to 2**32 - 1.
    """
    import grain  # imported here because it takes more than a second

    def window(index: int) -> Batch:
        return ids[index * context : (index + 1) * context + 1].astype(np.int32)

    order = grain.MapDataset.range((len(ids) - 1) // context).shuffle(seed=seed).repeat(_EPOCHS)
    batches = order.map(window).batch(batch_size)[start_batch:]
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def val_batches(ids: Ids, context: int, batch_size: int, limit: int = 0) -> Iterator[tuple[Batch, Batch]]:
    """Inputs and targets, [batch_size, context] each. Every token but the first is a target exactly once.

    A positive `limit` selects at most that many sequences of `context` tokens, evenly spaced. The last sequence and
    the last batch are padded with input 0 and target IGNORED_TARGET.
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


def data_directory(config: Config) -> Path:
    """The directory of the config's token files: `data.dir`, or one named after the corpus and vocabulary."""
    name = re.sub(r"\W+", "-", config.data.corpus).strip("-")[:60]
    return Path(config.data.dir or Path("data", f"{name}-{config.model.vocab_size}"))
