"""Readers of text files: a stream of documents in bounded memory."""

import codecs
import gzip
import importlib
import io
import itertools
import json
import lzma
import os
import re
import shlex
import string
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple, TextIO

from jaxlm.data.tokenizer import END_OF_TEXT
from jaxlm.errors import LONGEST_LINE, UsageError

READABLE = ".txt, .md, .jsonl (each also as .gz, .xz or .zst) and .parquet"
CHUNK_CHARACTERS = 1 << 18
_LONGEST_CHUNK = 1 << 19  # characters; bounds the memory that text without spaces takes
_ENCODINGS = {  # by the mark at the start; that of UTF-32 can start with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_HEAD_BYTES = 1 << 12
_UNPACKERS = {".gz": "gzip", ".xz": "xz", ".zst": "zstd"}
_PLAIN_KINDS = (".txt", ".md")
_WINDOWS_SHARE = 8  # at most one character in so many is beyond ASCII in text of a Latin alphabet
_OTHERS = re.compile(r"[\udc80-\udcff]+")  # bytes that are not UTF-8, as "surrogateescape" decodes them
_OTHER_WORD = re.compile(r"\S{,20}[\udc80-\udcff]\S{,20}")
_CONTROL = re.compile(r"[\0-\x08\x0e-\x19\x1b-\x1f]")  # not in text, but for white space and DOS's end of file
_LAST_BREAK = re.compile(r".*\S(?=[ \r\n])", re.DOTALL)


class TextChunk(NamedTuple):
    """A part of a document, never empty. The document ends where a chunk starts the next one.

    Chunks are cut between a non-space and a space or line end. No token of GPT-2 crosses such a boundary, so the
    concatenated ids of the chunks are the ids of the document.
    """

    text: str
    starts_document: bool


def is_readable(path: Path) -> bool:
    """Whether `read_chunks` reads files of this kind, by the end of the name. Upper and lower case are the same."""
    kind, packer = _kind(path)
    return kind in (*_PLAIN_KINDS, ".jsonl") or (kind == ".parquet" and not packer)


def read_chunks(paths: Iterable[Path], windows: dict[Path, str] | None = None) -> Iterator[TextChunk]:
    """The documents of all files, in order.

    A .txt or .md file is one document, or several separated by END_OF_TEXT and the line breaks around it. Each line of
    a .jsonl file or row of a .parquet file is a document, with its text under the key or in the column `text`. Files
    are UTF-8. In .txt and .md files the bytes that are not UTF-8 are read as Windows-1252, unless they are too many for
    that; `windows` gets the first word with such a byte of each of these files. A byte order mark at the start is
    skipped; all else, including line ends, is preserved. A stray NUL is too, but text in which more than one character
    in a hundred is NUL is another encoding or no text.

    Raises UsageError, after the last file, if files cannot be read, are of another kind or encoding or contain no text.
    It names each of them.
    """
    problems = {}
    for path in paths:
        try:
            yield from _read_whole(path, {} if windows is None else windows)
        except UsageError as error:
            problems[path] = str(error)
    if problems:
        raise UsageError(_all_of(problems))


def _all_of(problems: Mapping[Path, str]) -> str:
    """The problems of all files in one message. If it would be too long, only the first or none has its advice."""
    full = [*problems.values()]
    if len(full) == 1:
        return full[0]
    short = [text[: text.find(": ", text.find(str(path)) + len(str(path)))] for path, text in problems.items()]
    lines = [f"{len(full)} files cannot be read: {'; '.join(texts)}" for texts in (full, full[:1] + short[1:], short)]
    return next((line for line in lines if len(line) <= LONGEST_LINE), lines[-1])


def _read_whole(path: Path, windows: dict[Path, str]) -> Iterator[TextChunk]:
    characters = nulls = 0
    try:
        for chunk in _read_file(path, windows):
            characters += len(chunk.text)
            nulls += chunk.text.count("\0")
            yield chunk
    except UsageError:
        raise
    except UnicodeDecodeError as error:
        other = "if it has another encoding than Latin-1, name that in place of latin1"
        raise UsageError(f"{path} is not UTF-8 text: {other}, and {_conversion(path, 'latin1')}") from error
    except _reading_errors(path) as error:
        reason = getattr(error, "strerror", None) or f"damaged or incomplete, {error}"
        raise UsageError(f"cannot read {path} ({reason}): check the file") from error
    if not characters:
        raise UsageError(f"{path} contains no text: choose another file")
    if _many(nulls, characters):
        raise UsageError(f"{path} has {nulls:,} NUL characters of {characters:,}: remove them or choose other text")


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


def _document(text: str) -> Iterator[TextChunk]:
    """A document in one chunk or, if it is long, cut as `read_text` cuts a file of it."""
    start, size = 0, CHUNK_CHARACTERS
    for end in range(size, len(text) + size, size) if len(text) > size else ():
        if cut := _last_cut(text[start:end]):
            yield TextChunk(text[start : start + cut], start == 0)
            start += cut
    if text:
        yield TextChunk(text[start:], start == 0)


def _many(nulls: int, size: int) -> bool:
    return nulls > max(1, size // 100)


def _conversion(path: Path, encoding: str) -> str:
    """The advice to convert a file, with the command, which keeps the original under another name."""
    names = itertools.chain([f"{path}.{encoding}"], (f"{path}.{encoding}-{n}" for n in itertools.count(2)))
    kept = next(name for name in names if not os.path.lexists(name))
    new, old, convert = shlex.quote(str(path)), shlex.quote(kept), f"iconv -f {encoding} -t UTF-8"
    packer = _UNPACKERS.get(_kind(path)[1])
    command = f"{packer} -dc < {old} | {convert} | {packer} > {new}" if packer else f"{convert} < {old} > {new}"
    return f"convert it with mv {new} {old} && {command}"


def _refuse_encoding(path: Path, stream: BinaryIO) -> None:
    """Raises UsageError if the file is UTF-16 or UTF-32, by its mark or by many NULs at its start."""
    head = stream.read(_HEAD_BYTES)
    stream.seek(0)
    for mark, encoding in _ENCODINGS.items():
        if head.startswith(mark):
            raise UsageError(f"{path} is {encoding}, not UTF-8 text: {_conversion(path, encoding)}")
    if _many(head.count(0), len(head)):
        order, end = ("LE", head) if head[1::2].count(0) >= head[::2].count(0) else ("BE", head[::-1])
        encoding = f"UTF-{16 if any(byte > 16 for byte in end[2::4]) else 32}{order}"  # characters end at 0x10FFFF
        raise UsageError(
            f"{path} has NUL bytes as {encoding} and files that are not text have: if it is text,"
            f" {_conversion(path, encoding)}"
        )


def _kind(path: Path) -> tuple[str, str]:
    """The ends of a file's name that say what it holds and how it is compressed, in lower case."""
    lower = Path(path.name.lower())
    return (Path(lower.stem).suffix, lower.suffix) if lower.suffix in _UNPACKERS else (lower.suffix, "")


def _read_file(path: Path, windows: dict[Path, str]) -> Iterator[TextChunk]:
    kind, packer = _kind(path)
    if not is_readable(path):
        raise UsageError(f"{path} is not a file type that can be read: use {READABLE}")
    if kind == ".parquet":
        yield from _read_parquet(path)
        return
    openers: dict[str, Callable[[Path], Any]] = {
        ".gz": gzip.open,
        ".xz": lzma.open,
        ".zst": lambda path: _zstd_module(path).open(path),
    }
    with openers.get(packer, io.FileIO)(path) as stream:
        _refuse_encoding(path, stream)
        if kind == ".jsonl":
            yield from _read_jsonl(path, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="\n"))
            return
        text = _WindowsText(stream, encoding="utf-8-sig", errors="surrogateescape", newline="\n")
        yield from read_text(text)
        text.check()
        if text.example:
            windows[path] = text.example


class _WindowsText(io.TextIOWrapper):
    """Text in UTF-8 whose other bytes are read as Windows-1252. It is opened with `errors="surrogateescape"`.

    `example` is the first word with such a byte; empty if there is none.
    """

    characters = others = 0
    example = ""

    def read(self, size: int | None = -1, /) -> str:
        """As for any text. Raises UnicodeDecodeError for a byte that is not in Windows-1252 either."""
        text = super().read(size)
        self.characters += len(text)
        if _is_utf8(text):
            return text
        others = "".join(_OTHERS.findall(text)).encode(errors="surrogateescape")
        if _CONTROL.search(text):
            raise UnicodeDecodeError("utf-8", others, 0, 1, "control characters are beside it")
        self.others += len(others)
        if not self.example and (word := _OTHER_WORD.search(text)):
            self.example = _windows(word[0]).strip(string.punctuation)
        if 2 * len(others) >= len(text) - len(text.encode("ascii", "ignore")):  # the rest is UTF-8 by chance
            return _windows(text)
        return _OTHERS.sub(lambda match: _windows(match[0]), text)

    def check(self) -> None:
        """Raises UnicodeDecodeError if there were more such bytes than Windows-1252 explains."""
        if self.others > 1 + self.characters // _WINDOWS_SHARE:
            raise UnicodeDecodeError("utf-8", b"", 0, 0, "too many bytes are not UTF-8")


def _windows(text: str) -> str:
    """The text again, with all bytes read as Windows-1252. Raises UnicodeDecodeError for one that it lacks."""
    return text.encode(errors="surrogateescape").decode("cp1252")


def _is_utf8(text: str) -> bool:
    """Whether all of a text that was read with "surrogateescape" was UTF-8."""
    try:
        text.encode()  # much faster than a search
    except UnicodeEncodeError:
        return False
    return True


def _zstd_module(path: Path) -> ModuleType:
    for name in ("compression.zstd", "backports.zstd"):  # Python 3.14 and later; earlier ones
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise UsageError(f"reading {path} needs zstd: pip install backports.zstd, or unpack the file")


def _reading_errors(path: Path) -> tuple[type[Exception], ...]:
    errors = (OSError, EOFError, lzma.LZMAError, zlib.error)
    return (*errors, _zstd_module(path).ZstdError) if _kind(path)[1] == ".zst" else errors


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
        yield from _document(text.encode(errors="replace").decode())  # "?" for lone surrogates, which JSON allows


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
                yield from _document(text)
    except pyarrow.ArrowException as error:
        raise UsageError(f"{path} is not a valid parquet file: check it") from error
