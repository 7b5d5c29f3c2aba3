"""Readers of text files: a stream of documents in bounded memory."""

import gzip
import importlib
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TextIO

from jaxlm.data.tokenizer import END_OF_TEXT
from jaxlm.errors import UsageError

READABLE = ".txt, .jsonl (each also as .gz, .xz or .zst) and .parquet"
CHUNK_CHARACTERS = 1 << 18
_LONGEST_CHUNK = 1 << 19  # tiktoken fails on a million spaces
_LAST_BREAK = re.compile(r".*\S(?=[ \r\n])", re.DOTALL)


class TextChunk(NamedTuple):
    """A part of a document, never empty. The document ends where a chunk starts the next one.

    Chunks are cut between a non-space and a space or line end. No token of GPT-2 crosses such a boundary, so the
    concatenated ids of the chunks are the ids of the document.
    """

    text: str
    starts_document: bool


def read_chunks(paths: Iterable[Path]) -> Iterator[TextChunk]:
    """The documents of all files, in order.

    A .txt file is one document, or several separated by END_OF_TEXT and the line breaks around it. Each line of a
    .jsonl file or row of a .parquet file is a document, with its text under the key or in the column `text`. Files are
    UTF-8. A byte order mark at the start is skipped; all else, including line ends, is preserved.

    Raises UsageError for a file that cannot be read, is of another kind, is not UTF-8 or contains no text.
    """
    for path in paths:
        chunk = None
        try:
            for chunk in _read_file(path):
                yield chunk
        except UsageError:
            raise
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{path} is not UTF-8 text: convert it first, for example with iconv -f latin1 -t utf-8"
            ) from error
        except _reading_errors(path) as error:
            reason = getattr(error, "strerror", None) or f"damaged or incomplete, {error}"
            raise UsageError(f"cannot read {path} ({reason}): check the file") from error
        if chunk is None:
            raise UsageError(f"{path} contains no text: choose another file")


def read_text(stream: TextIO) -> Iterator[TextChunk]:
    """The documents of a .txt file that was opened without newline translation; see `read_chunks`.

    To bound memory, half a million characters without a place to cut are cut anyway. A token may be split there.
    """
    text, starts_document, blank = "", True, ""
    while block := stream.read(CHUNK_CHARACTERS):
        *finished, text = (text + block).split(END_OF_TEXT)
        for document in finished:
            if document := document.lstrip(blank).rstrip("\r\n"):
                yield TextChunk(document, starts_document)
            starts_document, blank = True, "\r\n"
        text = text.lstrip(blank)
        if cut := _last_cut(text):
            yield TextChunk(text[:cut], starts_document)
            text, starts_document, blank = text[cut:], False, ""
    if text:
        yield TextChunk(text, starts_document)


def _last_cut(text: str) -> int:
    """The last index at which `text` can be cut, or 0. It is never inside the beginning of an END_OF_TEXT."""
    if match := _LAST_BREAK.match(text):
        return match.end()
    return len(text) - len(END_OF_TEXT) if len(text) > _LONGEST_CHUNK else 0


def _read_file(path: Path) -> Iterator[TextChunk]:
    kind = path.with_suffix("").suffix if path.suffix in (".gz", ".xz", ".zst") else path.suffix
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
    elif kind in (".txt", ".jsonl"):
        with _open_text(path) as stream:
            yield from read_text(stream) if kind == ".txt" else _read_jsonl(path, stream)
    else:
        raise UsageError(f"{path} is not a file type that can be read: use {READABLE}")


def _open_text(path: Path) -> TextIO:
    openers: dict[str, Callable[[Path], Any]] = {
        ".gz": gzip.open,
        ".xz": lzma.open,
        ".zst": lambda path: _zstd_module(path).open(path),
    }
    return io.TextIOWrapper(openers.get(path.suffix, io.FileIO)(path), encoding="utf-8-sig", newline="\n")


def _zstd_module(path: Path) -> ModuleType:
    for name in ("compression.zstd", "backports.zstd"):  # Python 3.14 and later; earlier ones
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise UsageError(f"reading {path} needs zstd: pip install backports.zstd, or unpack the file")


def _reading_errors(path: Path) -> tuple[type[Exception], ...]:
    errors = (OSError, EOFError, lzma.LZMAError, zlib.error)
    return (*errors, _zstd_module(path).ZstdError) if path.suffix == ".zst" else errors


def _read_jsonl(path: Path, stream: TextIO) -> Iterator[TextChunk]:
    for number, line in enumerate(stream, start=1):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}, line {number} is not JSON ({error}): correct or remove the line") from error
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UsageError(f"{path}, line {number} has no text under `text`: add it or remove the line")
        if text:
            text = text.encode(errors="replace").decode()  # "?" for lone surrogates, which only JSON allows
            yield TextChunk(text, starts_document=True)


def _read_parquet(path: Path) -> Iterator[TextChunk]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(f'reading {path} needs pyarrow: pip install "jaxlm[parquet]"') from error
    try:
        with path.open("rb") as stream:  # pyarrow accepts only UTF-8 paths
            file = pyarrow.parquet.ParquetFile(stream)
            if "text" not in (names := file.schema_arrow.names):
                raise UsageError(f"{path} has no column `text`, only {', '.join(names)}: rename one")
            batches = file.iter_batches(batch_size=1024, columns=["text"])
            texts = itertools.chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
            for number, text in enumerate(texts, start=1):
                if not isinstance(text, str):
                    raise UsageError(f"{path}, row {number} has no text in its column `text`: remove the row")
                if text:
                    yield TextChunk(text, starts_document=True)
    except pyarrow.ArrowException as error:
        raise UsageError(f"{path} is not a valid parquet file: check it") from error
