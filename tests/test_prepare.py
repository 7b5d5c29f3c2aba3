"""The command: what it prints, its exit status, and when it does nothing."""

import re
import subprocess
import sys

import numpy as np
import pytest

from jaxlm.errors import UsageError
from jaxlm.prepare import main, prepare


def run(*words):
    command = [sys.executable, "-m", "jaxlm.prepare", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_command_says_what_it_wrote_and_then_does_nothing(tmp_path, capsys):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"Text number {i}. " * 300)
    words = ["--corpus", str(tmp_path / "[01].txt"), str(tmp_path / "2.txt"), "--out", str(tmp_path / "out")]
    main([*words, "--vocab_size", "1000", "--validation", "0.1"])
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("Preparing") and "2.txt" in first
    assert second.startswith("Prepared") and second.endswith("MB/s)")
    sizes = [len(np.fromfile(tmp_path / "out" / name, "<u2")) for name in ("train.bin", "val.bin")]
    found = re.findall(r"([\d,]+) tokens \(([\d,]+) bytes, ([\d.]+) bytes/token, (\d) documents\)", third)
    assert [int(tokens.replace(",", "")) for tokens, *_ in found] == sizes
    text_bytes = 3 * 300 * len("Text number 0. ")
    assert sum(int(size.replace(",", "")) for _, size, *_ in found) == text_bytes
    assert float(found[0][2]) == pytest.approx(text_bytes * 0.9 / sizes[0], abs=0.006)

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    main([*words, "--vocab_size", "1000", "--validation", "0.1"])
    assert capsys.readouterr().out.splitlines() == [third]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    "words",
    [
        ["--corpus", "novel", "--out", "out"],
        ["--corpus", "novels"],
        ["--corpus", "novels", "--out", "out", "--vocab_size", "many"],
        ["--corpus", "novels", "--out", "out", "--vocab_size", "100"],
        ["--corpus", "novels", "--out", "out", "--workers", "3"],
    ],
)
def test_wrong_requests_are_refused_and_write_nothing(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as refused:
        main(words)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_exit_status_and_one_line(tmp_path):
    ran = run("--corpus", "novel", "--out", tmp_path / "out")
    assert (ran.returncode, ran.stdout.splitlines()[1:], len(ran.stderr.splitlines())) == (2, [], 1)
    assert "did you mean 'novels'" in ran.stderr


def test_files_of_another_program_are_not_overwritten(tmp_path, capsys):
    (tmp_path / "train.bin").write_bytes(b"\1\0" * 100)
    with pytest.raises(UsageError, match="without meta"):
        prepare("novels", tmp_path, 4096, 0.05)
    assert (tmp_path / "train.bin").read_bytes() == b"\1\0" * 100
    assert capsys.readouterr().out == ""


def test_what_is_whole_is_left_without_a_word(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("Some text of one's own. " * 50)
    prepare(str(tmp_path / "a.txt"), tmp_path / "out", 500, 0.1)
    assert (tmp_path / "out" / "meta.json").exists()
    assert capsys.readouterr().out.startswith("Preparing")
    prepare(str(tmp_path / "a.txt"), tmp_path / "out", 500, 0.1)
    assert capsys.readouterr().out == ""
