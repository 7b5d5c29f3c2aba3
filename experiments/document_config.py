"""Prints the page of all settings, made from their declarations in jaxlm/config.py:

python -m experiments.document_config > docs/configuration.md
"""

from collections.abc import Iterator
from typing import Any

from jaxlm.config import OLD_NAMES, OLD_VALUES, Config, groups, settings_of

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

```sh
python -m jaxlm.main --config m2_60m --config.batch_size=16 --show
```

prints every setting with its value, whether its default, the config file, a flag or `hours` set it, and what it is for.
It starts and writes nothing.

A run resumes with the same value of every setting marked *fixed*, because these define what its checkpoints mean. The
other settings may change between sessions. The data may not change either: its token files are compared by hash.
"""


def default_text(value: Any) -> str:
    """A default as the page shows it."""
    if value and isinstance(value, tuple):
        return f"{len(value)} strings"
    return "empty" if value in ("", ()) else f"`{value}`"


def table(group: Any, prefix: str) -> Iterator[str]:
    """The lines of a table of the settings in a group."""
    yield "| setting | default | meaning |"
    yield "|---|---|---|"
    for setting in settings_of(group, prefix):
        fixed, meaning = " *fixed*" if setting.fixed else "", setting.meaning.replace("|", "\\|")
        yield f"| `{setting.name}`{fixed} | {default_text(setting.default)} | {meaning} |"


def page() -> Iterator[str]:
    """The lines of the page."""
    yield INTRODUCTION
    for prefix, group in groups(Config()).items():
        yield f"## `config.{prefix[:-1]}`\n" if prefix else "## The run\n"
        yield f"{group.__doc__}\n"
        yield from table(group, prefix)
        yield ""
    yield "## Former names\n"
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
