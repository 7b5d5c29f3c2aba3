import sys
from pathlib import Path

import pytest

from jaxlm.storage import user_cache


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_get_returns_the_value_of_exactly_its_key():
    user_cache.put("probe", ["mps", "0.10.2"], {"failed": "it hangs"})
    user_cache.put("probe", ["mps", "0.10.3"], {"failed": ""})
    assert user_cache.get("probe", ("mps", "0.10.2")) == {"failed": "it hangs"}
    assert user_cache.get("probe", ["mps", "0.10.3"]) == {"failed": ""}
    assert user_cache.get("probe", ["mps", "0.10.4"]) is None
    assert user_cache.get("plan", ["mps", "0.10.2"]) is None


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"key": ["other"], "value": 1}', b"\xff"])
def test_a_damaged_file_is_none(damage):
    user_cache.put("probe", ["mps"], 1)
    (file,) = user_cache.directory().glob("probe-*.json")
    file.write_bytes(damage)
    assert user_cache.get("probe", ["mps"]) is None


def test_an_unwritable_directory_is_none(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    user_cache.put("probe", ["mps"], 1)
    assert user_cache.directory() is None
    assert user_cache.get("probe", ["mps"]) is None


@pytest.mark.parametrize(("platform", "usual"), [("linux", ".cache/jaxlm"), ("darwin", "Library/Caches/jaxlm")])
def test_without_the_variable_it_is_the_platforms_directory(tmp_path, monkeypatch, platform, usual):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", platform)
    assert user_cache.directory() == Path(tmp_path, usual)


@pytest.mark.parametrize("variable", ["", "~/cache", "cache"])
def test_without_a_home_directory_it_is_none(tmp_path, monkeypatch, variable):
    """A relative path would put the cache into whatever folder a command is started in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", variable)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    user_cache.put("probe", ["mps"], 1)
    assert user_cache.directory() is None
    assert user_cache.get("probe", ["mps"]) is None
    assert list(tmp_path.iterdir()) == []


def test_the_variable_may_begin_with_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "~/mine")
    assert user_cache.directory() == tmp_path / "mine" / "jaxlm"


def test_a_read_only_directory_is_none(monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert user_cache.directory() is None
