"""The command that prepares text: its output, its exit status, and when it does nothing."""

import re

import numpy as np
import pytest

from jaxlm import cli
from jaxlm.errors import UsageError
from jaxlm.prepare import main, prepare


def test_the_output_describes_the_files_and_a_second_run_does_nothing(tmp_path, capsys):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"Text number {i}. " * 300)
    argv = ["--corpus", str(tmp_path / "[01].txt"), str(tmp_path / "2.txt"), "--out", str(tmp_path / "out")]
    argv += ["--vocab_size", "1000", "--validation", "0.1"]
    main(argv)
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("Preparing") and "2.txt" in first
    assert second.startswith("Prepared") and second.endswith("MB/s)")
    sizes = [len(np.fromfile(tmp_path / "out" / name, "<u2")) for name in ("train.bin", "val.bin")]
    files = re.findall(r"([\d,]+) tokens \(([\d,]+) bytes, ([\d.]+) bytes/token, (\d) documents\)", third)
    assert [int(tokens.replace(",", "")) for tokens, *_ in files] == sizes
    text_bytes = 3 * 300 * len("Text number 0. ")
    assert sum(int(size.replace(",", "")) for _, size, *_ in files) == text_bytes
    assert float(files[0][2]) == pytest.approx(text_bytes * 0.9 / sizes[0], abs=0.006)

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    main(argv)
    assert capsys.readouterr().out.splitlines() == [third]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_what_is_skipped_or_not_utf8_is_one_line_each(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my diary"
    folder.mkdir()
    (folder / "one.txt").write_text("Some text of one's own. " * 50)
    for name in ("two", "three"):
        (folder / f"{name}.md").write_bytes(("plain words " * 50 + "„Größe“").encode("cp1252"))
    for name in ("photo.jpg", ".hidden", "b.md"):
        (folder / name).touch()
    main(["--corpus", "my diary", "--exclude", "b.*", "--out", "out", "--vocab_size", "300", "--val_fraction", "0.1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "Preparing 'my diary' in out",
        "Skipped 1 hidden ('my diary/.hidden'), 1 excluded ('my diary/b.md'), 1 of another kind ('my diary/photo.jpg')",
        "Not UTF-8, so read as Windows-1252: 'my diary/three.md', 'my diary/two.md'; if words such as „Größe“ look"
        " wrong, convert the files",
    ]
    assert len(lines) == 5
    with pytest.raises(UsageError, match="novels has no files to exclude"):
        main(["--corpus", "novels", "--exclude", "b.*", "--out", "out2"])
    with pytest.raises(UsageError, match=r"exclude 'pivat\*' matches no file"):
        main(["--corpus", "my diary", "--exclude", "pivat*", "--out", "out2", "--vocab_size", "300"])


def test_forced_colours_bring_no_bar_into_a_log(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    (tmp_path / "a.txt").write_text("Some text of one's own. " * 50)
    main(["--corpus", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--vocab_size", "500"])
    out, err = capfd.readouterr()
    assert "\x1b" not in out + err
    assert len(out.splitlines()) == 3


def test_control_codes_in_names_do_not_reach_the_terminal(tmp_path, capsys):
    path, out = tmp_path / "a\x1b[31m.txt", tmp_path / "\x1b]0;out"
    path.write_text("Some text of one's own. " * 50)
    for _ in range(2):
        main(["--corpus", str(path), "--out", str(out), "--vocab_size", "500"])
    out, err = capsys.readouterr()
    assert "a [31m.txt" in out and " ]0;out" in out
    assert "\x1b" not in out + err


@pytest.mark.parametrize(
    "argv",
    [
        ["--corpus", "novel", "--out", "out"],
        ["--corpus", "novels"],
        ["--corpus", "novels", "--out", "out", "--vocab_size", "many"],
        ["--corpus", "novels", "--out", "out", "--vocab_size", "100"],
        ["--corpus", "novels", "--out", "out", "--workers", "3"],
    ],
)
def test_wrong_requests_are_refused_and_write_nothing(tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as refused:
        main(argv)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_an_error_is_one_line_and_exit_status_2(tmp_path, capsys):
    assert cli.status(main, ["--corpus", "novel", "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert (out.splitlines()[1:], len(err.splitlines())) == ([], 1)
    assert "did you mean novels" in err


def test_files_of_another_program_are_not_overwritten(tmp_path, capsys):
    (tmp_path / "train.bin").write_bytes(b"\1\0" * 100)
    with pytest.raises(UsageError, match="without meta"):
        prepare("novels", tmp_path, 4096, 0.05)
    assert (tmp_path / "train.bin").read_bytes() == b"\1\0" * 100
    assert capsys.readouterr().out == ""


def test_complete_files_are_used_silently(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("Some text of one's own. " * 50)
    prepare(str(tmp_path / "a.txt"), tmp_path / "out", 500, 0.1)
    assert (tmp_path / "out" / "meta.json").exists()
    assert capsys.readouterr().out.startswith("Preparing")
    prepare(str(tmp_path / "a.txt"), tmp_path / "out", 500, 0.1)
    assert capsys.readouterr().out == ""
