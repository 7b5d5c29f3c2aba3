"""What reaches a terminal, and what does not reach a file."""

import contextlib
import io
import os
from pathlib import Path

import pytest

import jaxlm
from jaxlm.terminal import console, printable


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.mark.parametrize("variables", [(), ("FORCE_COLOR",), ("TTY_COMPATIBLE", "TTY_INTERACTIVE")])
@pytest.mark.parametrize("stderr", [False, True])
def test_only_a_terminal_gets_colours(monkeypatch, stderr, variables):
    for name in variables:
        monkeypatch.setenv(name, "1")
    redirected = contextlib.redirect_stderr if stderr else contextlib.redirect_stdout
    for stream in (io.StringIO(), Terminal()):
        with redirected(stream):
            shown = console(stderr=stderr)
            shown.print("[bold]word")
            assert shown.is_terminal == stream.isatty()
        assert ("\x1b" in stream.getvalue()) == stream.isatty()
        assert "word" in stream.getvalue()


def test_a_terminal_can_be_declared_plain(monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "0")
    with contextlib.redirect_stdout(Terminal()) as stream:
        console().print("[bold]word")
    assert stream.getvalue() == "word\n"


def test_a_closed_pipe_raises_as_print_does():
    reading, writing = os.pipe()
    os.close(reading)
    with contextlib.suppress(BrokenPipeError), open(writing, "w") as stream, contextlib.redirect_stdout(stream):
        shown = console()
        with pytest.raises(BrokenPipeError):
            shown.print("word")
        shown.print("dropped")


def test_all_consoles_are_made_here():
    files = Path(jaxlm.__file__).parent.rglob("*.py")
    assert [file.name for file in files if "rich.console" in file.read_text()] == ["terminal.py"]


def test_every_control_character_but_newline_and_tab_becomes_a_space():
    controls = [*range(0x20), *range(0x7F, 0xA0)]
    assert [i for i in controls if printable(chr(i)) != " "] == [ord("\t"), ord("\n")]
    assert printable("\n\t") == "\n\t"


def test_what_reorders_the_line_becomes_a_space():
    """The override of the Trojan Source attack (CVE-2021-42574), and its relatives."""
    assert printable("a\u202eb\u2066c\u2069") == "a b c "


@pytest.mark.parametrize("text", ["日本語 é\ufffd", "שלום\u200f", "👩\u200d🚀", "\xa0\xad", "\ud800"])
def test_other_text_is_unchanged(text):
    assert printable(text) == text
