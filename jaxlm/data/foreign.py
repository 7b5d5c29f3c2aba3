"""Recognises token files of other programs and of other kinds."""

import re
import shlex
import zipfile
import zlib
from pathlib import Path

import numpy as np

from jaxlm.data.tokenizer import GPT2_VOCAB_SIZE
from jaxlm.errors import UsageError

PREPARE = "prepare its text with python -m jaxlm.prepare --corpus TEXT --out FOLDER, and name that folder"
_HEADER_BYTES = 1024  # 256 numbers of 32 bits: magic, version, number of tokens, zeros
_LLM_C, _LLAMA_3 = (number.to_bytes(4, "little") for number in (20240520, 20240801))
_MAGICS = {b"\x93NUMPY": "a NumPy array", b"\xfd7zXZ\0": "xz data", b"\x28\xb5\x2f\xfd": "zstd data"}
_SMALLEST = 128  # bytes; shorter files follow no rule
_CONTROL = re.compile(r"[\0-\x08\x0b\x0c\x0e-\x1f\x7f]")


def refuse_foreign(path: Path, vocab_size: int) -> None:
    """Raises UsageError, which says what `path` is, if it is no file of GPT-2's ids in 16 bits. Nothing is unpickled.

    No rule fits a file of GPT-2's ids:
    - `meta.pkl` is beside it: nanoGPT writes that for ids of another vocabulary.
    - It starts as a known format does: an id above GPT-2's, three ids in a fixed order, or data that unpacks.
    - A header of 256 numbers ends in zeros, or every second id is 0. Id 0 is "!", and GPT-2 merges "!!".
    - It starts with a kilobyte of text. Half of each frequent id, its high byte, is a control character.
    - No id is above 255, with the whole vocabulary: no two bytes are merged.

    Raises OSError if the file cannot be read.
    """
    if path.with_name("meta.pkl").exists():
        raise UsageError(
            f"meta.pkl is beside {path}, as in nanoGPT's character-level example: its ids are not GPT-2's: {PREPARE}"
        )
    with path.open("rb") as file:
        head = file.read(_HEADER_BYTES)
    if head.startswith(_LLM_C):
        command = f"tail -c +{_HEADER_BYTES + 1} {shlex.quote(str(path))} > FOLDER/{path.name}"
        raise UsageError(f"{path} has the header of llm.c and modded-nanogpt: remove it with {command}")
    if kind := _kind(path, head, vocab_size):
        raise UsageError(f"{path} is {kind}, not GPT-2's tokens in 16 bits each: {PREPARE}")


def _kind(path: Path, head: bytes, vocab_size: int) -> str:
    """What a file is; empty if it can be GPT-2's ids. `head` is its first kilobyte."""
    magic_kinds = [kind for magic, kind in _MAGICS.items() if head.startswith(magic)]
    if magic_kinds or len(head) < _SMALLEST:
        return "".join(magic_kinds)
    ids = np.memmap(path, "<u2", mode="r", shape=path.stat().st_size // 2)
    first, second = ids[::2].max(), ids[1::2].max()
    kinds = {
        "a zip archive": head.startswith(b"PK\3\4") and zipfile.is_zipfile(path),
        "gzip data": _is_gzip(head),
        "text": _is_text(head),
        "llm.c's tokens of Llama 3": head.startswith(_LLAMA_3),
        "nothing but zeros": first == second == 0,
        "a file with a header of 256 numbers": len(head) == _HEADER_BYTES and not any(head[16:]),
        "a file of 32-bit or 64-bit numbers": first == 0 or second == 0,
        "a file of single characters or bytes": vocab_size == GPT2_VOCAB_SIZE and max(first, second) < 256,
    }
    return next((kind for kind, fits in kinds.items() if fits), "")


def _is_gzip(head: bytes) -> bool:
    try:
        return head.startswith(b"\x1f\x8b\x08") and bool(zlib.decompressobj(wbits=31).decompress(head))
    except zlib.error:
        return False


def _is_text(head: bytes) -> bool:
    """Whether `head` is UTF-8, but for a last character that is cut, without control characters."""
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if len(head) - error.start > 3:
            return False
        text = head[: error.start].decode()
    return not _CONTROL.search(text)
