"""What a run shows."""

import re

import pytest

from jaxlm.config import Config
from jaxlm.run.console import Console, metrics_line, samples_block
from jaxlm.run.events import MessageEvent, SamplesEvent, StepEvent


@pytest.fixture
def environment(monkeypatch):
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")


def step_event(step, **changes):
    values = dict(loss=8.2341, lr=3e-4, grad_norm=1.0, tokens=10, tokens_per_second=2567.0, seconds=1.0)
    return StepEvent(step, **values | {"step_seconds": 1.0, "seconds_left": 8.5 * 3600} | changes)


def test_console_line_is_the_users():
    line = metrics_line(100, 8.23412, 3e-4, 2567.4, 8.5 * 3600)
    assert line == "Step    100 | Loss 8.2341 | LR 3.00e-04 | Tokens/s   2567 | ETA 8.5h"


def test_console_line_of_the_last_step():
    line = metrics_line(50_000, 10.5, 2.96e-5, 123_456.0, 0)
    assert line == "Step  50000 | Loss 10.5000 | LR 2.96e-05 | Tokens/s 123456 | ETA 0s"


def test_samples_block_is_the_users():
    texts = [("Once upon a time", "Once upon a time\nthere was  a\tking.\n\nHe"), ("She", "She — 日")]
    assert samples_block(50, texts).split("\n") == [
        "=" * 70,
        "GENERATION SAMPLES (Step 50)",
        "=" * 70,
        "1. Prompt: 'Once upon a time'",
        "   → Once upon a time there was a king. He",
        "2. Prompt: 'She'",
        "   → She — 日",
        "=" * 70,
    ]


def test_piped_only_the_lines_appear(capsys):
    console = Console(Config(), 0)
    long_line = "Step 1 [bold] :smile: 3.5 " + "word " * 60
    console(MessageEvent(long_line))
    console(step_event(3))
    console(MessageEvent("second"))
    console.close()
    assert capsys.readouterr() == (f"{long_line}\nsecond\n", "")


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"])
def test_no_variable_brings_the_bar_into_a_pipe(environment, monkeypatch, capsys, variable):
    monkeypatch.setenv(variable, "1")
    console = Console(Config(), 0)
    console(step_event(3))
    console(MessageEvent("a line"))
    console.make_room()
    console.close()
    assert capsys.readouterr() == ("a line\n", "")


@pytest.mark.parametrize("code", ["\x1b]0;title\x07", "\x1bc", "\x00", "\x08", "\x7f", "\x9b2J"])
def test_samples_cannot_control_the_terminal(capsys, code):
    console = Console(Config(), 0)
    console(SamplesEvent(5, (("A", f"A{code}b"),)))
    console.close()
    assert re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", capsys.readouterr().out) is None


def test_a_line_has_the_mean_loss_and_the_median_speed_since_the_last_line(capsys):
    config = Config(batch_size=1, grad_accum_steps=1, eval_interval=3)
    console = Console(config, 60)
    for step, (loss, seconds) in enumerate(
        [(9.0, 9.0), (9.0, 9.0), (9.0, 9.0), (1.0, 2.0), (2.0, 1.0), (6.0, 600.0)], 61
    ):
        console(step_event(step, loss=loss, step_seconds=seconds))
    console.close()
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == metrics_line(66, 3.0, 3e-4, config.tokens_per_step / 2.0, 8.5 * 3600)
