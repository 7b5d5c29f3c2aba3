"""What pip would install on a Mac with an Apple GPU, asked of the package index; nothing is installed."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

MAC = {"sys_platform": "darwin", "platform_machine": "arm64", "platform_system": "Darwin", "os_name": "posix"}
LINUX = {"sys_platform": "linux", "platform_machine": "x86_64", "platform_system": "Linux", "os_name": "posix"}
PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]


def requirements(extra: str, machine: dict[str, str], python: str = "3.13") -> list[Requirement]:
    asked = [Requirement(text) for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"][extra]]
    return [r for r in asked if r.marker is None or r.marker.evaluate(machine | {"python_version": python})]


@pytest.mark.network
@pytest.mark.parametrize("python", ["3.11", "3.13"])  # the oldest, and the one that the README names
@pytest.mark.parametrize(
    ("extra", "plugin", "jax"), [("metal", "jax-metal", "0.4.34 0.4.34"), ("mps", "jax-mps", "0.10.0 0.10.999")]
)
def test_an_extra_brings_a_mac_its_plugin_and_a_jax_that_the_plugin_works_with(tmp_path, extra, plugin, jax, python):
    asked = [f"{r.name}{r.specifier}" for r in requirements(extra, MAC, python)]
    report = tmp_path / "report.json"
    target = ["--platform", "macosx_14_0_arm64", "--python-version", python, "--implementation", "cp"]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    command += [*target, "--only-binary=:all:", "--target", str(tmp_path), "--report", str(report), *asked]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    chosen = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    versions = {metadata["name"].lower().replace("_", "-"): Version(metadata["version"]) for metadata in chosen}
    assert plugin in versions
    oldest, newest = map(Version, jax.split())
    assert versions["jax"] == versions["jaxlib"]
    assert oldest <= versions["jax"] <= newest


@pytest.mark.parametrize("extra", ["metal", "mps"])
def test_only_a_mac_is_given_a_plugin(extra):
    plugins = {r.name for r in requirements(extra, MAC)} - {r.name for r in requirements(extra, LINUX)}
    assert plugins == {f"jax-{extra}"}
    assert requirements(extra, MAC | {"platform_machine": "x86_64"}) == requirements(extra, LINUX)
