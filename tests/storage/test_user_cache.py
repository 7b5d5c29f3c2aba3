import pytest

from jaxlm.storage import user_cache


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_what_is_remembered_comes_back_for_its_key_alone():
    user_cache.put("probe", ["mps", "0.10.2"], {"failed": "it hangs"})
    user_cache.put("probe", ["mps", "0.10.3"], {"failed": ""})
    assert user_cache.get("probe", ("mps", "0.10.2")) == {"failed": "it hangs"}
    assert user_cache.get("probe", ["mps", "0.10.3"]) == {"failed": ""}
    assert user_cache.get("probe", ["mps", "0.10.4"]) is None
    assert user_cache.get("plan", ["mps", "0.10.2"]) is None


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"key": ["other"], "value": 1}', b"\xff"])
def test_a_damaged_memory_is_none(damage):
    user_cache.put("probe", ["mps"], 1)
    (file,) = user_cache.directory().glob("probe-*.json")
    file.write_bytes(damage)
    assert user_cache.get("probe", ["mps"]) is None


def test_a_place_that_cannot_be_had_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    user_cache.put("probe", ["mps"], 1)
    assert user_cache.directory() is None
    assert user_cache.get("probe", ["mps"]) is None
