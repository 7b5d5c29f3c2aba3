"""Readers: the documents do not depend on the chunks, and bad files are one-line errors."""

import gzip
import io
import json
import lzma
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from unittest import mock

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxlm.data import readers
from jaxlm.data.readers import read_chunks, read_text
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.errors import UsageError

MARK = "<|endoftext|>"
WORDS = ["the", " the", "don't", "'ll", " '", "\n", "\n\n", "\r\n", "  ", " ", "\t"]
WORDS += ["\u2003", "\x1c", "42", "…", "é", "漢字", "<|end"]


def as_documents(chunks):
    """The texts of whole documents."""
    documents = []
    for text, starts_document in chunks:
        assert text
        documents = [*documents, text] if starts_document else [*documents[:-1], documents[-1] + text]
    return documents


def chunks_of(text, size, longest):
    with mock.patch.multiple(readers, CHUNK_CHARACTERS=size, _LONGEST_CHUNK=longest):
        return list(read_text(io.StringIO(text, newline="\n")))


@example(f"one{MARK}two\nthree", 10)
@given(st.lists(st.sampled_from([*WORDS, MARK]), max_size=60).map("".join), st.integers(1, 40))
def test_documents_do_not_depend_on_the_chunks(text, size):
    documents = [part for part in re.split(r"[\r\n]*<\|endoftext\|>[\r\n]*", text) if part]
    assert as_documents(chunks_of(text, size, 1000)) == documents


@given(st.lists(st.sampled_from(["a", "漢", "<|end", MARK]), max_size=60).map("".join), st.integers(1, 40))
def test_text_without_spaces_is_cut(text, size):
    chunks = chunks_of(text, size, 30)
    assert as_documents(chunks) == [part for part in text.split(MARK) if part]
    assert max((len(text) for text, _ in chunks), default=0) <= 30 + size


@given(st.lists(st.sampled_from(WORDS), max_size=80).map("".join), st.integers(1, 40))
def test_ids_of_the_chunks_are_those_of_the_whole_text(text, size):
    tokenizer = load_tokenizer()
    chunks = chunks_of(text, size, 1000)
    assert [i for text, _ in chunks for i in tokenizer.encode(text).tolist()] == tokenizer.encode(text).tolist()


def test_a_long_document_is_cut():
    text = "It was the best of times. " * 40_000
    chunks = list(read_text(io.StringIO(text)))
    assert len(chunks) > 2
    assert "".join(chunk.text for chunk in chunks) == text


@pytest.mark.parametrize(("suffix", "compress"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
def test_plain_and_compressed_files(tmp_path, suffix, compress):
    (tmp_path / f"a.txt{suffix}").write_bytes(compress(f"\ufeffOne.\r\nTwo é\n\n{MARK}\nThree\n".encode()))
    rows = [{"text": f"in one line {MARK} \n\u2028 é", "more": 1}, {"text": ""}, {"text": "\ud800!"}]
    (tmp_path / f"b.jsonl{suffix}").write_bytes(compress("\n\n".join(map(json.dumps, rows)).encode()))
    chunks = read_chunks([tmp_path / f"a.txt{suffix}", tmp_path / f"b.jsonl{suffix}"])
    assert as_documents(chunks) == ["One.\r\nTwo é", "Three\n", rows[0]["text"], "?!"]


def test_zst_files_of_several_frames(tmp_path):
    zstd = pytest.importorskip("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    path = tmp_path / "a.txt.zst"
    packed = zstd.compress(b"one ") + zstd.compress(b"two")
    path.write_bytes(packed)
    assert as_documents(read_chunks([path])) == ["one two"]
    for bad in (packed[:-3], b"not zstd"):
        path.write_bytes(bad)
        with pytest.raises(UsageError, match="check the file"):
            list(read_chunks([path]))


def test_parquet_rows_are_documents(tmp_path):
    texts = [f"document {i}\n" for i in range(3000)]
    table = pyarrow.table({"id": list(range(3000)), "text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=500)
    assert as_documents(read_chunks([tmp_path / "a.parquet"])) == texts


@pytest.mark.skipif(sys.platform == "darwin", reason="file names are UTF-8")
def test_parquet_with_a_name_that_is_not_utf8(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.parquet")
    with path.open("wb") as file:
        pyarrow.parquet.write_table(pyarrow.table({"text": ["one"]}), file)
    assert as_documents(read_chunks([path])) == ["one"]


def test_a_long_document_is_not_read_into_memory(tmp_path):
    path = tmp_path / "long.txt.gz"
    path.write_bytes(gzip.compress(b"It was the best of times, it was the worst of times. " * 300_000, compresslevel=1))
    tracemalloc.start()
    characters = sum(len(chunk.text) for chunk in read_chunks([path]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert characters == 53 * 300_000
    assert peak < 8e6


GOOD_LINE = b'{"text": "good"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "contains no text"),
        ("a.txt", b"\xef\xbb\xbf", "contains no text"),
        ("a.txt", f"\n{MARK}\n".encode(), "contains no text"),
        ("a.txt", "тёплый".encode("koi8-r"), "not UTF-8"),
        ("a.txt.gz", gzip.compress("тёплый".encode("koi8-r"), mtime=0), "not UTF-8"),
        ("a.jsonl", b"", "contains no text"),
        ("a.jsonl", GOOD_LINE + b"\n" + b'{"body": "x"}\n', "line 3 has no text"),
        ("a.jsonl", GOOD_LINE + b'{"text": null}\n', "line 2 has no text"),
        ("a.jsonl", GOOD_LINE + b'["text"]\n', "line 2 has no text"),
        ("a.jsonl", GOOD_LINE + b"{text: 1}\n", "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "not UTF-8"),
        ("a.txt.gz", b"not gzip", "cannot read"),
        ("a.txt.gz", gzip.compress(b"text" * 1000, mtime=0)[:-9], "cannot read"),
        ("a.txt.gz", gzip.compress(b"text" * 1000, mtime=0)[:20] + b"\xff" * 20, "cannot read"),
        ("a.txt.xz", b"not xz", "cannot read"),
        ("a.txt.xz", lzma.compress(b"text" * 1000)[:-20], "cannot read"),
        ("a.parquet", b"not parquet", "not a valid parquet"),
        ("a.parquet", b"", "not a valid parquet"),
        ("a.csv", b"text", "not a file type that can be read"),
        ("a.parquet.gz", b"text", "not a file type that can be read"),
        ("a", b"text", "not a file type that can be read"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message) as refused:
        list(read_chunks([tmp_path / name]))
    assert str(tmp_path / name) in str(refused.value)
    assert "\n" not in str(refused.value)


ENCODINGS = {
    "utf-16": "UTF-16",
    "utf-32": "UTF-32",
    "utf-16-le": "UTF-16LE",
    "utf-16-be": "UTF-16BE",
    "utf-32-le": "UTF-32LE",
    "utf-32-be": "UTF-32BE",
}
PACKERS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("words", ["It was the best of times. ", "Быть или не быть, вот в чём вопрос. "])
def test_other_encodings_are_named_and_the_command_converts_them(tmp_path, monkeypatch, words, encoding, kind, packer):
    monkeypatch.chdir(tmp_path)
    text = words * 200
    path = Path(f"it's a $file{kind}{packer}")
    content = text if kind == ".txt" else json.dumps({"text": text}, ensure_ascii=False)
    original = PACKERS[packer](content.encode(encoding))
    path.write_bytes(original)
    with pytest.raises(UsageError, match=rf"{ENCODINGS[encoding]}\b") as refused:
        list(read_chunks([path]))
    command = str(refused.value).split("convert it with ")[1]
    subprocess.run(command, shell=True, check=True)
    assert as_documents(read_chunks([path])) == [text]
    (kept,) = set(Path().iterdir()) - {path}
    assert kept.read_bytes() == original and not readers.is_readable(kept)


def test_big_endian_marks_are_known(tmp_path):
    for mark, encoding in ((b"\xfe\xff", "UTF-16"), (b"\0\0\xfe\xff", "UTF-32")):
        (tmp_path / "a.txt").write_bytes(mark + "text".encode(f"{encoding}-be"))
        with pytest.raises(UsageError, match=f"is {encoding}, not UTF-8"):
            list(read_chunks([tmp_path / "a.txt"]))


def test_a_file_that_is_not_utf8_is_converted_by_the_command(tmp_path):
    path, before = tmp_path / "it's.txt", tmp_path / "it's.txt.latin1"
    path.write_bytes("тёплый".encode("koi8-r"))
    before.write_text("a person's")
    with pytest.raises(UsageError, match="another encoding than Latin-1, name that in place of latin1") as refused:
        list(read_chunks([path]))
    command = str(refused.value).split("convert it with ")[1].replace("-f latin1", "-f KOI8-R")
    subprocess.run(command, shell=True, check=True)
    assert as_documents(read_chunks([path])) == ["тёплый"]
    assert before.read_text() == "a person's"


@given(st.text(st.sampled_from("abc \n,é€ßÿ“”"), max_size=60), st.sampled_from([".txt", ".md", ".TXT", ".Txt.Gz"]))
def test_windows_text_is_read_and_the_files_are_given_with_a_word(tmp_path_factory, text, ending):
    path = tmp_path_factory.mktemp("windows") / f"a{ending}"
    content = f"{'plain words ' * 300}{text}{' Überraschung.' * 30}".encode("cp1252")
    path.write_bytes(gzip.compress(content) if ending.endswith("Gz") else content)
    windows = {}
    assert as_documents(read_chunks([path], windows)) == [content.decode("cp1252")]  # „Spaß“ ends in UTF-8 by chance
    (word,) = windows.values()
    assert word in content.decode("cp1252") and not word.isascii()


def test_text_that_is_neither_utf8_nor_plausible_windows_text_is_refused(tmp_path):
    contents = {
        "koi8.txt": ("Быть или не быть. " * 50).encode("koi8-r"),
        "undefined.txt": b"plain words " * 50 + b"\x81",  # no character of Windows-1252
        "lines.jsonl": b'{"text": "caf\xe9 and more words"}\n',  # JSON is UTF-8
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=f"{name} is not UTF-8 text"):
            list(read_chunks([tmp_path / name]))


def test_utf8_with_a_few_windows_bytes_keeps_its_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes("日本 é ".encode() * 20 + b"caf\xe9")
    windows = {}
    assert as_documents(read_chunks([tmp_path / "a.txt"], windows)) == ["日本 é " * 20 + "café"]
    assert windows == {tmp_path / "a.txt": "café"}
    (tmp_path / "b.txt").write_bytes("日本 é ".encode() * 20)
    list(read_chunks([tmp_path / "b.txt"], windows))
    assert len(windows) == 1


def test_every_unreadable_file_is_named_after_all_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("good.txt").write_text("good words")
    Path("a b.txt").write_bytes("words".encode("utf-16"))
    Path("c.txt.gz").write_bytes(b"no gzip")
    Path("d.jsonl").write_text("{")
    names = ["a b.txt", "c.txt.gz", "good.txt", "d.jsonl"]
    texts = []
    with pytest.raises(UsageError) as refused:
        texts.extend(chunk.text for chunk in read_chunks(map(Path, names)))
    message = str(refused.value)
    assert "".join(texts) == "good words"
    for said in ("3 files", "a b.txt is UTF-16", "iconv", "read c.txt.gz (", "d.jsonl, line 1 is not JSON"):
        assert said in message
    for number in range(20):
        names.append(f"{number}: 1.txt")
        Path(names[-1]).write_bytes("words".encode("utf-16"))
    with pytest.raises(UsageError) as refused:
        list(read_chunks(map(Path, names)))
    for said in ("23 files", *(f"{number}: 1.txt is UTF-16" for number in range(20))):
        assert said in str(refused.value)


def test_text_in_an_encoding_without_a_mark_is_converted_by_the_command_with_its_name(tmp_path):
    (tmp_path / "a.txt").write_bytes("床前明月光疑是地上霜。".encode("utf-16-le"))
    with pytest.raises(UsageError, match="in place of latin1") as refused:
        list(read_chunks([tmp_path / "a.txt"]))
    command = str(refused.value).split("convert it with ")[1].replace("latin1", "UTF-16LE")
    subprocess.run(command, shell=True, check=True)
    assert as_documents(read_chunks([tmp_path / "a.txt"])) == ["床前明月光疑是地上霜。"]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("text", "nulls"), [("a\0", 0), ("a\0b\0", 2), ("word " * 5000 + "\0" * 249, 0), ("word " * 5000 + "\0" * 300, 300)]
)
def test_many_nuls_are_refused_and_stray_ones_are_text(tmp_path, kind, text, nulls):
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), path)
    else:
        path.write_text(text if kind == "txt" else json.dumps({"text": text}))
    if nulls:
        with pytest.raises(UsageError, match=f"{nulls} NUL characters of|NUL bytes"):
            list(read_chunks([path]))
    else:
        assert as_documents(read_chunks([path])) == [text]


@given(st.lists(st.sampled_from([*WORDS, "aaaaaaaa", "        "]), max_size=60).map("".join), st.integers(1, 20))
def test_documents_are_cut_as_text_files_are(text, size):
    with mock.patch.multiple(readers, CHUNK_CHARACTERS=size, _LONGEST_CHUNK=30):
        chunks = list(readers._document(text))
        expected = list(read_text(io.StringIO(text, newline="\n")))
    assert chunks == (expected if len(text) > size else [(text, True)] * bool(text))


@pytest.mark.parametrize(
    ("columns", "message"),
    [({"body": ["x"]}, "no column `text`, only body"), ({"text": ["x", None]}, "row 2 has no text")],
)
def test_parquet_without_text_is_refused(tmp_path, columns, message):
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=message):
        list(read_chunks([tmp_path / "a.parquet"]))


def test_missing_packages_are_named(tmp_path, monkeypatch):
    for name in ("pyarrow", "pyarrow.parquet", "backports.zstd", "compression.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    for name, message in (
        ("a.parquet", r'pip install "jaxlm\[parquet\]"'),
        ("a.txt.zst", "pip install backports.zstd"),
    ):
        (tmp_path / name).write_bytes(b"anything")
        with pytest.raises(UsageError, match=message):
            list(read_chunks([tmp_path / name]))


@pytest.mark.parametrize("before", range(26, 41))
def test_a_mark_across_the_cut_of_a_text_without_spaces_is_found(before):
    assert as_documents(chunks_of("a" * before + MARK + "b", 40, 30)) == ["a" * before, "b"]
