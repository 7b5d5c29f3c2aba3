"""The files of a corpus: what paths, folders and patterns name, and what of it is skipped."""

import codecs
import fnmatch
import glob
import os
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.data.readers import is_readable
from jaxlm.errors import UsageError

_BLANK_BYTES = 1 << 12  # a larger file has text


class Found(NamedTuple):
    """The files that a source names: those with text, in order and each once, and by their reason those skipped.

    `missing` are the names of nothing, `unused` the patterns that exclude nothing.
    """

    files: tuple[Path, ...]
    skipped: Mapping[str, Sequence[Path]]
    missing: tuple[str, ...]
    unused: tuple[str, ...]


def find_files(source: str, exclude: Sequence[str] = ()) -> Found:
    r"""The files in `source`: a path that exists, or paths and patterns separated by commas (`\,` is one in a name).

    What exists is a path, and a folder means the files in it and in its folders, in the order of their names. A
    pattern is replaced by what it matches, in alphabetical order. A file that is named twice, also by another spelling
    or a link, counts where it is named first. Hidden files in a folder, empty files and those of other kinds are
    skipped, and those of which `exclude` matches the name, the path, or a folder below the named one.

    Raises UsageError if a folder cannot be read.
    """
    files: dict[Any, Path] = {}
    skipped: dict[str, list[Path]] = {}
    missing, used, seen = [], set(), set()
    for name in names_of(source):
        matched = [name] if os.path.lexists(name) else matches(name)
        missing += [name] * (not matched)
        for path, below in chain.from_iterable(map(_walk, matched)):
            if (identity := _identity(path)) in seen:
                continue
            seen.add(identity)
            excluding = [pattern for pattern in exclude if _matches_part(pattern, path, below)]
            used.update(excluding)
            if reason := "excluded" if excluding else _skip_reason(path, below):
                skipped.setdefault(reason, []).append(path)
            else:
                files[identity] = path
    unused = tuple(pattern for pattern in exclude if pattern not in used)
    return Found(tuple(files.values()), skipped, tuple(missing), unused)


def same_files(source: str, other: str) -> bool:
    """Whether two sources name the same files in the same order, those that are skipped aside."""
    first, second = find_files(source), find_files(other)
    identities = [[*map(_identity, found.files), *map(_identity, found.missing)] for found in (first, second)]
    return identities[0] == identities[1]


def some_names(paths: Collection[str | Path], most: int = 5) -> str:
    """The paths as a shell takes them; of more than `most` the first ones and how many others there are."""
    names, rest = [shlex.quote(str(path)) for path in paths], len(paths) - most
    return ", ".join(names[:most]) + f" and {rest} more" * (rest > 0)


def describe_skipped(skipped: Mapping[str, Sequence[Path]]) -> str:
    """The files that are skipped, counted and named by their reason."""
    return ", ".join(f"{len(paths)} {reason} ({some_names(paths)})" for reason, paths in skipped.items())


def names_of(source: str) -> list[str]:
    """The paths and patterns in a source, as `find_files` reads it."""
    if os.path.exists(source):
        return [source]
    return [name.strip().replace(r"\,", ",") for name in re.split(r"(?<!\\),", source)]


def matches(pattern: str) -> list[str]:
    """What a pattern matches, in alphabetical order."""
    return [] if "\0" in pattern else sorted(glob.glob(pattern, recursive=True))


def _walk(path: str) -> Iterator[tuple[Path, int]]:
    """A file, or the files in a folder in order, with how many of the last parts of their path are below it.

    A hidden folder and a link to a folder are given as they are, and none of their files. Raises UsageError if a folder
    cannot be read.
    """
    if not os.path.isdir(path):
        yield Path(path), 0
        return
    found = []
    for folder, folders, names in os.walk(path, onerror=_refuse_folder):
        closed = [name for name in folders if name.startswith(".") or os.path.islink(os.path.join(folder, name))]
        folders[:] = [name for name in folders if name not in closed]
        found += [Path(folder, name) for name in closed + names]
    depth = len(Path(path).parts)
    yield from ((file, len(file.parts) - depth) for file in sorted(found))


def _refuse_folder(error: OSError) -> None:
    raise UsageError(f"cannot read {error.filename} ({error.strerror}): check the folder") from error


def _matches_part(pattern: str, path: Path, below: int) -> bool:
    """Whether the pattern matches the name or the path of a file, or of a folder below the one that was named."""
    places = [path, *path.parents][: max(below, 1)]
    return any(fnmatch.fnmatchcase(text, pattern.rstrip("/")) for place in places for text in (place.name, str(place)))


def _skip_reason(path: Path, below: int) -> str:
    if below and path.name.startswith("."):
        return "hidden"
    if not is_readable(path) or (os.path.exists(path) and not os.path.isfile(path)):
        return "of another kind"
    return "empty" * _is_blank(path)


def _is_blank(path: Path) -> bool:
    """Whether a file has nothing but white space. False if it cannot be read: reading it says why."""
    try:
        if path.stat().st_size > _BLANK_BYTES:
            return False
        return not path.read_bytes().removeprefix(codecs.BOM_UTF8).strip()
    except OSError:
        return False


def _identity(path: str | Path) -> Any:
    """Equal for two paths of one file, as for `os.path.samefile`; for a missing file, its real path."""
    try:
        status = os.stat(path)
        return status.st_dev, status.st_ino
    except OSError:
        return os.path.realpath(path)
    except ValueError:  # no file can have that name
        return str(path)
