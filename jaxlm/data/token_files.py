"""Token files: what they are, what fits, and the batches they give. data/README.md describes the format."""

import dataclasses
import hashlib
import itertools
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
_EPOCHS = 2**31  # no end, but one that grain can count to, whatever the batch size

_Said = typing.TypeVar("_Said")
Ids = npt.NDArray[np.uint16]
Batch = npt.NDArray[np.int32]


@dataclass(frozen=True)
class FileMeta:
    """One token file: ids in it, UTF-8 bytes of text they stand for (without end-of-text marks), documents, sha256."""

    tokens: int
    bytes: int
    documents: int
    sha256: str


@dataclass(frozen=True)
class Meta:
    """What meta.json says; `validation_fraction` is None where the corpus brings its own validation text."""

    tokenizer: str
    vocab_size: int
    source: str
    source_sha256: str
    validation_fraction: float | None
    train: FileMeta
    val: FileMeta

    def fits_files(self, directory: Path) -> bool:
        """Whether both token files are there in the size that this says."""
        sizes = {TRAIN: self.train.tokens, VAL: self.val.tokens}
        paths = {directory / name: tokens * TOKEN_DTYPE.itemsize for name, tokens in sizes.items()}
        return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def read_meta(directory: Path) -> Meta | None:
    """What `directory`/meta.json says, None without one. Raises UsageError when it is no meta.json of ours."""
    path = directory / META
    if not os.path.isfile(path):
        return None
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        files = {name: _typed(FileMeta, said[name]) for name in ("train", "val")}
        return _typed(Meta, said | files)
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}): check the file") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UsageError(f"{path} is damaged: delete {directory} and prepare it again") from error


def _typed(cls: type[_Said], said: dict[str, Any]) -> _Said:
    """`cls(**said)`. Raises TypeError when a name or the type of a value is not that of a field."""
    for name, kind in typing.get_type_hints(cls).items():
        if not isinstance(said[name], kind):
            raise TypeError(name)
    return cls(**said)


@dataclass(frozen=True)
class TokenFiles:
    """Token ids of a corpus, read-only and memory-mapped.

    `val_bytes` counts the UTF-8 bytes of the validation tokens that are predicted, which are all but the first.
    `sha256` is of the contents of train.bin and val.bin. `meta` is None for files from elsewhere.
    """

    directory: Path
    train: Ids
    val: Ids
    val_bytes: int
    sha256: tuple[str, str]
    meta: Meta | None

    def bits_per_byte(self, val_loss: float) -> float:
        """Bits per byte of a mean loss per predicted validation token, in nats."""
        return val_loss / np.log(2) * (len(self.val) - 1) / self.val_bytes


def open_tokens(directory: Path, vocab_size: int, context: int) -> TokenFiles:
    """Opens train.bin and val.bin; without meta.json they are taken for GPT-2 tokens of `vocab_size`.

    Reads the files once, to check them. Raises UsageError when one is missing, does not fit `vocab_size` or its
    meta.json, holds less than one window of `context` + 1 tokens, or no text to validate on.
    """
    train, val = _open_ids(directory / TRAIN), _open_ids(directory / VAL)
    meta = read_meta(directory)
    if meta and (meta.tokenizer, meta.vocab_size) != (TOKENIZER_NAME, vocab_size):
        raise UsageError(
            f"{directory} was prepared with tokenizer {meta.tokenizer} of {meta.vocab_size} tokens, not "
            f"{TOKENIZER_NAME} of {vocab_size}: set the model's vocabulary to match or prepare the text again"
        )
    sha256 = hashlib.sha256(train.data).hexdigest(), hashlib.sha256(val.data).hexdigest()
    if meta and (meta.train.sha256, meta.val.sha256) != sha256:
        raise UsageError(f"the token files in {directory} are not those that {META} tells of: delete and prepare again")
    for path, ids in ((directory / TRAIN, train), (directory / VAL, val)):
        if len(ids) < context + 1:
            raise UsageError(
                f"{path} holds {len(ids)} tokens, less than one window of {context + 1}: use more text or less context"
            )
        if (largest := int(ids.max())) >= vocab_size:
            raise UsageError(
                f"{path} has token id {largest}, above the vocabulary of {vocab_size}: raise the model's vocabulary "
                "or prepare the text again"
            )
    val_bytes = _text_bytes(val[1:], vocab_size)
    if not val_bytes:
        raise UsageError(f"{directory / VAL} holds no text after its first token: use more text")
    return TokenFiles(directory, train, val, val_bytes, sha256, meta)


def _open_ids(path: Path) -> Ids:
    if not os.path.isfile(path):
        raise UsageError(f"{path} is missing: make it with python -m jaxlm.prepare --corpus TEXT --out {path.parent}")
    size = path.stat().st_size
    if size == 0 or size % TOKEN_DTYPE.itemsize:
        raise UsageError(f"{path} is {size} bytes, not a file of 2-byte tokens: delete it and prepare again")
    try:
        return np.memmap(path, TOKEN_DTYPE, mode="r")
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}): check the file") from error


def _text_bytes(ids: Ids, vocab_size: int) -> int:
    tokenizer = load_tokenizer(vocab_size)
    uses = np.bincount(ids, minlength=vocab_size)
    uses[tokenizer.end_of_text] = 0
    return int(uses @ np.array([len(token) for token in tokenizer.vocabulary]))


@dataclass(frozen=True)
class _Windows:
    """Windows of `context` + 1 ids, each beginning on the last id of the one before; a grain data source."""

    ids: Ids
    context: int

    def __len__(self) -> int:
        return (len(self.ids) - 1) // self.context

    def __getitem__(self, index: int) -> Batch:
        start = index * self.context
        return self.ids[start : start + self.context + 1].astype(np.int32)


def train_batch_stream(ids: Ids, context: int, batch_size: int, seed: int, start_batch: int = 0) -> Iterator[Batch]:
    """Batches `start_batch`, `start_batch` + 1, ... without end, [batch_size, context + 1], read ahead by a thread.

    Batch n is a pure function of the arguments and n. The text is cut into windows of `context` + 1 tokens, so that
    each token is a target once; each epoch goes through all windows in an order of its own, and the next follows
    without a gap, inside a batch if need be. `seed` is 0 to 2**32 - 1.
    """
    import grain  # takes more than a second

    windows = grain.MapDataset.source(_Windows(ids, context)).shuffle(seed=seed).repeat(_EPOCHS)
    batches = windows.batch(batch_size)[start_batch:]
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def val_batches(ids: Ids, context: int, batch_size: int, limit: int = 0) -> Iterator[tuple[Batch, Batch]]:
    """Inputs and targets, [batch_size, context] each, in which every token but the first is a target once.

    `limit` takes at most that many windows of `context` tokens, evenly spread; 0 takes all. Past the end of the text
    and past the last window, inputs are 0 and targets IGNORED_TARGET.
    """
    windows = -(-(len(ids) - 1) // context)
    taken = min(limit or windows, windows)
    starts = (index * windows // taken * context for index in range(taken))
    while batch := list(itertools.islice(starts, batch_size)):
        inputs = np.zeros((batch_size, context), np.int32)
        targets = np.full((batch_size, context), IGNORED_TARGET, np.int32)
        for row, start in enumerate(batch):
            window = ids[start : start + context + 1]
            inputs[row, : len(window) - 1] = window[:-1]
            targets[row, : len(window) - 1] = window[1:]
        yield inputs, targets


def data_directory(config: Config) -> Path:
    """Where the token files of the config are, or will be."""
    name = re.sub(r"\W+", "-", config.data.corpus).strip("-")[:60]
    return Path(config.data.dir or Path("data", f"{name}-{config.model.vocab_size}"))
