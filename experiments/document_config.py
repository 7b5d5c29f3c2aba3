"""Prints the page of all settings, made from the fields and comments of jaxlm/config.py:

python -m experiments.document_config > docs/configuration.md
"""

import ast
import dataclasses
import inspect
import io
import tokenize
from collections.abc import Iterator
from typing import Any

from jaxlm.config import OLD_NAMES, OLD_VALUES, Config

INTRODUCTION = """# Configuration

<!-- Made by `python -m experiments.document_config > docs/configuration.md`. Edit jaxlm/config.py instead. -->

A config file is a Python file whose `get_config()` changes the defaults:

```python
from jaxlm.config import default_config


def get_config():
    config = default_config()
    config.batch_size = 16
    config.model.width = 256
    return config
```

`--config FILE` reads a config file, `--config m2_60m` a shipped preset. Flags change single settings:
`--config.batch_size=16 --config.model.width=256`.

A run resumes with the same value of every setting marked *fixed*, because these define what its checkpoints mean. The
other settings may change between sessions. The data may not change either: its token files are compared by hash.
"""


def comments(cls: type) -> dict[str, str]:
    """The comment beside each field of a dataclass, by the field's name."""
    source = inspect.getsource(cls)
    by_line = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (definition,) = ast.parse(source).body
    return {
        field.target.id: " ".join(
            by_line[line] for line in range(field.lineno, field.end_lineno + 1) if line in by_line
        )
        for field in definition.body
        if isinstance(field, ast.AnnAssign)
    }


def default_text(value: Any) -> str:
    """A default as the page shows it."""
    if isinstance(value, tuple):
        return f"{len(value)} strings"
    return "empty" if value == "" else f"`{value}`"


def table(cls: type, prefix: str) -> Iterator[str]:
    """The lines of a table of the settings in a group."""
    meanings = comments(cls)
    yield "| setting | default | meaning |"
    yield "|---|---|---|"
    for field in dataclasses.fields(cls):
        if not dataclasses.is_dataclass(field.default):
            fixed = " *fixed*" if field.metadata.get("fixed") else ""
            meaning = meanings[field.name].replace("|", "\\|")
            yield f"| `{prefix}{field.name}`{fixed} | {default_text(field.default)} | {meaning} |"


def page() -> Iterator[str]:
    """The lines of the page."""
    yield INTRODUCTION
    yield "## The run\n"
    yield f"{Config.__doc__}\n"
    yield from table(Config, "")
    for field in dataclasses.fields(Config):
        if dataclasses.is_dataclass(field.default):
            yield f"\n## `config.{field.name}`\n"
            yield f"{type(field.default).__doc__}\n"
            yield from table(type(field.default), f"{field.name}.")
    yield "\n## Former names\n"
    yield "Config files and checkpoints with these names still work. Flags need the present ones.\n"
    yield "| former | present | values |"
    yield "|---|---|---|"
    for old, new in OLD_NAMES.items():
        values = ", ".join(
            f"`{before}` is " + (f"`{after}`" if after else "the default")
            for before, after in OLD_VALUES.get(old, {}).items()
            if before != after
        )
        yield f"| `{old}` | `{new}` | {values} |"


if __name__ == "__main__":
    print("\n".join(page()))
