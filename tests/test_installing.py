"""What pip installs, and the commands that .ci/run, the workflow and CONTRIBUTING.md give.

The tests with the marker `network` ask the package index what a Mac with an Apple GPU would get. They install nothing.
"""

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
MAC = {"sys_platform": "darwin", "platform_machine": "arm64", "platform_system": "Darwin", "os_name": "posix"}
LINUX = {"sys_platform": "linux", "platform_machine": "x86_64", "platform_system": "Linux", "os_name": "posix"}
WORKFLOW = ROOT / ".github" / "workflows" / "tests.yml"
COMMANDS = {
    ".ci/run": (ROOT / ".ci" / "run").read_text(),
    "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text(),
    "tests.yml": WORKFLOW.read_text(),
}


def requirements(extra: str, machine: dict[str, str], python: str = "3.13") -> dict[str, Requirement]:
    parsed = [Requirement(text) for text in PROJECT["dependencies"] + EXTRAS[extra]]
    environment = machine | {"python_version": python}
    return {r.name + str(r.specifier): r for r in parsed if r.marker is None or r.marker.evaluate(environment)}


@pytest.mark.network
@pytest.mark.parametrize("extra", ["metal", "mps"])
def test_a_mac_gets_a_plugin_and_the_jax_that_it_works_with(tmp_path, extra):
    """For the Python that runs the tests: pip resolves for no other."""
    python = f"3.{sys.version_info.minor}"
    mps = ("jax-mps", "0.10.11", "0.10") if python == "3.11" else ("jax-mps", "0.11.1", "0.11")
    plugin, plugin_version, jax = {"metal": ("jax-metal", "0.1.1", "0.4.34"), "mps": mps}[extra]
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    command += [
        "--platform=macosx_14_0_arm64",
        "--only-binary=:all:",
        "--target",
        str(tmp_path),
        "--report",
        str(report),
    ]
    ended = subprocess.run(command + list(requirements(extra, MAC, python)), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    chosen = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    versions = {metadata["name"].lower().replace("_", "-"): metadata["version"] for metadata in chosen}
    assert versions[plugin] == plugin_version
    assert versions["jax"] == versions["jaxlib"]
    assert f"{versions['jax']}.".startswith(f"{jax}.")


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize("extra", ["metal", "mps"])
def test_only_a_mac_gets_a_plugin(extra, python):
    mac, linux = requirements(extra, MAC, python), requirements(extra, LINUX, python)
    assert [r.name for key, r in mac.items() if key not in linux] == [f"jax-{extra}"]
    assert requirements(extra, MAC | {"platform_machine": "x86_64"}, python) == linux


def test_every_library_is_tested_at_its_lower_bound():
    """In `.ci/run`, at the version that the extra `metal` pins or at the one that `.ci/lowest` gives."""
    tested = [Requirement(text) for text in EXTRAS["metal"]]
    lowest = subprocess.run([sys.executable, ROOT / ".ci" / "lowest"], capture_output=True, text=True, check=True)
    tested += [Requirement(line) for line in lowest.stdout.splitlines()]
    versions = {r.name: next(iter(r.specifier)).version for r in tested}
    bounded = [
        Requirement(text) for text in PROJECT["dependencies"] + EXTRAS["gguf"] + EXTRAS["hub"] + EXTRAS["parquet"]
    ]
    for requirement in bounded:
        for bound in requirement.specifier:
            if bound.operator == ">=":
                precision = len(Version(bound.version).release)
                assert Version(versions[requirement.name]).release[:precision] == Version(bound.version).release


@pytest.mark.parametrize("page", COMMANDS)
def test_the_modules_extras_and_markers_of_a_command_exist(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = COMMANDS[page]
    modules = set(re.findall(r"python\"? -m ([\w.]+)", text))
    assert modules
    assert {module for module in modules if importlib.util.find_spec(module) is None} == set()
    extras = re.findall(r"\.\[([\w,]+)\]", text) + re.findall(r"(?m)^ *environment \S+ \w+ ([\w,]+)", text)
    assert extras
    assert {extra for names in extras for extra in names.split(",")} <= set(EXTRAS)
    markers = {marker.split(":")[0] for marker in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    selections = re.findall(r"pytest [^\n`]*-m (\"[^\"]+\"|\w+)", text)
    assert selections
    assert {word for selection in selections for word in re.findall(r"\w+", selection)} <= markers | {"not", "and"}


def test_the_workflow_runs_on_linux_and_macs_and_saves_what_the_doctor_finds():
    jobs = yaml.safe_load(COMMANDS["tests.yml"])["jobs"]
    assert jobs["macos"]["runs-on"] == "macos-14"
    for job in jobs.values():
        assert job["strategy"]["matrix"]["python"] == ["3.11", "3.13"]
    commands = [step["run"] for step in jobs["macos"]["steps"] if "run" in step]
    (upload,) = [step for step in jobs["macos"]["steps"] if "upload-artifact" in step.get("uses", "")]
    assert commands[-1] == f"python -m jaxlm.doctor --out {upload['with']['path']}"
    programs = {"python"} | {Requirement(text).name for text in EXTRAS["dev"]}
    for job in jobs.values():
        assert {step["run"].split()[0] for step in job["steps"] if "run" in step} <= programs
