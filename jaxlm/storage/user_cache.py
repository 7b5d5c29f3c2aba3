"""What this machine was found to do, remembered from one command to the next."""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from jaxlm.storage import atomic


def directory() -> Path | None:
    """The user's cache directory of jaxlm, made if missing; None where nothing can be written."""
    usual = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    place = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser(usual), "jaxlm")
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return place if os.access(place, os.W_OK | os.X_OK) else None


def get(kind: str, key: Any) -> Any:
    """What was remembered of `key`, as JSON gives it back; None for nothing, or nothing that can be read."""
    file = _file(kind, key)
    try:
        found = json.loads(file.read_text()) if file else None
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.get("key") != json.loads(json.dumps(key)):
        return None
    return found.get("value")


def put(kind: str, key: Any, value: Any) -> None:
    """Keeps `value` for `key`, both as JSON has them; where nothing can be written, does nothing."""
    if file := _file(kind, key):
        try:
            atomic.write_file(file, (json.dumps({"key": key, "value": value}, indent=2) + "\n").encode())
        except OSError:
            return


def _file(kind: str, key: Any) -> Path | None:
    place = directory()
    return place and place / f"{kind}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
