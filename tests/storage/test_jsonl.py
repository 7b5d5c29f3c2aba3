"""Append-only files on full disks and after crashes in the middle of a line."""

import errno
import json
import os

import pytest

from jaxlm.storage.jsonl import AppendOnlyFile, keep_up_to, rows_up_to, to_line
from tests.tiny_run import disk_room


def test_entries_are_written_at_once(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"before ")
    file = AppendOnlyFile(path)
    for entry in (b"one ", b"two "):
        file.append(entry)
        assert path.read_bytes().endswith(entry)
    file.close()
    assert path.read_bytes() == b"before one two "


@pytest.mark.parametrize("room", [0, 5, 8, 9, 20, 30])
def test_entries_wait_whole_and_in_order_while_the_disk_is_full(tmp_path, room):
    path = tmp_path / "a"
    earlier = b"of an earlier session\n"
    path.write_bytes(earlier)
    file = AppendOnlyFile(path)
    entries = [earlier, *(f"entry {number}\n".encode() for number in range(5))]
    with disk_room(len(earlier) + room):
        for entry in entries[1:4]:
            file.append(entry)
            content = path.read_bytes()
            assert b"".join(entries).startswith(content)
            assert content.startswith(earlier) and content.endswith(b"\n")
        if room < 24:
            with pytest.raises(OSError):
                file.sync()
    file.append(entries[4])
    assert path.read_bytes() == b"".join(entries[:5])
    file.sync()
    file.append(entries[5])
    file.close()
    assert path.read_bytes() == b"".join(entries)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_the_error_of_a_sync_is_that_of_the_system(tmp_path, monkeypatch, number):
    """Of the disk that took a part of the entry, and said why it took no more when it was asked again."""
    write = os.write

    def partial_write(descriptor, data):
        if len(data) < 6:
            raise OSError(number, os.strerror(number))
        return write(descriptor, data[:3])

    file = AppendOnlyFile(tmp_path / "a")
    monkeypatch.setattr(os, "write", partial_write)
    file.append(b"entry\n")
    with pytest.raises(OSError) as caught:
        file.sync()
    assert caught.value.errno == number
    assert (tmp_path / "a").read_bytes() == b""
    monkeypatch.undo()
    file.close()
    assert (tmp_path / "a").read_bytes() == b"entry\n"


def test_an_entry_that_is_written_in_parts_is_whole(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:4]))
    file = AppendOnlyFile(tmp_path / "a")
    file.append(b"an entry\n")
    file.append(b"and another\n")
    assert (tmp_path / "a").read_bytes() == b"an entry\nand another\n"


def test_sync_flushes_every_entry(tmp_path, monkeypatch):
    path, on_disk, fsync = tmp_path / "a", [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (fsync(descriptor), on_disk.append(path.read_bytes())))
    file = AppendOnlyFile(path)
    file.append(b"one")
    file.append(b"two")
    assert on_disk == []
    file.sync()
    assert on_disk == [b"onetwo"]


def test_a_row_is_one_line_of_json():
    row = {"step": 3, "text": 'é "\n\u2028'}
    line = to_line(row)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert json.loads(line) == row


LINES = [
    json.dumps({"step": step, "text": "é\u2028\x0b"}, ensure_ascii=False).encode() + b"\n" for step in (1, 2, 2, 3)
]


@pytest.mark.parametrize(("step", "kept"), [(0, 0), (1, 1), (2, 3), (3, 4), (9, 4)])
def test_later_rows_are_deleted_and_earlier_ones_unchanged(tmp_path, step, kept):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"".join(LINES))
    assert not keep_up_to(file, step)
    assert file.read_bytes() == b"".join(LINES[:kept])
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("cut", [b'{"step": 2, "lo', b'{"step": 2}', b"{", b'{"step": 2, "text": "\xc3', b"\0" * 50])
def test_an_incomplete_last_line_is_deleted(tmp_path, cut):
    file = tmp_path / "samples.jsonl"
    file.write_bytes(LINES[0] + cut)
    assert not keep_up_to(file, 5)
    assert file.read_bytes() == LINES[0]
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "damage",
    [b"{}\n", b"\n", b"[1]\n", b"nan\n", b'{"step": "2"}\n', b'{"step": 1.5}\n', b"\xff\n", b"[" * 9999 + b"\n"],
)
def test_damaged_lines_are_deleted_and_the_original_file_kept(tmp_path, damage):
    file = tmp_path / "metrics.jsonl"
    for name in ("metrics.jsonl.damaged", "metrics.jsonl.damaged-2"):
        file.write_bytes(LINES[0] + damage + name.encode() + b"\n" + LINES[1])
        assert keep_up_to(file, 5) == tmp_path / name
        assert file.read_bytes() == LINES[0] + LINES[1]
    for path in tmp_path.glob("*.damaged*"):
        assert path.read_bytes() == LINES[0] + damage + path.name.encode() + b"\n" + LINES[1]


def test_a_missing_file_is_not_created(tmp_path):
    assert not keep_up_to(tmp_path / "metrics.jsonl", 5)
    assert list(tmp_path.iterdir()) == []


def test_rows_up_to_a_step_skip_damaged_lines(tmp_path):
    path = tmp_path / "a"
    assert list(rows_up_to(path, 9)) == []
    rows = [{"step": step, "loss": step / 2} for step in (1, 2, 3)]
    path.write_bytes(to_line(rows[0]) + b'"no row"\n\xff\n' + to_line(rows[1]) + to_line(rows[2]) + b'{"step": 2')
    assert list(rows_up_to(path, 2)) == rows[:2]
