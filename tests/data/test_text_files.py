"""The files of a corpus: what a folder, a pattern and a list name, and what of it is skipped."""

import os
from pathlib import Path

import pytest

from jaxlm.data.text_files import describe_skipped, find_files, some_names
from jaxlm.errors import UsageError

DIARY = {
    "diary/B day.txt": "b",
    "diary/a.md": "a",
    "diary/LOUD.TXT": "l",
    "diary/lines.jsonl.gz": "packed",
    "diary/old years/1990.txt": "old",
    "diary/old years/1991.txt": "old too",
    "diary/drafts/x.md": "x",
    "diary/empty.txt": "",
    "diary/blank.txt": "\ufeff \n\n",
    "diary/photo.jpg": "no text",
    "diary/no ending": "text",
    "diary/.hidden.txt": "secret",
    "diary/.git/deep/notes.txt": "secret",
    "letters.txt": "dear",
}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in DIARY.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content)


def read(source, *exclude):
    return [str(path) for path in find_files(source, exclude).files]


ALL = ["B day.txt", "LOUD.TXT", "a.md", "drafts/x.md", "lines.jsonl.gz", "old years/1990.txt", "old years/1991.txt"]


def test_a_folder_is_read_in_order_and_what_is_not_text_is_skipped_by_its_reason():
    os.mkfifo("diary/pipe.txt")
    Path("diary/link").symlink_to("..")
    found = find_files("diary")
    assert [str(path) for path in found.files] == [f"diary/{name}" for name in ALL]
    assert {reason: {path.name for path in paths} for reason, paths in found.skipped.items()} == {
        "empty": {"empty.txt", "blank.txt"},
        "hidden": {".hidden.txt", ".git"},
        "of another kind": {"photo.jpg", "no ending", "pipe.txt", "link"},
    }
    assert (found.missing, found.unused) == ((), ())


def test_a_folder_that_cannot_be_read_is_an_error(monkeypatch):
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("drafts"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UsageError, match=r"cannot read diary/drafts \(Permission denied\)"):
        find_files("diary")


def test_folders_files_and_patterns_mix_and_each_file_is_read_once():
    Path("again.txt").symlink_to("letters.txt")
    assert read("letters.txt,diary/old years,again.txt") == ["letters.txt", *(f"diary/{name}" for name in ALL[-2:])]
    assert read("diary/old*,diary/*/1990.txt") == [f"diary/{name}" for name in ALL[-2:]]
    assert read("diary/.hidden.txt") == ["diary/.hidden.txt"]  # it is named
    assert find_files("letters.txt,nothing,no*where").missing == ("nothing", "no*where")
    Path("letters.txt,diary").mkdir()
    Path("letters.txt,diary/c.txt").write_text("c")
    assert read("letters.txt,diary") == ["letters.txt,diary/c.txt"]  # what exists is no list


@pytest.mark.parametrize(
    ("pattern", "left_out"),
    [
        ("*.md", ["a.md", "drafts/x.md"]),
        ("drafts", ["drafts/x.md"]),
        ("drafts/", ["drafts/x.md"]),
        ("diary/old*", ALL[-2:]),
        ("1990.txt", ["old years/1990.txt"]),
        ("diary/old years/1991.txt", ["old years/1991.txt"]),
        ("LOUD*", ["LOUD.TXT"]),
    ],
)
def test_files_and_folders_are_excluded_by_name_or_path(pattern, left_out):
    found = find_files("diary", [pattern])
    assert [str(path) for path in found.files] == [f"diary/{name}" for name in ALL if name not in left_out]
    assert [str(path) for path in found.skipped["excluded"]] == [f"diary/{name}" for name in left_out]


def test_a_pattern_that_excludes_nothing_is_given_and_the_named_folder_is_none_of_its_own():
    found = find_files(str(Path("diary").absolute()), ["diary", "secret*", "*.md"])
    assert (len(found.files), found.unused) == (len(ALL) - 2, ("diary", "secret*"))


def test_few_names_are_quoted_and_many_are_counted():
    assert some_names(["a.txt", "b c.txt"]) == "a.txt, 'b c.txt'"
    assert some_names([f"{i}.txt" for i in range(9)], 2) == "0.txt, 1.txt and 7 more"
    assert (
        describe_skipped({"empty": [Path("a b")], "hidden": [Path("c"), Path("d")]})
        == "1 empty ('a b'), 2 hidden (c, d)"
    )
