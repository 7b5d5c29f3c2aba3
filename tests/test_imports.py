"""Every import of jaxlm, compared with the table of who may import whom."""

import ast
from pathlib import Path

import jaxlm

ROOT = Path(jaxlm.__file__).parent
COMMANDS = {"main", "prepare", "plan", "sample", "export", "report", "doctor"}
MAY_IMPORT = {
    "errors": set(),
    "units": set(),
    "terminal": set(),
    "config": {"errors"},
    "storage": {"errors"},
    "cli": {"config", "errors"},
    "core": {"config"},
    "data": {"config", "errors", "storage"},
    "interop": {"config", "errors", "storage", "data", "core"},  # the table of parameters
    "device": {"config", "errors", "storage", "core"},
    "run": {"config", "errors", "storage", "core", "data", "interop", "device", "terminal", "units"},
}
MAY_IMPORT["pages"] = {
    "config",
    "errors",
    "storage",
    "terminal",
    "interop",
    "run",
}  # the card's base_names; the records
MAY_IMPORT["planner"] = MAY_IMPORT["run"] | {"run"}


def modules():
    """Every module of the package: where it is, and the package or file directly below jaxlm that it belongs to."""
    for file in sorted(ROOT.rglob("*.py")):
        inside = file.relative_to(ROOT)
        if inside.parts != ("__init__.py",):
            yield file, inside.parts[0].removesuffix(".py")


def imported(file):
    """The parts of jaxlm that a module imports, functions' own imports included."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports by dots"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            first, *rest = name.split(".")
            if first == "jaxlm":
                yield rest[0], node.lineno


def test_every_import_is_in_the_table():
    seen = set()
    for file, part in modules():
        seen.add(part)
        if part not in COMMANDS:
            for other, line in imported(file):
                assert other == part or other in MAY_IMPORT[part], f"{file}:{line}: {part} must not import {other}"
    assert seen == COMMANDS | MAY_IMPORT.keys()


def test_the_table_has_no_circle():
    done = set()
    while len(done) < len(MAY_IMPORT):
        ready = {part for part, others in MAY_IMPORT.items() if part not in done and others <= done}
        assert ready, f"a circle among {sorted(MAY_IMPORT.keys() - done)}"
        done |= ready
