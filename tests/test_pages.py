"""The pages: their links, the README's size, and that their commands, flags, settings and snippets are real."""

import ast
import contextlib
import functools
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxlm.cli import read_flags
from jaxlm.config import OLD_NAMES, check_name
from jaxlm.errors import UsageError

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "data" / "README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
OF_MAIN = ("jaxlm.plan", "jaxlm.doctor")  # take the flags of jaxlm.main too


def fenced(text: str, language: str = r"\w*") -> list[str]:
    """The fenced code blocks of a page in this language."""
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", text)


def prose(text: str) -> str:
    """A page without its fenced code blocks."""
    return re.sub(r"(?ms)^```.*?^```$", "", text)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"(?m)^#+ (.+)$", prose(page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text: str) -> list[list[str]]:
    """The words of each `python -m` or `python FILE` command of a page, without what is chained before or after."""
    code = [*re.findall(r"`([^`\n]+)`", prose(text)), *"\n".join(fenced(text, "sh")).replace("\\\n", " ").splitlines()]
    parts = [part.strip() for line in code for part in line.split("#")[0].split("&&")]
    return [shlex.split(part) for part in parts if re.match(r"python -m (jaxlm|experiments)|python \w+/", part)]


@functools.cache
def source(program: str) -> str:
    """The source of a module, or of a file of the repository."""
    if program.endswith(".py"):
        return (ROOT / program).read_text()
    spec = importlib.util.find_spec(program)
    assert spec and spec.origin, f"there is no module {program}"
    return Path(spec.origin).read_text()


def flags(program: str) -> set[str]:
    """The flags that a program declares with argparse or absl."""
    strings = [node.value for node in ast.walk(ast.parse(source(program))) if isinstance(node, ast.Constant)]
    declared = {string for string in strings if isinstance(string, str) and re.fullmatch(r"--[\w-]+", string)}
    declared |= {f"--no-{flag[2:]}" for flag in declared}  # argparse.BooleanOptionalAction
    if program == "jaxlm.main" or program in OF_MAIN:
        declared |= {f"--{name}" for name in re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source("jaxlm.cli"))}
    return declared


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text()).replace("\n", " "))
    broken = []
    for link in links:
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_flags_exist(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands(page.read_text()):
        program = words[2] if words[1] == "-m" else words[1]
        if program == "jaxlm.main":
            read_flags(words[3:])
        declared = flags(program)
        for word in words[2:]:
            if word.startswith("--") and not word.startswith("--config."):
                assert word.split("=")[0] in declared, f"{program} has no flag {word}"
            if word.startswith("configs/"):
                assert (ROOT / word).is_file(), f"there is no {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_exist(page):
    text = page.read_text()
    names = re.findall(r"--config\.([\w.]*\w)", text)
    if page.name not in ("log.md", "CHANGELOG.md"):  # which tell of former names
        names += re.findall(r"`((?:model|optimizer|data|sample)\.\w+)(?:=[^`]*)?`", text)
    former = OLD_NAMES if page.name == "configuration.md" else ()
    for name in names:
        if name != "NAME" and name not in former:
            check_name(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_rows_of_a_table_have_as_many_cells_as_its_head(page):
    cells = 0
    for line in prose(page.read_text()).splitlines():
        if not line.startswith("|"):
            cells = 0
            continue
        count = len(re.findall(r"(?<!\\)\|", line))
        assert count == (cells or count), f"a row of {page.name} has another number of cells: {line}"
        cells = count


def test_named_modules_and_files_exist():
    for page in PAGES:
        text = page.read_text()
        for module in re.findall(r"python -m ((?:jaxlm|experiments)[.\w]*\w)", text):
            source(module)
        if page.name != "log.md":
            for path in re.findall(r"`((?:jaxlm|experiments|tests|configs)/[\w/.-]+\w/?)`", text):
                assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_a_wrong_setting_or_flag_would_be_found():
    with pytest.raises(UsageError):
        check_name("model.hidden")
    assert "--workdir" in flags("jaxlm.main")
    assert "--json" not in flags("jaxlm.main")
    assert ["python", "-m", "jaxlm.main", "--config", "configs/quickstart.py"] in commands(README.read_text())


def test_the_readme_fits_150_lines():
    assert len(README.read_text().splitlines()) <= 150


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index


def modules_of_the_readme():
    modules = {words[2] for words in commands(README.read_text()) if words[1] == "-m"}
    assert {"jaxlm.main", "jaxlm.sample", "jaxlm.plan"} <= modules
    return modules


def test_the_commands_of_the_readme_answer_help(capsys):
    """The settings of each training command are real (above)."""
    for module in sorted(name for name in modules_of_the_readme() if name.startswith("jaxlm.")):
        with contextlib.suppress(SystemExit):  # argparse ends so; a wrong flag is a UsageError
            importlib.import_module(module).main(["--help"])
        assert module.split(".")[1] in capsys.readouterr().out


@pytest.mark.slow
def test_the_commands_of_the_readme_start():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    processes = {
        module: subprocess.Popen(
            [sys.executable, "-m", module, "--help"], stdout=subprocess.PIPE, text=True, env=environment
        )
        for module in modules_of_the_readme()
    }
    for module, process in processes.items():
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, module
        assert module.split(".")[1] in out


def test_snippets_of_jax_run():
    """Those of the README (traced, not compiled) and of the architecture page; the others need a finished run."""
    (of_readme,) = fenced(README.read_text(), "python")
    values = {}
    jax.eval_shape(lambda: exec(of_readme, values))
    assert values["logits"].shape == (1, 8, 4096)
    (of_accumulator,) = fenced((ROOT / "docs" / "architecture.md").read_text(), "python")
    exec(of_accumulator, values)
    assert (values["accumulator_DF"] == 12).all()
