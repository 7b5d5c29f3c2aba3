"""The wheel, built, installed into a fresh environment and used from an empty folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("jaxlm", "configs", "pyproject.toml", "README.md", "LICENSE", "NOTICE")
JUNK = (
    "configs/notes.txt",
    "configs/__pycache__/mine.pyc",
    "jaxlm/data/train.bin",
    "jaxlm/core/.DS_Store",
    "runs/a.py",
)
QUICKSTART = {
    "max_steps": 2,
    "batch_size": 2,
    "eval_interval": 1,
    "save_interval": 2,
    "generation_interval": 2,
    "optimizer.warmup_steps": 1,
    "model.vocab_size": 300,
    "model.context": 16,
    "model.layers": 1,
    "model.width": 24,
    "model.mlp_width": 16,
    "data.eval_sequences": 2,
    "sample.texts": 1,
    "sample.tokens": 2,
}

pytestmark = pytest.mark.slow


def run(*command, cwd):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options = {"cwd": cwd, "env": environment, "capture_output": True, "text": True, "timeout": 300}
    ended = subprocess.run(list(map(str, command)), **options)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def build(source, kind, into):
    """Builds as a frontend does, with the setuptools that is installed. `kind`: sdist or wheel."""
    code = f"import sys; from setuptools.build_meta import build_{kind} as build; print(build(sys.argv[1]))"
    return into / run(sys.executable, "-c", code, into, cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Builds an sdist from a copy of the sources with some junk, and the wheel from that sdist."""
    place = tmp_path_factory.mktemp("build")
    source = place / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    for name in JUNK:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("junk")
    with tarfile.open(build(source, "sdist", place)) as archive:
        archive.extractall(place / "sdist", filter="data")
    (unpacked,) = (place / "sdist").iterdir()
    return build(unpacked, "wheel", place)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A fresh environment with the wheel, which reads every dependency from the one that runs the tests.

    A path file adds a directory without reading the path files in it, so an editable jaxlm there is not found.
    """
    place = tmp_path_factory.mktemp("installed")
    venv.create(place / "venv", symlinks=True)
    python = place / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", "--no-compile"]
    run(*pip, wheel, cwd=place)
    (packages,) = (place / "venv" / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_wheel_holds_the_package_the_presets_and_the_licences_and_nothing_else(wheel):
    expected = {file.relative_to(ROOT).as_posix() for file in (ROOT / "jaxlm").rglob("*.py")}
    expected |= {f"jaxlm/configs/{file.name}" for file in (ROOT / "configs").glob("*.py")}
    pages = ("report.css", "report.html", "report.js", "uplot.min.css", "uplot.min.js", "words.js")
    expected |= {f"jaxlm/pages/{name}" for name in pages}
    expected |= {"jaxlm/py.typed", "jaxlm/data/gpt2.tiktoken"}
    expected |= {f"jaxlm/interop/page/{file.name}" for file in (ROOT / "jaxlm" / "interop" / "page").iterdir()}
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (info,) = {name.split("/")[0] for name in names if ".dist-info" in name}
        records = {f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "top_level.txt")}
        licences = {f"{info}/licenses/{name}": (ROOT / name).read_bytes() for name in ("LICENSE", "NOTICE")}
        assert set(names) == expected | records | set(licences)
        assert {name: archive.read(name) for name in licences} == licences


def test_the_quickstart_runs_from_an_empty_folder(installed, tmp_path):
    file = run(installed, "-c", "import jaxlm; print(jaxlm.__file__)", cwd=tmp_path).strip()
    assert Path(file).is_relative_to(installed.parents[1])
    settings = [f"--config.{name}={value}" for name, value in QUICKSTART.items()]
    assert "Step      2 | Loss" in run(installed, "-m", "jaxlm.main", *settings, cwd=tmp_path)
    assert (tmp_path / "runs" / "quickstart" / "final_model" / "model.safetensors").is_file()


def test_a_preset_is_found_by_its_name(installed, tmp_path):
    code = "from jaxlm.cli import read_config; print(read_config(['--config', 'm2_60m']))"
    settings = run(installed, "-c", code, cwd=tmp_path)
    assert "max_steps=50000" in settings
    assert "runs/m2_60m" in settings
