"""`jaxlm.main --show`: every setting with its value, what set it and what it is for."""

import ast
import json
import re
from pathlib import Path

import pytest

from jaxlm.cli import status
from jaxlm.config import Config, to_dict
from jaxlm.main import main

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
FILE = """from jaxlm.config import default_config


def get_config():
    config = default_config()
    config.batch_size = 24
    config.slices = 4  # an old name
    config.seed = 0  # the default
    config.optimizer.learning_rate = 1e-3
    config.data.corpus = "text \\x1b[31m of mine.txt"
    config.sample.prompts = ("One day", "It's")
    return config
"""
FLAGS = ["--config.optimizer.learning_rate=0.5", "--noconfig.model.remat", "-config.max_steps=50000"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(FILE)


def show(capsys, *flags):
    main(["--config", "mine.py", "--show", *flags])
    return capsys.readouterr().out


def parsed(text):
    """What set each setting, its value and its meaning, by its name."""
    found = {}
    for part in re.findall(r"(?m)^\w+ +\S+ = .+\n(?: +.+\n)+", text):
        words = " ".join(part.split())
        source, name, rest = re.fullmatch(r"(\w+) (\S+) = (.+)", words).groups()
        ends = [end for end in range(1, len(rest)) if rest[end] == " " and is_literal(rest[:end])]
        meaning = re.sub(r"^\(default .*?\) ", "", rest[ends[0] + 1 :])
        found[name] = source, ast.literal_eval(rest[: ends[0]]), meaning
    return found


def is_literal(text):
    try:
        ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return False
    return True


def test_every_setting_has_its_value_what_set_it_and_its_meaning(capsys):
    text = show(capsys, *FLAGS)
    changed = {
        "batch_size": ("file", 24),
        "microbatch_chunks": ("file", 4),
        "optimizer.learning_rate": ("flag", 0.5),
        "model.remat": ("flag", False),
        "max_steps": ("flag", 50_000),
        "data.corpus": ("file", "text \x1b[31m of mine.txt"),
        "sample.prompts": ("file", ("One day", "It's")),
    }
    expected = {}
    for name, value in to_dict(Config()).items():
        inner = {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
        expected |= {key: changed.get(key, ("default", item)) for key, item in inner.items()}
    found = parsed(text)
    assert {name: (source, value) for name, (source, value, _) in found.items()} == expected
    rows = re.findall(r"(?m)^\| `([\w.]+)`(?: \*fixed\*)? \| [^|]+ \| (.+) \|$", PAGE.read_text())
    assert {name: meaning for name, (_, _, meaning) in found.items()} == {
        name: meaning for name, meaning in rows if name in expected
    }
    assert "optimizer.learning_rate = 0.5 (default 0.0003)" in text


def test_it_is_plain_text_of_80_columns_in_which_long_words_stay_whole(capsys):
    path = "folder/" * 15 + "text.txt"
    lines = show(capsys, f"--config.data.corpus={path}").splitlines()
    assert [line.strip() for line in lines if len(line) > 80] == [f"'{path}'"]
    assert not re.search(r"[^\n -~]", "".join(lines))


def test_nothing_is_written(capsys):
    show(capsys, "--workdir", "new")
    assert [path.name for path in Path().iterdir()] == ["mine.py"]


def test_what_hours_choose_has_no_value_until_the_run_begins(capsys):
    flags = ["--config.hours=2", "--config.model.width=256"]
    text = show(capsys, *flags)
    assert "hours    max_steps = chosen when the run begins\n" in text
    assert "flag     model.width = 256 (default 512)\n" in text
    Path("run").mkdir()
    Path("run/config.json").write_text(json.dumps(to_dict(Config(hours=2.0, max_steps=777))))
    text = show(capsys, *flags, "--workdir", "run")
    assert "hours    max_steps = 777 (default 50000)\n" in text
    assert "flag     model.width = 256 (default 512)\n" in text


@pytest.mark.parametrize(
    ("flag", "named"), [("--config.batch_sise=4", "batch_size"), ("--config.batch_size=-4", "batch_size is -4")]
)
def test_a_wrong_setting_is_one_line(flag, named, capsys):
    assert status(main, ["--show", flag]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert named in err
