"""A small cache of JSON values in the user's cache directory: what was measured or checked on this machine."""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from jaxlm.storage import atomic


def directory() -> Path | None:
    """jaxlm's cache directory, created if missing; None if it is not writable or there is no home directory."""
    default = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    path = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or default), "jaxlm")
    if not path.is_absolute():
        return None
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return path if os.access(path, os.W_OK | os.X_OK) else None


def get(kind: str, key: Any) -> Any:
    """The value stored for `key`, as JSON returns it; None if there is none or the file is damaged."""
    file = _file(kind, key)
    try:
        entry = json.loads(file.read_text()) if file else None
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or entry.get("key") != json.loads(json.dumps(key)):
        return None
    return entry.get("value")


def put(kind: str, key: Any, value: Any) -> None:
    """Stores `value` for `key`, both JSON-ready. Does nothing if the directory is not writable."""
    if file := _file(kind, key):
        try:
            atomic.write_file(file, (json.dumps({"key": key, "value": value}, indent=2) + "\n").encode())
        except OSError:
            return


def _file(kind: str, key: Any) -> Path | None:
    path = directory()
    return path and path / f"{kind}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
