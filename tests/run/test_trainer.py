"""The training run from the command to the files, on a text of a few kilobytes."""

import contextlib
import dataclasses
import errno
import functools
import itertools
import os
import re
import resource
import shutil
import signal
import threading
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.config import Config
from jaxlm.core.decoder import Decoder
from jaxlm.core.model import loss_and_gradient
from jaxlm.core.train_step import init_state
from jaxlm.data.token_files import train_batch_stream
from jaxlm.device import distributed
from jaxlm.errors import RunError, Stopped, UsageError, disk_advice
from jaxlm.interop.huggingface import write_model
from jaxlm.main import open_data
from jaxlm.run import trainer
from jaxlm.run.checkpoint import Checkpoints
from jaxlm.run.clock import Clock
from jaxlm.run.console import Console
from jaxlm.run.events import (
    EvaluationEvent,
    MessageEvent,
    NotSavedEvent,
    PauseEvent,
    PauseStartEvent,
    SamplesEvent,
    SavedEvent,
    SavingEvent,
    SkippedEvent,
    StepEvent,
    StoppingEvent,
    WarningEvent,
)
from jaxlm.run.memory import batch_shape, state_shapes
from jaxlm.run.records import Records
from jaxlm.run.saver import Saver
from jaxlm.run.signals import STOP_SIGNALS
from jaxlm.storage import atomic
from tests import tiny_run
from tests.storage.test_tensorboard import events as board_events
from tests.tiny_run import assert_same_bits, config_of, is_one_line, rows, saved_state

LAST = 12
HANDLERS = {number: signal.getsignal(number) for number in STOP_SIGNALS}  # before any run
KEYS = ["step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "seconds"]
KEYS += [f"update_ratio_{kind}" for kind in ("embedding", "matrix", "norm_scale")]
VAL_KEYS = ["val_loss", "val_bits_per_byte"]
POISON = 298  # a token that no text has; the tests make its loss nan
ADVICE = disk_advice(OSError(errno.EFBIG, "File too large"))
train = functools.partial(tiny_run.train, share="plain")


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    with tiny_run.workplace(tmp_path_factory, trained=True) as place:
        yield place


@pytest.fixture(scope="module")
def console(place):
    """What the uninterrupted run in `run` shows."""
    return tiny_run.trained_run()[1]


def at_step(patch, step, do):
    """Calls `do` after the row of `step` is written."""
    record = Records.__call__

    def record_and_do(self, event):
        record(self, event)
        if isinstance(event, StepEvent) and event.step == step:
            do()

    patch.setattr(Records, "__call__", record_and_do)


def collect_events(patch):
    """The list to which a run adds its events."""
    events, record = [], Records.__call__

    def record_and_collect(self, event):
        events.append(event)
        record(self, event)

    patch.setattr(Records, "__call__", record_and_collect)
    return events


def of_type(events, *types):
    return [event for event in events if isinstance(event, types)]


def send(number):
    return lambda: os.kill(os.getpid(), number)


def saved_steps(workdir):
    return sorted(int(path.name) for path in Path(workdir, "checkpoints").iterdir())


def without_clock(metrics):
    return [
        {key: value for key, value in row.items() if key not in ("seconds", "tokens_per_second")} for row in metrics
    ]


def copy_of_step_9(workdir):
    """Copies the run to `workdir` without its last checkpoint, so that three steps are left."""
    shutil.copytree("run", workdir, ignore=lambda folder, names: ["12"] if folder.endswith("checkpoints") else [])
    return workdir


def console_lines(console):
    pattern = r"Step +(\d+) \| Loss (\S+) \| LR (\S+) \| Tokens/s +(\d+) \| ETA (\S+)"
    return {int(match[1]): match for match in re.finditer(f"(?m)^{pattern}$", console)}


def test_the_work_directory_holds_the_named_files(console):
    names = {path.name for path in Path("run").iterdir()}
    assert names - {"library.log"} == {  # jax 0.4.34's orbax warns
        "config.json",
        "metrics.jsonl",
        "samples.jsonl",
        "sessions.jsonl",
        "checkpoints",
        "final_model",
        "tensorboard",
    }
    assert sorted(int(path.name) for path in Path("run/checkpoints").iterdir()) == [3, 6, 9, 12]
    assert list(Path("run/tensorboard").iterdir())
    assert (config_of("run").batch_size, config_of("run").sample.prompts[1]) == (2, "The king")


def test_metrics_have_one_row_per_step_with_the_named_keys(console):
    metrics = rows("run/metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, LAST + 1))
    assert [list(row) for row in metrics] == [KEYS + VAL_KEYS * (row["step"] % 4 == 0) for row in metrics]
    assert [row["tokens"] for row in metrics] == [64 * row["step"] for row in metrics]
    seconds = [row["seconds"] for row in metrics]
    assert seconds[0] > 0
    assert seconds == sorted(seconds)
    assert all(row["tokens_per_second"] > 0 and row["grad_norm"] > 0 for row in metrics)


def test_the_learning_rate_warms_up_and_decays(console):
    rates = [row["lr"] for row in rows("run/metrics.jsonl")]
    assert rates.index(max(rates)) == 2
    assert max(rates) == pytest.approx(1e-2)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] < 0.15 * 1e-2


def test_the_model_learns(console):
    losses = [row["loss"] for row in rows("run/metrics.jsonl")]
    assert losses[0] == pytest.approx(np.log(300), rel=0.02)
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.slow
def test_the_host_loop_gives_the_same_losses_and_samples(console):
    train("host-loop", "--config.model.implementation=apple", "--config.microbatch_chunks=2", share="")
    for row, expected in zip(rows("host-loop/metrics.jsonl"), without_clock(rows("run/metrics.jsonl")), strict=True):
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-4)
    assert rows("host-loop/samples.jsonl") == rows("run/samples.jsonl")


def test_console_lines_come_early_and_at_intervals(console):
    assert list(console_lines(console)) == [1, 2, 4, 8, 12]
    assert console_lines(console)[12][5] == "0s"


def test_a_console_line_averages_the_loss_since_the_previous_line(console):
    losses = [row["loss"] for row in rows("run/metrics.jsonl")]
    before = 0
    for step, line in console_lines(console).items():
        assert float(line[2]) == pytest.approx(np.mean(losses[before:step]), abs=6e-5)
        assert float(line[3]) == pytest.approx(rows("run/metrics.jsonl")[step - 1]["lr"], rel=5e-3)
        before = step


def test_piped_the_console_has_lines_and_no_control_characters(console):
    assert re.search(r"[\x00-\x09\x0b-\x1f\x7f]", console) is None
    assert console.endswith("\n")


def test_the_header_describes_the_run(console):
    header = console[: console.index("Step ")]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state_shapes(config_of("run")).params))
    for part in (f"{parameters:,} parameters", "CPU", "12 steps", "64 tokens", "run", "tokens"):
        assert part in header
    tokens = len(np.memmap("tokens/train.bin", "<u2"))
    assert f"{12 * 64 / parameters:.3g} tokens a parameter" in header
    assert f"{12 * 64 / tokens:.3g} epochs" in header


def test_saves_are_announced(console):
    announced = re.findall(r"(?m)^  → Saved checkpoint: (\S+)$", console)
    assert announced == [f"checkpoints/{step}" for step in (3, 6, 9, 12)]


def test_samples_have_different_prompts_in_each_block(console):
    samples = rows("run/samples.jsonl")
    assert [list(row) for row in samples] == [["step", "prompt", "text"]] * 6
    assert [row["step"] for row in samples] == [6] * 3 + [12] * 3
    prompts = config_of("run").sample.prompts
    blocks = [tuple(row["prompt"] for row in samples if row["step"] == step) for step in (6, 12)]
    assert all(len(set(block)) == 3 and set(block) <= set(prompts) for block in blocks)
    assert set(blocks[0]) != set(blocks[1])
    assert all(row["text"].startswith(row["prompt"]) and len(row["text"]) > len(row["prompt"]) for row in samples)


@pytest.mark.slow
def test_samples_of_logits_that_are_not_finite_say_so_and_end_no_run(console, monkeypatch):
    monkeypatch.setattr(
        trainer, "generate", lambda *_: iter([np.array([[72, -1, 299], [72, 73, 299], [-1, 299, 299]])])
    )
    train("not-finite", "--config.max_steps=6")
    texts = [row["text"].removeprefix(row["prompt"]) for row in rows("not-finite/samples.jsonl")]
    assert texts == [" (the model's logits are not finite)", "ij", " (the model's logits are not finite)"]


def test_the_console_shows_the_samples_of_the_file(console):
    samples = [row for row in rows("run/samples.jsonl") if row["step"] == 6]
    lines = console.splitlines()
    start = lines.index("GENERATION SAMPLES (Step 6)")
    assert [lines[start - 1], lines[start + 1], lines[start + 8]] == ["=" * 70] * 3
    for number, row in enumerate(samples, 1):
        assert lines[start + 2 * number] == f"{number}. Prompt: '{row['prompt']}'"
        assert lines[start + 2 * number + 1].startswith(f"   → {row['prompt']}")


def whole_validation(params, config, ids):
    """Mean loss over all tokens but the first, in float64, from the logits of each window of `context` tokens."""
    context, loss_sum = config.model.context, 0.0
    logits = jax.jit(lambda inputs: Decoder(config.model).apply({"params": params}, inputs))
    for start in range(0, len(ids) - 1, context):
        window = np.asarray(ids[start : start + context + 1], np.int32)
        inputs = np.zeros((1, context), np.int32)
        inputs[0, : len(window) - 1] = window[:-1]
        scores = np.asarray(logits(inputs), np.float64)[0, : len(window) - 1]
        loss_sum += np.sum(np.log(np.exp(scores).sum(-1)) - scores[np.arange(len(window) - 1), window[1:]])
    return loss_sum / (len(ids) - 1)


def test_the_last_validation_uses_all_validation_data(console):
    config = tiny_run.resolved(config_of("run"))
    ids = np.fromfile("tokens/val.bin", "<u2")
    assert (len(ids) - 1) % config.model.context
    assert len(ids) > 2 * config.data.eval_sequences * config.model.context
    last = rows("run/metrics.jsonl")[-1]
    expected = whole_validation(saved_state("run", LAST).params, config, ids)
    assert last["val_loss"] == pytest.approx(expected, rel=1e-5)
    assert f"{last['val_loss']:.4f} ({last['val_bits_per_byte']:.4f} bits per byte)" in console


def test_bits_per_byte_count_the_decoded_bytes_of_the_evaluated_sequences(console):
    from jaxlm.data.tokenizer import load_tokenizer

    tokenizer, config = load_tokenizer(300), tiny_run.resolved(config_of("run"))
    targets = np.fromfile("tokens/val.bin", "<u2")[1:]
    sequences = [targets[i : i + config.model.context] for i in range(0, len(targets), config.model.context)]
    ratios = []
    for row in rows("run/metrics.jsonl"):
        if "val_loss" in row:
            count = len(sequences) if row["step"] == LAST else config.data.eval_sequences
            ids = np.concatenate([sequences[i * len(sequences) // count] for i in range(count)])
            ratios.append(len(ids) / len(tokenizer.decode_bytes(ids[ids != tokenizer.end_of_text])))
            assert row["val_bits_per_byte"] == pytest.approx(row["val_loss"] * ratios[-1] / np.log(2), rel=1e-6)
    assert ratios[0] != pytest.approx(ratios[-1], rel=1e-3)


def wait_for(path):
    deadline = time.monotonic() + 20
    while not Path(path).exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def interruptions(console):
    """Each session of the run in `broken`: one crashes, two are stopped by signals, the last one ends."""

    class CrashError(Exception):
        pass

    def crash():
        wait_for("broken/checkpoints/3")
        raise CrashError

    sessions = []
    for step, do in ((5, crash), (7, send(signal.SIGTERM)), (9, send(signal.SIGINT))):
        with pytest.MonkeyPatch.context() as patch, pytest.raises((CrashError, Stopped)) as caught:
            at_step(patch, step, do)
            events = collect_events(patch)
            train("broken", "--config.max_checkpoints=2")
        caught.value.events = events
        steps = sorted(int(path.name) for path in Path("broken/checkpoints").iterdir())
        sessions.append((caught.value, steps, len(rows("broken/metrics.jsonl"))))
    sessions.append((train("broken", "--config.max_checkpoints=2"), None, None))
    return sessions


def test_a_signal_stops_the_run_with_its_status_and_a_checkpoint(interruptions):
    for (stopped, steps, lines), status, signalled in zip(interruptions[1:3], (143, 130), (7, 9), strict=True):
        assert isinstance(stopped, Stopped)
        assert stopped.exit_status == status
        assert is_one_line(stopped)
        assert signalled <= lines <= signalled + 2
        assert steps[-1] == lines
        assert f"step {lines}" in str(stopped)
        assert f"Saved checkpoint: checkpoints/{lines}" in stopped.console
        assert of_type(stopped.events, StoppingEvent) == [StoppingEvent(lines, status - 128)]
        assert stopped.events.index(StoppingEvent(lines, status - 128)) < stopped.events.index(SavingEvent(lines))


def test_a_resumed_run_says_so(interruptions):
    _, _, stopped_at = interruptions[2]
    assert f"step {stopped_at}" in interruptions[3][0].split("Step ")[0]
    assert [row["step"] for row in rows("broken/sessions.jsonl")] == [0, 3, *(each[2] for each in interruptions[1:3])]


def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(interruptions):
    whole, broken = saved_state("run", LAST), saved_state("broken", LAST)
    assert_same_bits(broken, whole)
    final = [Path(name, "final_model", "model.safetensors").read_bytes() for name in ("run", "broken")]
    assert final[0] == final[1]


def test_an_interrupted_run_has_the_metrics_of_an_uninterrupted_one(interruptions):
    assert without_clock(rows("broken/metrics.jsonl")) == without_clock(rows("run/metrics.jsonl"))
    seconds = [row["seconds"] for row in rows("broken/metrics.jsonl")]
    assert seconds == sorted(seconds)


def test_an_interrupted_run_has_the_samples_of_an_uninterrupted_one(interruptions):
    assert Path("broken/samples.jsonl").read_bytes() == Path("run/samples.jsonl").read_bytes()


@pytest.mark.slow
def test_an_interrupted_second_schedule_ends_with_the_bits_of_an_uninterrupted_one(console):
    flags = ["--config.max_steps=18", f"--config.optimizer.lr_restart_step={LAST}"]
    for workdir in ("longer", "broken-longer"):
        shutil.copytree("run", workdir)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        at_step(patch, 14, send(signal.SIGTERM))
        train("broken-longer", *flags)
    for workdir in ("longer", "broken-longer"):
        train(workdir, *flags)
    assert_same_bits(saved_state("broken-longer", 18), saved_state("longer", 18))
    metrics = rows("longer/metrics.jsonl")
    assert without_clock(rows("broken-longer/metrics.jsonl")) == without_clock(metrics)
    rates = [2e-3, 4e-3, 6e-3, *[1e-3 + 2.5e-3 * (1 + np.cos(np.pi * t)) for t in (1 / 4, 2 / 4, 3 / 4)]]
    assert [row["lr"] for row in metrics[LAST:]] == pytest.approx(rates)


def test_the_signal_handlers_are_restored(interruptions):
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == HANDLERS


@pytest.mark.parametrize(
    ("number", "stops"),
    [(signal.SIGINT, True), pytest.param(signal.SIGTERM, True, marks=pytest.mark.slow), (signal.SIGHUP, False)],
)
def test_a_run_in_the_background_obeys_all_signals_but_an_ignored_hangup(console, number, stops, tmp_path):
    """A script starts background jobs with SIGINT ignored, nohup with SIGHUP ignored."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, 10, send(number))
            with pytest.raises(Stopped) if stops else contextlib.nullcontext():
                train(copy_of_step_9(str(tmp_path / "background")))
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_finished_run_that_is_started_again_does_nothing(console):
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    shown = train("run")
    assert "Step " not in shown.replace("Resuming from step", "")
    assert "Saved" not in shown
    after = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert {path for path in before if after.get(path) != before[path]} == set()
    assert all("tensorboard" in path.parts for path in after.keys() - before.keys())


@pytest.mark.parametrize(
    "flag", ["seed=1", "batch_size=4", "grad_accum_steps=1", "model.layers=1", "model.heads=1", "optimizer.name=muon"]
)
def test_a_work_directory_of_other_settings_is_refused(console, flag):
    before = tiny_run.listing(Path("run"))
    with pytest.raises(UsageError) as caught:
        train("run", f"--config.{flag}")
    assert is_one_line(caught.value)
    name, value = flag.split("=")
    assert re.search(rf"\b{name} is {value}\b", str(caught.value))
    assert "run" in str(caught.value)
    assert tiny_run.listing(Path("run")) == before


def test_a_checkpoint_of_other_settings_is_refused_without_config_json(console):
    shutil.copytree("run", "nameless")
    Path("nameless/config.json").unlink()
    with pytest.raises(UsageError, match="seed is 1"):
        train("nameless", "--config.seed=1")


def test_intervals_may_change(console):
    names = ("eval_interval=5", "save_interval=13", "generation_interval=100", "max_checkpoints=1")
    shown = train(copy_of_step_9("other-intervals"), *(f"--config.{name}" for name in names))
    assert rows("other-intervals/metrics.jsonl")[:9] == rows("run/metrics.jsonl")[:9]
    assert [row["step"] for row in rows("other-intervals/metrics.jsonl") if "val_loss" in row] == [4, 8, 10, 12]
    assert [path.name for path in Path("other-intervals/checkpoints").iterdir()] == ["12"]
    assert list(console_lines(shown)) == [10, 12]
    assert config_of("other-intervals").eval_interval == 5


@pytest.mark.slow
def test_settings_that_may_change_are_accepted(console):
    shutil.copytree("run", "changed")
    names = (
        "eval_interval=7",
        "save_interval=13",
        "generation_interval=100",
        "max_steps=14",
        "microbatch_chunks=2",
        "max_nonfinite_microbatches=3",
    )
    flags = [f"--config.{name}" for name in (*names, "max_checkpoints=1", "optimizer.learning_rate=1e-3")]
    shown = train("changed", *flags)
    metrics = rows("changed/metrics.jsonl")
    assert metrics[:LAST] == rows("run/metrics.jsonl")
    assert [row["step"] for row in metrics[LAST:]] == [13, 14]
    assert metrics[-1]["lr"] < 2e-3
    assert [path.name for path in Path("changed/checkpoints").iterdir()] == ["14"]
    assert list(console_lines(shown)) == [14]
    assert config_of("changed").max_steps == 14


def test_other_tokens_are_refused(console):
    tiny_run.write_text(Path("other.txt"), seed=1)
    before = tiny_run.listing(Path("run"))
    with pytest.raises(UsageError) as caught:
        train("run", "--config.data.corpus=other.txt", "--config.data.dir=")
    assert is_one_line(caught.value)
    assert "train_" in str(caught.value)
    changed = {path for path, held in tiny_run.listing(Path("run")).items() if before.get(path) != held}
    assert changed <= {"run/config.json"}


def test_rows_are_on_the_disk_before_their_checkpoint(monkeypatch):
    """So a power cut leaves no checkpoint whose steps are missing from the files."""
    on_disk, fsync, begun = {}, os.fsync, []

    def watched_fsync(descriptor):
        fsync(descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        on_disk[os.path.basename(path)] = Path(path).read_bytes() if os.path.isfile(path) else b""

    save = Checkpoints.save

    def watched_save(self, step, state, meta):
        begun.append((step, on_disk["metrics.jsonl"].count(b"\n"), on_disk["samples.jsonl"].count(b"\n")))
        save(self, step, state, meta)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Checkpoints, "save", watched_save)
    train("ordered")
    assert begun == [(3, 3, 0), (6, 6, 3), (9, 9, 3), (12, 12, 6)]


def full_from_to(patch, workdir, first, last):
    """No file can grow from the row of step `first`, after the checkpoint of step 3, until that of `last`."""
    room = contextlib.ExitStack()
    record = Records.__call__

    def record_and_fill(self, event):
        step = event.step if isinstance(event, StepEvent) else 0
        if step == first:
            wait_for(f"{workdir}/checkpoints/3")
            room.enter_context(tiny_run.disk_room(0))
        record(self, event)
        if step == last:
            room.close()

    patch.setattr(Records, "__call__", record_and_fill)


def test_a_full_disk_costs_only_the_saves_meanwhile(monkeypatch, console):
    full_from_to(monkeypatch, "filled", 5, 10)
    shown = train("filled")
    warned = re.findall(r"(?m)^  → Step (\d+) is not saved, (.*); the next save tries again$", shown)
    assert [int(step) for step, _ in warned] == [6, 9]
    assert all(reason.endswith(f"(File too large): {ADVICE}") for _, reason in warned)
    assert re.findall(r"Saved checkpoint: checkpoints/(\d+)", shown) == ["3", "12"]
    assert without_clock(rows("filled/metrics.jsonl")) == without_clock(rows("run/metrics.jsonl"))
    assert Path("filled/samples.jsonl").read_bytes() == Path("run/samples.jsonl").read_bytes()
    assert_same_bits(saved_state("filled", LAST), saved_state("run", LAST))
    assert sorted(path.name for path in Path("filled/checkpoints").iterdir()) == ["12", "3"]


def test_a_disk_that_does_not_answer_costs_only_a_save(monkeypatch, console):
    usage, asked = shutil.disk_usage, []

    def answer(path):
        asked.append(path)
        if len(asked) == 3:  # the first two questions come before its first step, the third with its first save
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return usage(path)

    monkeypatch.setattr(shutil, "disk_usage", answer)
    shown = train("unanswered")
    assert re.findall(r"Step (\d+) is not saved", shown) == ["3"]
    assert_same_bits(saved_state("unanswered", LAST), saved_state("run", LAST))


def test_a_run_that_cannot_save_its_last_step_says_so_and_resumes(console):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunError) as caught:
        full_from_to(patch, "too-full", 5, LAST + 1)
        try:
            train("too-full")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert is_one_line(caught.value)
    for part in ("step 12 is not saved", ADVICE, "resumes from step 3"):
        assert part in str(caught.value)
    assert "Resuming from step 3" in train("too-full")
    assert without_clock(rows("too-full/metrics.jsonl")) == without_clock(rows("run/metrics.jsonl"))
    assert_same_bits(saved_state("too-full", LAST), saved_state("run", LAST))


def test_damaged_checkpoints_cost_only_the_steps_since_the_last_whole_one(console):
    shutil.copytree("run", "hurt")
    for step in (9, 12):
        for path in Path(f"hurt/checkpoints/{step}/params").rglob("d/*"):
            path.write_bytes(path.read_bytes()[:-1])
    shown = train("hurt")
    skipped = re.findall(r"(?m)^Skipped checkpoints/(\d+): .+$", shown)
    assert skipped == ["12", "9"]
    assert "Resuming from step 6" in shown
    assert without_clock(rows("hurt/metrics.jsonl")) == without_clock(rows("run/metrics.jsonl"))
    assert Path("hurt/samples.jsonl").read_bytes() == Path("run/samples.jsonl").read_bytes()
    assert_same_bits(saved_state("hurt", LAST), saved_state("run", LAST))


def test_damaged_lines_of_metrics_are_named_and_dropped(console):
    copy_of_step_9("scratched")
    lines = Path("scratched/metrics.jsonl").read_bytes().splitlines(keepends=True)
    Path("scratched/metrics.jsonl").write_bytes(b"".join([*lines[:4], b"\0\0\0\n", *lines[5:]]))
    assert "scratched/metrics.jsonl had damaged lines" in train("scratched")
    assert [row["step"] for row in rows("scratched/metrics.jsonl")] == [1, 2, 3, 4, *range(6, LAST + 1)]


def poison(monkeypatch):
    """Makes the loss and the gradients of a micro-batch nan if it has the token POISON."""

    def poisoned(config, params, inputs, *others):
        loss, grads = loss_and_gradient(config, params, inputs, *others)
        factor = jax.numpy.where((inputs == POISON).any(), jax.numpy.nan, 1.0)
        return loss * factor, jax.tree.map(lambda grad: grad * factor, grads)

    monkeypatch.setattr("jaxlm.core.train_step.loss_and_gradient", poisoned)


def write_poisoned_tokens(directory, poisoned_batches, windows=60, context=16):
    """Writes token files in which exactly these micro-batches, of two windows each, have POISON."""
    Path(directory).mkdir()
    ids = np.random.default_rng(0).integers(1, 250, windows * context + 1).astype("<u2")
    ids.tofile(f"{directory}/val.bin")
    numbers = np.append(np.repeat(np.arange(windows), context), 0).astype("<u2")
    stream = train_batch_stream(numbers, context, 2, seed=0)
    for batch in range(max(poisoned_batches) + 1):
        window = next(stream)[0, 1]
        if batch in poisoned_batches:
            ids[window * context + 5] = POISON
    ids.tofile(f"{directory}/train.bin")
    return ids


POISONED = {0, 4, 9, 10, 15, 28}  # 9, 15 and 28 would end the steps 4, 6 and 12, at which intervals end


def test_non_finite_micro_batches_are_skipped_and_intervals_stay_exact(monkeypatch):
    poison(monkeypatch)
    ids = write_poisoned_tokens("poisoned", POISONED)
    flags = ("--config.data.dir=poisoned", "--config.max_nonfinite_microbatches=3")
    events = collect_events(monkeypatch)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped) as stopped:
        at_step(patch, 10, send(signal.SIGTERM))
        train("skipping", *flags, share="poisoned")
    shown = stopped.value.console + train("skipping", *flags, share="poisoned")

    metrics = rows("skipping/metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, LAST + 1))
    assert [row["step"] for row in metrics if "val_loss" in row] == [4, 8, 12]
    assert np.isfinite([row["loss"] for row in metrics]).all()
    assert [row["step"] for row in rows("skipping/samples.jsonl")] == [6] * 3 + [12] * 3
    assert saved_steps("skipping") == [3, 6, 9, 12]  # the stop's was a rolling one
    lines = re.findall(r"(?m)^.*not finite.*$", shown)
    assert len(lines) == len(POISONED)
    assert f"{len(POISONED)} so far" in lines[-1]
    assert [event.skipped for event in of_type(events, SkippedEvent)] == list(range(1, len(POISONED) + 1))

    config = tiny_run.resolved(config_of("skipping"))
    state, losses = jax.device_put(init_state(config), jax.devices()[0]), []
    with tiny_run.shared_compilation("poisoned"):
        train_step = trainer.make_train_step(config).lower(state, batch_shape(config)).compile()
    for number, batch in zip(range(24 + len(POISONED)), train_batch_stream(ids, 16, 2, seed=0), strict=False):
        if number not in POISONED:
            state, reported = train_step(state, batch)
            losses += [float(reported.loss)] * bool(reported.updated)
    assert_same_bits(saved_state("skipping", LAST).params, state.params)
    assert [row["loss"] for row in metrics] == losses


@pytest.fixture(scope="module")
def given_up(place):
    """The error of a run whose losses are nan after three and a half steps, and its checkpoints."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunError) as caught:
        poison(patch)
        write_poisoned_tokens("hopeless", range(7, 30))
        train("given-up", "--config.data.dir=hopeless", "--config.max_nonfinite_microbatches=5", share="poisoned")
    return caught.value, [path.name for path in Path("given-up/checkpoints").iterdir()]


def test_too_many_non_finite_micro_batches_end_the_run_in_one_line(given_up):
    error, _ = given_up
    assert is_one_line(error)
    for part in ("5 micro-batches in a row", "not finite", "step 3", "learning_rate"):
        assert part in str(error)
    assert [row["step"] for row in rows("given-up/metrics.jsonl")] == [1, 2, 3]


def test_a_run_that_gives_up_keeps_its_last_checkpoint(given_up):
    assert given_up[1] == ["3"]


class Pending:
    """A metric that logs when it is fetched."""

    def __init__(self, value, micro_step, log):
        self.value, self.micro_step, self.log = value, micro_step, log

    def __array__(self, dtype=None, copy=None):
        self.log.append(("fetched", self.micro_step))
        return np.asarray(self.value)


def test_metrics_are_fetched_after_the_next_step_is_dispatched(console):
    """Except at the end of an interval. Otherwise the device would wait for the host."""
    log = []

    class Compiled:
        def __init__(self, compiled):
            self.compiled, self.dispatched = compiled, 0

        def __call__(self, state, batch):
            self.dispatched += 1
            log.append(("dispatched", self.dispatched))
            state, metrics = self.compiled(state, batch)
            return state, jax.tree.map(lambda value: Pending(value, self.dispatched, log), metrics)

        def lower(self, *shapes):
            self.lowered = self.compiled.lower(*shapes)
            return self

        def compile(self):
            self.compiled = self.lowered.compile()
            return self

    with tiny_run.shared_compilation("plain"), pytest.MonkeyPatch.context() as patch:
        make_train_step = trainer.make_train_step
        patch.setattr(trainer, "make_train_step", lambda *arguments: Compiled(make_train_step(*arguments)))
        train("watched", share="")
    assert without_clock(rows("watched/metrics.jsonl")) == without_clock(rows("run/metrics.jsonl"))
    interval_ends = {2 * step for step in range(1, LAST + 1) if not (step % 4 and step % 3 and step % 6)}
    for micro_step in range(1, 2 * LAST + 1):
        first_fetch = log.index(("fetched", micro_step))
        dispatched = [number for kind, number in log[:first_fetch] if kind == "dispatched"]
        assert dispatched[-1] == micro_step + (micro_step not in interval_ends)


def test_events_come_in_order_and_hold_what_the_files_hold(monkeypatch, console):
    events = collect_events(monkeypatch)
    train("events")
    expected = []
    for step in range(1, LAST + 1):
        expected += [StepEvent] + [EvaluationEvent] * (step % 4 == 0)
        expected += [SamplesEvent] * (step % 6 == 0) + [SavingEvent] * (step % 3 == 0)
    at_any_time = (MessageEvent, PauseStartEvent, PauseEvent, SavedEvent)
    assert [type(event) for event in events if not isinstance(event, at_any_time)] == expected
    steps = of_type(events, StepEvent)
    assert [event.row() for event in steps] == rows("events/metrics.jsonl")
    assert all(type(value) in (int, float) for event in steps for value in event.row().values())
    assert of_type(events, EvaluationEvent) == [event.evaluation for event in steps if event.step % 4 == 0]
    samples = [(event.step, *sample) for event in of_type(events, SamplesEvent) for sample in event.samples]
    assert samples == [tuple(row.values()) for row in rows("events/samples.jsonl")]
    for step in (3, 6, 9, 12):
        assert events.index(SavingEvent(step)) < events.index(SavedEvent(step))
    pauses = [event.kind for event in of_type(events, PauseEvent)]
    assert pauses[0] == "compilation"
    assert sorted(pauses[1:]) == ["checkpoint"] * 4 + ["evaluation"] * 3 + ["samples"] * 2
    messages = [event.text for event in of_type(events, MessageEvent)]
    assert "parameters in" in messages[0]
    assert messages[-1].startswith("Done: 12 steps")


class Failing:
    """A listener that raises at the first event of a type, or in `close` (the empty tuple)."""

    def __init__(self, at, error):
        self.at, self.error, self.calls_after = at, error, 0
        self.failed = False

    def __call__(self, event):
        self.calls_after += self.failed
        if isinstance(event, self.at):
            self.fail()

    def fail(self):
        self.failed = True
        raise self.error

    def close(self):
        if self.at == ():
            self.fail()


def test_a_listener_that_raises_is_named_and_left_out(console, capsys):
    failing = [
        Failing(StepEvent, OSError(errno.ENOSPC, "No space left on device")),
        Failing(MessageEvent, ValueError("two\nlines")),
        Failing((), TimeoutError("cannot close")),
    ]
    config, workdir, events = tiny_run.resolved(config_of("run")), Path(copy_of_step_9("deserted")), []
    with tiny_run.shared_compilation("plain"):
        listeners = [*failing, events.append]
        trainer.Trainer(config, workdir, open_data(config), jax.devices()[0], listeners=listeners).train()
    shown, err = capsys.readouterr()
    named = re.findall(r"(?m)^  → The listener Failing failed and is left out \((\w+)", shown)
    assert sorted(named) == ["OSError", "TimeoutError", "ValueError"]
    assert "not saved" not in shown
    assert [(listener.failed, listener.calls_after) for listener in failing] == [(True, 0)] * 3
    assert err == ""
    assert [event.step for event in of_type(events, StepEvent)] == [10, 11, 12]
    assert sorted(int(path.name) for path in (workdir / "checkpoints").iterdir()) == [3, 6, 9, 12]
    assert without_clock(rows(workdir / "metrics.jsonl")) == without_clock(rows("run/metrics.jsonl"))
    assert_same_bits(saved_state(workdir, LAST), saved_state("run", LAST))


def test_a_slow_listener_delays_no_step(console):
    """It holds the first event until the run has written its final model."""
    workdir, seen = Path(copy_of_step_9("unhurried")), []
    model_written = threading.Event()

    def listener(event):
        model_written.wait(60)
        seen.append(event)
        if isinstance(event, MessageEvent) and event.text.startswith("Done"):
            seen.append("end")

    def write(*arguments):
        model_written.set()
        return write_model(*arguments)

    config = tiny_run.resolved(config_of("run"))
    with pytest.MonkeyPatch.context() as patch, tiny_run.shared_compilation("plain"):
        patch.setattr(trainer, "write_model", write)
        trainer.Trainer(config, workdir, open_data(config), jax.devices()[0], listeners=[listener]).train()
    assert [event.step for event in of_type(seen, StepEvent)] == [10, 11, 12]
    assert seen[-1] == "end"


def test_a_file_in_the_place_of_tensorboards_folder_is_named_and_stops_nothing(console):
    workdir = Path(copy_of_step_9("boardless"))
    shutil.rmtree(workdir / "tensorboard")
    (workdir / "tensorboard").write_text("a file")
    assert "TensorBoard's events are not written (File exists)" in train(str(workdir))
    assert_same_bits(saved_state(workdir, LAST), saved_state("run", LAST))


def test_a_console_that_fails_is_named_on_stderr(monkeypatch, console, capfd):
    def fail(self, event):
        raise OSError("no console")

    monkeypatch.setattr(Console, "__call__", fail)
    assert train(copy_of_step_9("mute")) == ""
    assert capfd.readouterr().err == "  → The listener Console failed and is left out (OSError: no console)\n"
    assert_same_bits(saved_state("mute", LAST), saved_state("run", LAST))


def test_records_that_fail_end_the_run(monkeypatch, console):
    """A checkpoint without the rows before it would break the resumed run's files."""

    def fail():
        raise OSError(errno.EIO, "Input/output error")

    at_step(monkeypatch, 5, fail)
    with pytest.raises(RunError, match="Input/output error"):
        train("unrecorded")
    assert len(rows("unrecorded/metrics.jsonl")) == 5


class StepAndSignal:
    """A compiled step that sends this process a signal within micro-batch `number`, and the state before it."""

    def __init__(self, compiled, number):
        self.compiled, self.number, self.calls = compiled, number, 0

    def __call__(self, state, batch):
        self.calls += 1
        if self.calls == self.number:
            send(signal.SIGTERM)()
        return self.compiled(state, batch)


def stop_in_micro_batch(number, workdir, *flags):
    """Trains until a signal comes in micro-batch `number`; returns the Stopped and the micro-batches dispatched."""
    compile_run, steps = trainer.Trainer._compile, []

    def compile_and_signal(self):
        batches, train_step = compile_run(self)
        steps.append(StepAndSignal(train_step, number))
        return batches, steps[0]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped) as stopped:
        patch.setattr(trainer.Trainer, "_compile", compile_and_signal)
        train(workdir, *flags)
    return stopped.value, steps[0].calls


# of 36 good micro-batches and two skipped ones, with the last of the steps before
@pytest.mark.slow
@pytest.mark.parametrize(
    ("workdir", "number", "step"), [("third", 13, 3), ("second", 21, 6), ("skipped", 11, 3), ("end", 24, 7)]
)
def test_a_stop_within_a_step_saves_the_step_before_and_resumes_exactly(monkeypatch, workdir, number, step):
    """Micro-batch 10 is skipped, so step 4 takes 10 to 13; a signal in its third drops what it has accumulated."""
    poison(monkeypatch)
    flags = ("--config.data.dir=poisoned-thirds", "--config.grad_accum_steps=3", "--config.max_checkpoints=20")
    poisoned = functools.partial(tiny_run.train, share="poisoned")
    monkeypatch.setattr(f"{__name__}.train", poisoned)
    if not Path("whole").exists():
        write_poisoned_tokens("poisoned-thirds", {2, 10}, windows=120)
        poisoned("whole", *flags, "--config.save_interval=1")
    stopped, dispatched = stop_in_micro_batch(number, workdir, *flags)
    assert dispatched == number
    assert stopped.exit_status == 143
    assert f"after step {step}:" in str(stopped)
    assert [row["step"] for row in rows(f"{workdir}/metrics.jsonl")] == list(range(1, step + 1))
    assert_same_bits(saved_state(workdir, step), saved_state("whole", step))
    assert Checkpoints(Path(workdir)).steps()[-1] == step
    poisoned(workdir, *flags)
    assert without_clock(rows(f"{workdir}/metrics.jsonl")) == without_clock(rows("whole/metrics.jsonl"))
    assert_same_bits(saved_state(workdir, LAST), saved_state("whole", LAST))


def test_a_stop_before_the_first_step_saves_nothing_and_says_so():
    stopped, dispatched = stop_in_micro_batch(1, "hasty")
    assert (dispatched, str(stopped)) == (1, "stopped before the first step was done: nothing is saved")
    assert saved_steps("hasty") == rows("hasty/metrics.jsonl") == []


def test_a_stop_after_a_saved_step_writes_no_checkpoint(console, monkeypatch):
    copy_of_step_9("resumed")
    events = collect_events(monkeypatch)
    stopped, _ = stop_in_micro_batch(1, "resumed")
    assert "after step 9:" in str(stopped)
    assert of_type(events, SavingEvent, StoppingEvent) == [StoppingEvent(9, signal.SIGTERM)]
    assert saved_steps("resumed") == [3, 6, 9]


def assert_same_as_run(workdir):
    """In its records, its state and its model."""
    assert without_clock(rows(f"{workdir}/metrics.jsonl")) == without_clock(rows("run/metrics.jsonl"))
    assert Path(workdir, "samples.jsonl").read_bytes() == Path("run/samples.jsonl").read_bytes()
    assert_same_bits(saved_state(workdir, LAST), saved_state("run", LAST))
    models = [Path(name, "final_model/model.safetensors").read_bytes() for name in ("run", workdir)]
    assert models[0] == models[1]


def board(workdir, tmp_path):
    """(step, tag) of each value in TensorBoard's files of a run, without the settings, which each session writes."""
    values = []
    for path in Path(workdir, "tensorboard").iterdir():
        folder = tmp_path / workdir / path.name
        folder.mkdir(parents=True)
        shutil.copy(path, folder)
        values += [(event.step, value.tag) for event in board_events(folder) for value in event.summary.value]
    return sorted((step, tag) for step, tag in values if not tag.startswith("_hparams_/"))


@pytest.mark.parametrize(
    ("step", "due"),
    [
        (6, [SamplesEvent]),
        pytest.param(8, [EvaluationEvent], marks=pytest.mark.slow),
        pytest.param(LAST, None, marks=pytest.mark.slow),
    ],
)
def test_after_a_signal_nothing_is_computed_and_the_next_session_does_it_first(
    console, monkeypatch, tmp_path, step, due
):
    workdir, events = f"interval-{step}", collect_events(monkeypatch)
    stopped, _ = stop_in_micro_batch(2 * step, workdir)
    assert f"after step {step}:" in str(stopped)
    metrics, samples = rows(f"{workdir}/metrics.jsonl"), rows(f"{workdir}/samples.jsonl")
    assert (metrics[-1]["step"], list(metrics[-1])) == (step, KEYS)
    assert step not in {row["step"] for row in samples}
    assert Checkpoints(Path(workdir)).steps()[-1] == step
    assert not Path(workdir, "final_model").exists()
    pauses = [event.kind for event in of_type(events, PauseEvent)]
    assert pauses.count("evaluation") == len(of_type(events, EvaluationEvent)) == (step - 1) // 4
    assert pauses.count("samples") == len(of_type(events, SamplesEvent)) == (step - 1) // 6

    del events[:]
    shown = train(workdir)
    done = [type(event) for event in of_type(events, StepEvent, EvaluationEvent, SamplesEvent)]
    assert done[: 1 if due else 2] == (due or [EvaluationEvent, SamplesEvent])
    assert f"Step {step:>6} |" not in shown  # its line is in the first session
    assert_same_as_run(workdir)
    assert board(workdir, tmp_path) == board("run", tmp_path)
    del events[:]
    train(workdir)
    assert [type(event) for event in events] == [MessageEvent] * 2


def signal_in_evaluation(patch, batch):
    """Sends a signal before this batch of the first evaluation; returns the numbers of the batches taken."""
    taken, batches = [], trainer.val_batches

    def batches_and_signal(*arguments):
        for number, each in enumerate(batches(*arguments), 1):
            taken.append(number)
            if number == batch:
                send(signal.SIGTERM)()
            yield each

    patch.setattr(trainer, "val_batches", batches_and_signal)
    return taken


def test_a_signal_ends_an_evaluation_and_the_next_session_does_it_again(console):
    """Here in the session of the step, and then in the one that resumes from it."""
    copy_of_step_9("weighed")
    for last_batch, resumed in ((2, 9), (1, LAST)):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped, match="after step 12") as stopped:
            taken = signal_in_evaluation(patch, last_batch)
            train("weighed")
        assert f"Resuming from step {resumed}" in stopped.value.console
        assert taken == list(range(1, last_batch + 1))
        assert [list(row) for row in rows("weighed/metrics.jsonl")[-2:]] == [KEYS, KEYS]
        assert saved_steps("weighed") == [3, 6, 9, 12]
        assert not Path("weighed/samples.jsonl").read_bytes().count(b'"step": 12')
    train("weighed")
    assert_same_as_run("weighed")


def test_a_signal_after_the_last_samples_comes_before_the_model(console, monkeypatch):
    copy_of_step_9("unpublished")
    shutil.rmtree("unpublished/final_model")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped, match="after step 12"):
        patch.setattr(trainer.Trainer, "_generate_samples", lambda *_: send(signal.SIGINT)() or ())
        train("unpublished")
    assert not Path("unpublished/final_model").exists()
    train("unpublished")
    assert_same_as_run("unpublished")


@pytest.mark.parametrize(
    "moment",
    [
        "in the row",
        *(pytest.param(moment, marks=pytest.mark.slow) for moment in ("after the row", "in the samples")),
        "after the samples",
    ],
)
def test_a_kill_while_a_session_does_what_was_due_loses_nothing(console, monkeypatch, moment):
    """Wherever it comes in the two files, they hold the former rows or the new ones."""
    workdir = copy_of_step_9(f"killed-{moment.replace(' ', '-')}")
    shutil.rmtree(f"{workdir}/final_model")
    stop_in_micro_batch(6, workdir)
    when, name = moment.split()[0], {"row": "metrics.jsonl", "samples": "samples.jsonl"}[moment.split()[-1]]
    before, write_file = rows(f"{workdir}/{name}"), atomic.write_file

    def write_and_die(path, data):
        if path.name == name:
            if when == "after":
                write_file(path, data)
            raise KeyboardInterrupt
        write_file(path, data)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(atomic, "write_file", write_and_die)
        train(workdir)
    now = rows(f"{workdir}/{name}")
    assert (now == before) == (when == "in")
    assert [row["step"] for row in rows(f"{workdir}/metrics.jsonl")] == list(range(1, LAST + 1))
    train(workdir)
    assert_same_as_run(workdir)


def test_a_rolling_checkpoint_comes_by_time_and_the_next_save_replaces_it(console, monkeypatch):
    """Each step takes six minutes by the run's clock."""
    existing, report = {}, Saver.report

    def report_and_list(self, wait=False):
        report(self, wait=True)
        if self.saved_step:
            existing[self.saved_step] = saved_steps("rolling")

    now, stream = [0.0], train_batch_stream

    def three_minutes_each(*arguments):
        for batch in stream(*arguments):
            now[0] += 180
            yield batch

    monkeypatch.setattr(trainer, "Clock", lambda seconds: Clock(seconds, lambda: now[0]))
    monkeypatch.setattr(trainer, "train_batch_stream", three_minutes_each)
    monkeypatch.setattr(Saver, "report", report_and_list)
    flags = ("--config.save_interval=6", "--config.save_minutes=12", "--config.max_checkpoints=1")
    train("rolling", *flags)
    assert existing == {2: [2], 4: [4], 6: [6], 8: [6, 8], 10: [6, 10], 12: [12]}
    assert_same_bits(saved_state("rolling", LAST), saved_state("run", LAST))


def test_no_rolling_checkpoint_comes_before_its_time_or_where_save_minutes_is_0():
    for minutes, seconds, due in ((30, 1799, False), (30, 1800, True), (0, 1e9, False), (0.5, 31, True)):
        now = [0.0]
        config = dataclasses.replace(Config(), save_minutes=float(minutes))
        saver = Saver(config, None, Clock(0, lambda now=now: now[0]), 0, None, None, None)
        now[0] = seconds
        assert saver.due(299, saver.is_late()) is due
        assert saver.due(300)


def test_a_run_whose_checkpoints_are_gone_stops_and_resumes_once_they_are_back(console, monkeypatch):
    monkeypatch.setattr("jaxlm.run.saver.LOOK_SECONDS", 0.0)
    folder, moved = Path("torn/checkpoints"), Path("torn/moved")
    record = Records.__call__

    def record_and_take_away(self, event):
        record(self, event)
        if event == SavedEvent(6):
            folder.rename(moved)

    monkeypatch.setattr(Records, "__call__", record_and_take_away)
    with pytest.raises(RunError, match=rf"{folder} was .*step 6 is .*: put it back, and the same") as caught:
        train("torn")
    assert is_one_line(caught.value)
    assert not folder.exists()
    moved.rename(folder)
    monkeypatch.undo()
    train("torn")
    assert_same_as_run("torn")


@pytest.mark.parametrize("what", ["renamed", "deleted", "replaced"])
def test_a_run_whose_folder_is_gone_stops_and_makes_no_new_one(console, monkeypatch, what):
    workdir, moved = Path(f"folder-{what}"), Path(f"folder-{what}-moved")

    def take_away():
        workdir.rename(moved)
        if what == "deleted":
            shutil.rmtree(moved)
        if what == "replaced":
            workdir.mkdir()

    record = Records.__call__

    def record_and_take_away(self, event):
        record(self, event)
        if event == SavedEvent(6):
            take_away()

    monkeypatch.setattr(Records, "__call__", record_and_take_away)
    gone = rf"{Path.cwd()}/{workdir}/checkpoints" if what == "replaced" else rf"{workdir}"
    with pytest.raises(RunError, match=rf"^{gone} was renamed.*step 6 is the last known to be saved") as caught:
        train(str(workdir))
    assert is_one_line(caught.value)
    assert "not saved" not in caught.value.console
    assert not workdir.exists() or list(workdir.iterdir()) == []
    if what == "renamed":
        train(str(moved))
        assert without_clock(rows(moved / "metrics.jsonl")) == without_clock(rows("run/metrics.jsonl"))
        assert_same_bits(saved_state(moved, LAST), saved_state("run", LAST))


def test_a_gone_folder_is_seen_between_saves(console, monkeypatch):
    monkeypatch.setattr("jaxlm.run.saver.LOOK_SECONDS", 0.0)
    at_step(monkeypatch, 4, lambda: Path("between").rename("between-moved"))
    with pytest.raises(RunError, match="the run stops"):
        train("between", "--config.save_interval=12")
    assert not Path("between").exists()
    assert len(rows("between-moved/metrics.jsonl")) < 6


@pytest.mark.parametrize(("platform", "lines"), [("darwin", 1), ("linux", 0)])
def test_on_a_mac_the_header_says_how_to_keep_it_awake(console, monkeypatch, platform, lines):
    monkeypatch.setattr(trainer.sys, "platform", platform)
    assert train("run").count("`caffeinate -i`") == lines


class FakeDevice:
    """A step in which micro-batch n takes n seconds of a clock that stands still otherwise.

    Dispatch takes the whole time (`waits`), as on some CPUs, or none: then a metric is ready when it is computed.
    """

    def __init__(self, run, clock, waits):
        self.run, self.clock, self.waits, self.dispatched, self.end = run, clock, waits, 0, 0.0

    def __call__(self, state, batch):
        self.run._timer.submit(lambda: None).result()  # a thread has run since the previous dispatch returned
        self.dispatched += 1
        n = self.dispatched
        self.end = max(self.end, self.clock.now) + n
        if self.waits:
            self.clock.now = self.end
        values = (n % 2 == 0, n // 2, 1.0, 1.0, 1.0, 0, 0)
        return state, trainer.Metrics(*(FakeMetric(value, self.end, self.clock) for value in values), {})


class FakeMetric:
    def __init__(self, value, end, clock):
        self.value, self.end, self.clock = value, end, clock

    def block_until_ready(self):
        self.clock.now = max(self.clock.now, self.end)

    def __array__(self, dtype=None, copy=None):
        self.block_until_ready()
        return np.asarray(self.value)


@pytest.mark.parametrize("waits", [True, False])
def test_each_row_has_the_seconds_of_its_own_step(console, monkeypatch, capsys, waits):
    """An evaluation takes 100 s, samples 1,000, a save 10,000."""
    clock = types.SimpleNamespace(now=0.0)

    def takes(seconds, result=None):
        def wait(*arguments, **others):
            clock.now += seconds
            return result

        return wait

    monkeypatch.setattr(trainer, "Clock", lambda seconds: Clock(seconds, lambda: clock.now))

    def evaluate(self, step, limit):
        clock.now += 100
        return EvaluationEvent(step, 1.0, 1.0)

    monkeypatch.setattr(trainer.Trainer, "_evaluate", evaluate)
    monkeypatch.setattr(trainer.Trainer, "_generate_samples", takes(1000, ()))
    monkeypatch.setattr(Saver, "save", takes(10_000))
    monkeypatch.setattr(Saver, "finish", takes(10_000))
    monkeypatch.setattr(
        trainer.Trainer, "_compile", lambda self: (itertools.repeat(np.zeros(1)), FakeDevice(self, clock, waits))
    )
    config, workdir = tiny_run.resolved(config_of("run")), Path(f"timed-{waits}")
    workdir.mkdir()
    events = collect_events(monkeypatch)
    run = trainer.Trainer(config, workdir, open_data(config), jax.devices()[0])
    with contextlib.closing(run):
        run.run_steps(LAST)
    own = {step: 4 * step - 1 for step in range(1, LAST + 1)}  # of micro-batches 2 step - 1 and 2 step
    assert {row["step"]: 64 / row["tokens_per_second"] for row in rows(workdir / "metrics.jsonl")} == own
    passed = 0.0
    for event in of_type(events, StepEvent, PauseEvent):
        passed += event.step_seconds if isinstance(event, StepEvent) else event.seconds
        evaluation = 100 * (isinstance(event, StepEvent) and event.step % 4 == 0)  # it comes before its event
        assert getattr(event, "seconds", 0) == passed - evaluation or isinstance(event, PauseEvent)
    lines = console_lines(capsys.readouterr().out)
    assert {step: int(line[4]) for step, line in lines.items()} == {
        step: round(64 / np.median([own[i] for i in range(first, step + 1)]))
        for first, step in ((1, 1), (2, 2), (3, 4), (5, 8), (9, 12))
    }


@pytest.mark.slow
def test_no_row_of_a_real_run_has_ten_times_the_tokens_per_second_of_the_others(console, monkeypatch):
    """An interval ends after every second step."""
    events = collect_events(monkeypatch)
    flags = ("batch_size=64", "max_steps=24", "eval_interval=2", "save_interval=24", "generation_interval=24")
    train("paced", *(f"--config.{flag}" for flag in flags))
    rates = [row["tokens_per_second"] for row in rows("paced/metrics.jsonl")]
    assert max(rates) < 10 * np.median(rates)
    before_last = events[: events.index(of_type(events, StepEvent)[-2])]
    seconds = [event.seconds for event in of_type(before_last, PauseEvent)]
    seconds += [event.step_seconds for event in of_type(before_last, StepEvent)]
    assert sum(seconds) == pytest.approx(of_type(before_last, StepEvent)[-1].seconds, rel=0.02)


def test_a_step_that_hangs_is_told_while_it_hangs(console, monkeypatch):
    """The monitor's seconds pass 500 times as fast."""
    events, compile_run = collect_events(monkeypatch), trainer.Trainer._compile

    def told():
        return [event for event in of_type(events, WarningEvent) if event.kind == "step"]

    def compile_and_hang(self):
        batches, train_step = compile_run(self)
        number = itertools.count(1)

        def step(state, batch):
            if next(number) == 15:
                told_before, deadline = len(told()), time.monotonic() + 20
                while len(told()) == told_before:
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
            return train_step(state, batch)

        return batches, step

    monkeypatch.setattr(trainer.Trainer, "_compile", compile_and_hang)
    monkeypatch.setattr(trainer, "TICK_SECONDS", 0.01)
    shown = train("hanging")
    assert f"  → {told()[0].text}" in shown.splitlines()
    assert without_clock(rows("hanging/metrics.jsonl")) == without_clock(rows("run/metrics.jsonl"))


def test_what_the_monitor_says_of_a_loss_is_an_event_and_a_line(console, monkeypatch):
    seen = {}

    def monitor():
        return lambda step, loss: seen.update({step: loss}) or ({"spike": "It jumps"} if step == 4 else {})

    events = collect_events(monkeypatch)
    monkeypatch.setattr(trainer, "LossMonitor", monitor)
    assert "  → It jumps" in train("jumping").splitlines()
    assert seen == {row["step"]: row["loss"] for row in rows("jumping/metrics.jsonl")}
    (warning,) = of_type(events, WarningEvent)
    assert warning == WarningEvent("spike", "It jumps")
    assert events[events.index(warning) - 1].step == 4


def test_rows_that_another_process_cannot_store_let_none_save(tmp_path, monkeypatch):
    """Else the processes would save different steps from then on."""
    (tmp_path / "run").mkdir()
    checkpoints, events = Checkpoints(tmp_path / "run"), []
    monkeypatch.setattr(checkpoints, "save", lambda *_: pytest.fail("one process saves alone"))
    monkeypatch.setattr(distributed, "exchange", lambda purpose, value="": ["RunError:the disk is full", value])
    saver = Saver(Config(), checkpoints, Clock(), 0, lambda seconds: {}, lambda: None, events.append)
    saver.save(300, None)
    assert events == [NotSavedEvent(300, "process 0: the disk is full")]


def test_a_save_that_fails_as_its_folder_has_gone_is_told_as_that(tmp_path, monkeypatch):
    """Not as a save that the next one tries again."""

    def wait():
        (tmp_path / "run").rename(tmp_path / "moved")
        raise RunError("cannot be written")

    (tmp_path / "run").mkdir()
    checkpoints, events = Checkpoints(tmp_path / "run"), []
    monkeypatch.setattr(checkpoints, "save", lambda *_: None)
    monkeypatch.setattr(checkpoints, "wait", wait)
    saver = Saver(Config(), checkpoints, Clock(), 0, lambda seconds: {}, lambda: None, events.append)
    saver.save(300, None)
    with pytest.raises(RunError, match=r"run was renamed, .*no step is saved"):
        saver.report(wait=True)
    assert events == [SavingEvent(300)]
