"""One self-contained HTML file: a template, its styles and scripts, and the data as JSON."""

import json
import re
from importlib import resources
from typing import Any

from jaxlm.interop.policy import content_policy

MARK = b"Made by jaxlm.report"  # in every page and picture, so that no file of another program is replaced
_FILES = {"style": ("uplot.min.css", "report.css"), "script": ("uplot.min.js", "words.js", "report.js")}


def render(runs: list[dict[str, Any]], written: str, refresh_seconds: float | None) -> bytes:
    """The page of these runs, which asks for nothing outside itself.

    Args:
        runs: from `jaxlm.pages.run.read_run`.
        written: when, in words.
        refresh_seconds: an open page loads itself again after so long; None: never.
    """
    parts = {kind: "\n".join(map(_text, names)) for kind, names in _FILES.items()}
    data = {"runs": runs, "written": written, "refresh_seconds": refresh_seconds}
    values = parts | {
        "title": ", ".join(re.sub("[<&]", " ", run["name"]) for run in runs),
        "policy": content_policy(**parts),
        "data": json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], _text("report.html")).encode(
        "ascii", "xmlcharrefreplace"
    )


def _text(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
