"""The training run, from the command to the files, on a text of a few kilobytes."""

import contextlib
import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.core.model import Decoder, loss_and_gradient
from jaxlm.core.train_step import init_state, make_train_step
from jaxlm.data.token_files import train_batch_stream
from jaxlm.errors import RunError, Stopped, UsageError
from jaxlm.run import trainer
from jaxlm.run.checkpoint import Checkpoints
from jaxlm.run.monitor import Monitor
from tests import tiny_run
from tests.tiny_run import assert_same_bits, config_of, is_one_line, rows, saved_state, train

LAST = 12
HANDLERS = {number: signal.getsignal(number) for number in trainer.STOP_SIGNALS}  # before any run
KEYS = ["step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "seconds"]
VAL_KEYS = ["val_loss", "val_bits_per_byte"]
NEVER_SAID = 298  # a token that no text here has; the tests make losses of it nan


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    with tiny_run.workplace(tmp_path_factory) as place:
        yield place


@pytest.fixture(scope="module")
def console(place):
    """What the run in `whole`, which nothing interrupts, shows."""
    return train("whole")


def at_step(patch, step, do):
    """Has `do` done while the row of `step` is written."""
    record = Monitor.record

    def record_and_do(self, row):
        record(self, row)
        if row["step"] == step:
            do()

    patch.setattr(Monitor, "record", record_and_do)


def send(number):
    return lambda: os.kill(os.getpid(), number)


def without_clock(metrics):
    return [
        {key: value for key, value in row.items() if key not in ("seconds", "tokens_per_second")} for row in metrics
    ]


def console_lines(console):
    pattern = r"Step +(\d+) \| Loss (\S+) \| LR (\S+) \| Tokens/s +(\d+) \| ETA (\S+)"
    return {int(found[1]): found for found in re.finditer(f"(?m)^{pattern}$", console)}


def test_the_work_directory_holds_what_the_design_names(console):
    names = {path.name for path in Path("whole").iterdir()}
    assert names == {"config.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "final_model", "tensorboard"}
    assert sorted(int(path.name) for path in Path("whole/checkpoints").iterdir()) == [3, 6, 9, 12]
    assert list(Path("whole/tensorboard").iterdir())
    assert (config_of("whole").batch_size, config_of("whole").sample.prompts[1]) == (2, "The king")


def test_metrics_have_one_line_a_step_with_the_keys_of_the_design(console):
    metrics = rows("whole/metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, LAST + 1))
    assert [list(row) for row in metrics] == [KEYS + VAL_KEYS * (row["step"] % 4 == 0) for row in metrics]
    assert [row["tokens"] for row in metrics] == [64 * row["step"] for row in metrics]
    seconds = [row["seconds"] for row in metrics]
    assert seconds[0] > 0
    assert seconds == sorted(seconds)
    assert all(row["tokens_per_second"] > 0 and row["grad_norm"] > 0 for row in metrics)


def test_the_learning_rate_warms_up_and_decays(console):
    rates = [row["lr"] for row in rows("whole/metrics.jsonl")]
    assert rates.index(max(rates)) == 2
    assert max(rates) == pytest.approx(1e-2)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] < 0.15 * 1e-2


def test_the_model_learns(console):
    losses = [row["loss"] for row in rows("whole/metrics.jsonl")]
    assert losses[0] == pytest.approx(np.log(300), rel=0.02)
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.slow
def test_a_run_of_programs_without_loops_leaves_the_same_losses_and_texts(console):
    train("written-out", "--config.model.implementation=apple", "--config.microbatch_chunks=2")
    for found, expected in zip(
        rows("written-out/metrics.jsonl"), without_clock(rows("whole/metrics.jsonl")), strict=True
    ):
        assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-4)
    assert rows("written-out/samples.jsonl") == rows("whole/samples.jsonl")


def test_console_lines_come_early_and_at_the_intervals(console):
    assert list(console_lines(console)) == [1, 2, 4, 8, 12]
    assert console_lines(console)[12][5] == "0s"


def test_a_console_line_averages_the_loss_since_the_one_before(console):
    losses = [row["loss"] for row in rows("whole/metrics.jsonl")]
    before = 0
    for step, line in console_lines(console).items():
        assert float(line[2]) == pytest.approx(np.mean(losses[before:step]), abs=6e-5)
        assert float(line[3]) == pytest.approx(rows("whole/metrics.jsonl")[step - 1]["lr"], rel=5e-3)
        before = step


def test_piped_the_console_has_lines_and_no_control_characters(console):
    assert re.search(r"[\x00-\x09\x0b-\x1f\x7f]", console) is None
    assert console.endswith("\n")


def test_the_header_says_what_will_run(console):
    header = console[: console.index("Step ")]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(init_state(config_of("whole")).params))
    for part in (f"{parameters:,} parameters", "CPU", "12 steps", "64 tokens", "whole", "tokens"):
        assert part in header
    tokens = len(np.memmap("tokens/train.bin", "<u2"))
    assert f"{12 * 64 / parameters:.3g} tokens a parameter" in header
    assert f"{12 * 64 / tokens:.3g} epochs" in header


def test_saves_are_announced(console):
    announced = re.findall(r"(?m)^  → Saved checkpoint: (\S+)$", console)
    assert announced == [f"checkpoints/{step}" for step in (3, 6, 9, 12)]


def test_samples_are_of_different_prompts_and_change_from_block_to_block(console):
    samples = rows("whole/samples.jsonl")
    assert [list(row) for row in samples] == [["step", "prompt", "text"]] * 6
    assert [row["step"] for row in samples] == [6] * 3 + [12] * 3
    known = config_of("whole").sample.prompts
    blocks = [tuple(row["prompt"] for row in samples if row["step"] == step) for step in (6, 12)]
    assert all(len(set(block)) == 3 and set(block) <= set(known) for block in blocks)
    assert set(blocks[0]) != set(blocks[1])
    assert all(row["text"].startswith(row["prompt"]) and len(row["text"]) > len(row["prompt"]) for row in samples)


def test_the_console_shows_the_samples_that_the_file_holds(console):
    samples = [row for row in rows("whole/samples.jsonl") if row["step"] == 6]
    lines = console.splitlines()
    start = lines.index("GENERATION SAMPLES (Step 6)")
    assert [lines[start - 1], lines[start + 1], lines[start + 8]] == ["=" * 70] * 3
    for number, row in enumerate(samples, 1):
        assert lines[start + 2 * number] == f"{number}. Prompt: '{row['prompt']}'"
        assert lines[start + 2 * number + 1].startswith(f"   → {row['prompt']}")


def whole_validation(params, config, ids):
    """Mean nats of every token but the first, from the logits of each window of `context` tokens, in float64."""
    context, total = config.model.context, 0.0
    logits = jax.jit(lambda inputs: Decoder(config.model).apply({"params": params}, inputs))
    for start in range(0, len(ids) - 1, context):
        window = np.asarray(ids[start : start + context + 1], np.int32)
        inputs = np.zeros((1, context), np.int32)
        inputs[0, : len(window) - 1] = window[:-1]
        scores = np.asarray(logits(inputs), np.float64)[0, : len(window) - 1]
        total += np.sum(np.log(np.exp(scores).sum(-1)) - scores[np.arange(len(window) - 1), window[1:]])
    return total / (len(ids) - 1)


def test_the_last_validation_is_over_the_whole_text(console):
    config = tiny_run.resolved(config_of("whole"))
    ids = np.fromfile("tokens/val.bin", "<u2")
    assert (len(ids) - 1) % config.model.context
    assert len(ids) > 2 * config.data.eval_sequences * config.model.context
    last = rows("whole/metrics.jsonl")[-1]
    expected = whole_validation(saved_state("whole", LAST).params, config, ids)
    assert last["val_loss"] == pytest.approx(expected, rel=1e-5)
    assert f"{last['val_loss']:.4f} ({last['val_bits_per_byte']:.4f} bits per byte)" in console


def test_bits_per_byte_are_of_the_bytes_that_the_tokens_stand_for(console):
    from jaxlm.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(300)
    ids = np.fromfile("tokens/val.bin", "<u2")[1:]
    size = len(tokenizer.decode_bytes(ids[ids != tokenizer.end_of_text]))
    for row in rows("whole/metrics.jsonl"):
        if "val_loss" in row:
            assert row["val_bits_per_byte"] == pytest.approx(row["val_loss"] * len(ids) / np.log(2) / size, rel=1e-6)


def wait_for(path):
    deadline = time.monotonic() + 20
    while not Path(path).exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def interruptions(console):
    """What came of each session of the run in `broken`: one that crashes, two that signals stop, and the last."""

    class CrashError(Exception):
        pass

    def crash():
        wait_for("broken/checkpoints/3")
        raise CrashError

    found = []
    for step, do in ((5, crash), (7, send(signal.SIGTERM)), (9, send(signal.SIGINT))):
        with pytest.MonkeyPatch.context() as patch, pytest.raises((CrashError, Stopped)) as caught:
            at_step(patch, step, do)
            train("broken", "--config.max_checkpoints=2")
        steps = sorted(int(path.name) for path in Path("broken/checkpoints").iterdir())
        found.append((caught.value, steps, len(rows("broken/metrics.jsonl"))))
    found.append((train("broken", "--config.max_checkpoints=2"), None, None))
    return found


def test_a_signal_stops_the_run_with_its_status_and_a_checkpoint_of_the_last_step(interruptions):
    for (stopped, steps, lines), status, signalled in zip(interruptions[1:3], (143, 130), (7, 9), strict=True):
        assert isinstance(stopped, Stopped)
        assert stopped.exit_status == status
        assert is_one_line(stopped)
        assert signalled <= lines <= signalled + 2
        assert steps[-1] == lines
        assert f"step {lines}" in str(stopped)
        assert f"Saved checkpoint: checkpoints/{lines}" in stopped.console


def test_a_resumed_run_says_so(interruptions):
    _, _, stopped_at = interruptions[2]
    assert f"step {stopped_at}" in interruptions[3][0].split("Step ")[0]


def test_an_interrupted_run_ends_with_the_bits_of_the_uninterrupted_one(interruptions):
    whole, broken = saved_state("whole", LAST), saved_state("broken", LAST)
    assert_same_bits(broken, whole)
    final = [Path(name, "final_model", "model.safetensors").read_bytes() for name in ("whole", "broken")]
    assert final[0] == final[1]


def test_an_interrupted_run_has_the_losses_of_the_uninterrupted_one_without_gaps_or_repeats(interruptions):
    assert without_clock(rows("broken/metrics.jsonl")) == without_clock(rows("whole/metrics.jsonl"))
    seconds = [row["seconds"] for row in rows("broken/metrics.jsonl")]
    assert seconds == sorted(seconds)


def test_an_interrupted_run_writes_the_samples_of_the_uninterrupted_one(interruptions):
    assert Path("broken/samples.jsonl").read_bytes() == Path("whole/samples.jsonl").read_bytes()


def test_the_signals_are_given_back(interruptions):
    assert {number: signal.getsignal(number) for number in trainer.STOP_SIGNALS} == HANDLERS


@pytest.mark.parametrize(("number", "stops"), [(signal.SIGINT, True), (signal.SIGTERM, True), (signal.SIGHUP, False)])
def test_a_run_in_the_background_heeds_all_but_a_hangup_that_it_was_told_to_ignore(console, number, stops, tmp_path):
    """A script starts what it puts in the background with SIGINT ignored, nohup with SIGHUP ignored."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, 5, send(number))
            with pytest.raises(Stopped) if stops else contextlib.nullcontext():
                train(str(tmp_path / "background"))
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_second_ctrl_c_leaves_at_once_though_python_is_deep_in_other_code():
    """As in a compilation; there the handlers of the main thread have to wait."""
    code = """
import hashlib, os, threading
from jaxlm.run.trainer import Trainer
run = object.__new__(Trainer)
run.stop_signal, run.monitor = 0, type("Monitor", (), {"abandon": staticmethod(lambda: None)})
with run._signals():
    for seconds in (0.2, 0.6):
        threading.Timer(seconds, os.kill, (os.getpid(), 2)).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=40, env=environment)
    assert done.returncode == 130
    assert done.stderr == "Stopping after this step; Ctrl-C again to leave at once, without saving\n"


def test_a_finished_run_started_again_does_nothing(console):
    before = {path: path.read_bytes() for path in Path("whole").rglob("*") if path.is_file()}
    again = train("whole")
    assert "Step " not in again.replace("Going on from step", "")
    assert "Saved" not in again
    after = {path: path.read_bytes() for path in Path("whole").rglob("*") if path.is_file()}
    assert {path for path in before if after.get(path) != before[path]} == set()
    assert all("tensorboard" in path.parts for path in after.keys() - before.keys())


@pytest.mark.parametrize(
    "flag", ["seed=1", "batch_size=4", "grad_accum_steps=1", "model.layers=1", "model.heads=1", "optimizer.name=muon"]
)
def test_a_work_directory_of_other_settings_is_refused_with_the_difference(console, flag):
    before = tiny_run.listing(Path("whole"))
    with pytest.raises(UsageError) as caught:
        train("whole", f"--config.{flag}")
    assert is_one_line(caught.value)
    name, value = flag.split("=")
    assert re.search(rf"\b{name} is {value}\b", str(caught.value))
    assert "whole" in str(caught.value)
    assert tiny_run.listing(Path("whole")) == before


def test_a_checkpoint_of_other_settings_is_refused_though_config_json_is_gone(console):
    shutil.copytree("whole", "nameless")
    Path("nameless/config.json").unlink()
    with pytest.raises(UsageError, match="seed is 1"):
        train("nameless", "--config.seed=1")


def test_what_may_change_is_accepted(console):
    shutil.copytree("whole", "changed")
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
    assert metrics[:LAST] == rows("whole/metrics.jsonl")
    assert [row["step"] for row in metrics[LAST:]] == [13, 14]
    assert metrics[-1]["lr"] < 2e-3
    assert [path.name for path in Path("changed/checkpoints").iterdir()] == ["14"]
    assert list(console_lines(shown)) == [14]
    assert config_of("changed").max_steps == 14


def test_other_tokens_than_the_checkpoints_are_refused(console):
    tiny_run.write_text(Path("other.txt"), seed=1)
    before = tiny_run.listing(Path("whole"))
    with pytest.raises(UsageError) as caught:
        train("whole", "--config.data.corpus=other.txt", "--config.data.dir=other_tokens")
    assert is_one_line(caught.value)
    assert "train_" in str(caught.value)
    changed = {path for path, held in tiny_run.listing(Path("whole")).items() if before.get(path) != held}
    assert changed <= {"whole/config.json"}


def test_an_evaluation_step_writes_its_rows_to_the_disk_before_its_checkpoint(monkeypatch):
    """So that no power cut leaves a checkpoint whose steps the files do not know."""
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
    """No file has room from the row of step `first`, when the checkpoint of step 3 is there, until that of `last`."""
    room = contextlib.ExitStack()
    record = Monitor.record

    def record_and_fill(self, row):
        if row["step"] == first:
            wait_for(f"{workdir}/checkpoints/3")
            room.enter_context(tiny_run.disk_room(0))
        record(self, row)
        if row["step"] == last:
            room.close()

    patch.setattr(Monitor, "record", record_and_fill)


def test_a_disk_that_is_full_for_a_while_costs_the_saves_of_that_while_and_nothing_else(monkeypatch, console):
    full_from_to(monkeypatch, "filled", 5, 10)
    shown = train("filled")
    warned = re.findall(r"(?m)^  → Step (\d+) is not saved, (.*): make room; the next save tries again$", shown)
    assert [int(step) for step, _ in warned] == [6, 9]
    assert re.findall(r"Saved checkpoint: checkpoints/(\d+)", shown) == ["3", "12"]
    assert without_clock(rows("filled/metrics.jsonl")) == without_clock(rows("whole/metrics.jsonl"))
    assert Path("filled/samples.jsonl").read_bytes() == Path("whole/samples.jsonl").read_bytes()
    assert_same_bits(saved_state("filled", LAST), saved_state("whole", LAST))
    assert sorted(path.name for path in Path("filled/checkpoints").iterdir()) == ["12", "3"]


def test_a_disk_that_does_not_answer_costs_a_save_and_nothing_else(monkeypatch, console):
    usage, asked = shutil.disk_usage, []

    def answer(path):
        asked.append(path)
        if len(asked) == 3:  # the first two questions come before its first step, the third with its first save
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return usage(path)

    monkeypatch.setattr(shutil, "disk_usage", answer)
    shown = train("unanswered")
    assert re.findall(r"Step (\d+) is not saved", shown) == ["3"]
    assert_same_bits(saved_state("unanswered", LAST), saved_state("whole", LAST))


def test_a_run_that_cannot_save_its_last_step_says_so_and_goes_on_from_the_last_saved_one(console):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunError) as caught:
        full_from_to(patch, "too-full", 5, LAST + 1)
        try:
            train("too-full")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert is_one_line(caught.value)
    for part in ("step 12 is not saved", "make room", "goes on from step 3"):
        assert part in str(caught.value)
    assert "Going on from step 3" in train("too-full")
    assert without_clock(rows("too-full/metrics.jsonl")) == without_clock(rows("whole/metrics.jsonl"))
    assert_same_bits(saved_state("too-full", LAST), saved_state("whole", LAST))


def test_damage_to_the_newest_checkpoint_costs_the_steps_since_the_one_before(console):
    shutil.copytree("whole", "hurt")
    for step in (9, 12):
        for path in Path(f"hurt/checkpoints/{step}/params").rglob("d/*"):
            path.write_bytes(path.read_bytes()[:-1])
    shown = train("hurt")
    skipped = re.findall(r"(?m)^Skipped checkpoints/(\d+): .+$", shown)
    assert skipped == ["12", "9"]
    assert "Going on from step 6" in shown
    assert without_clock(rows("hurt/metrics.jsonl")) == without_clock(rows("whole/metrics.jsonl"))
    assert Path("hurt/samples.jsonl").read_bytes() == Path("whole/samples.jsonl").read_bytes()
    assert_same_bits(saved_state("hurt", LAST), saved_state("whole", LAST))


def test_damaged_lines_of_metrics_are_named_and_stop_nothing(console):
    shutil.copytree("whole", "scratched")
    shutil.rmtree("scratched/checkpoints/12")
    lines = Path("scratched/metrics.jsonl").read_bytes().splitlines(keepends=True)
    Path("scratched/metrics.jsonl").write_bytes(b"".join([*lines[:4], b"\0\0\0\n", *lines[5:]]))
    assert "scratched/metrics.jsonl had damaged lines" in train("scratched")
    assert [row["step"] for row in rows("scratched/metrics.jsonl")] == [1, 2, 3, 4, *range(6, LAST + 1)]


def poison(monkeypatch):
    """Makes the loss of a micro-batch nan, and so its gradients, where its text has the token NEVER_SAID."""

    def poisoned(config, params, inputs, *others):
        nats, grads = loss_and_gradient(config, params, inputs, *others)
        factor = jax.numpy.where((inputs == NEVER_SAID).any(), jax.numpy.nan, 1.0)
        return nats * factor, jax.tree.map(lambda grad: grad * factor, grads)

    monkeypatch.setattr("jaxlm.core.train_step.loss_and_gradient", poisoned)


def write_poisoned_tokens(directory, poisoned_batches, windows=60, context=16):
    """Token files of which just these micro-batches, of two windows each, hold NEVER_SAID."""
    Path(directory).mkdir()
    ids = np.random.default_rng(0).integers(1, 250, windows * context + 1).astype("<u2")
    ids.tofile(f"{directory}/val.bin")
    numbers = np.append(np.repeat(np.arange(windows), context), 0).astype("<u2")
    stream = train_batch_stream(numbers, context, 2, seed=0)
    for batch in range(max(poisoned_batches) + 1):
        window = next(stream)[0, 1]
        if batch in poisoned_batches:
            ids[window * context + 5] = NEVER_SAID
    ids.tofile(f"{directory}/train.bin")
    return ids


POISONED = {0, 4, 9, 10, 15, 28}  # 9, 15 and 28 would end the steps 4, 6 and 12, at which intervals end


def test_micro_batches_that_are_not_finite_are_skipped_and_the_intervals_stay_exact(monkeypatch):
    poison(monkeypatch)
    ids = write_poisoned_tokens("poisoned", POISONED)
    flags = ("--config.data.dir=poisoned", "--config.max_nonfinite_microbatches=3")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped) as stopped:
        at_step(patch, 10, send(signal.SIGTERM))
        train("skipping", *flags)
    shown = stopped.value.console + train("skipping", *flags)

    metrics = rows("skipping/metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, LAST + 1))
    assert [row["step"] for row in metrics if "val_loss" in row] == [4, 8, 12]
    assert np.isfinite([row["loss"] for row in metrics]).all()
    assert [row["step"] for row in rows("skipping/samples.jsonl")] == [6] * 3 + [12] * 3
    assert sorted(int(path.name) for path in Path("skipping/checkpoints").iterdir()) == [3, 6, 9, 11, 12]
    said = re.findall(r"(?m)^.*not finite.*$", shown)
    assert len(said) == len(POISONED)
    assert f"{len(POISONED)} so far" in said[-1]

    config = tiny_run.resolved(config_of("skipping"))
    state, losses = jax.device_put(init_state(config), jax.devices()[0]), []
    train_step = make_train_step(config).lower(state, jax.ShapeDtypeStruct((2, 17), np.int32)).compile()
    for number, batch in zip(range(24 + len(POISONED)), train_batch_stream(ids, 16, 2, seed=0), strict=False):
        if number not in POISONED:
            state, found = train_step(state, batch)
            losses += [float(found.loss)] * bool(found.updated)
    assert_same_bits(saved_state("skipping", LAST).params, state.params)
    assert [row["loss"] for row in metrics] == losses


@pytest.fixture(scope="module")
def given_up(place):
    """The error of a run that meets nothing but nan after three steps and a half, and its checkpoints then."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunError) as caught:
        poison(patch)
        write_poisoned_tokens("hopeless", range(7, 30))
        train("given-up", "--config.data.dir=hopeless", "--config.max_nonfinite_microbatches=5")
    return caught.value, [path.name for path in Path("given-up/checkpoints").iterdir()]


def test_too_many_in_a_row_that_are_not_finite_end_the_run_in_one_line(given_up):
    error, _ = given_up
    assert is_one_line(error)
    for part in ("5 micro-batches in a row", "not finite", "step 3", "learning_rate"):
        assert part in str(error)
    assert [row["step"] for row in rows("given-up/metrics.jsonl")] == [1, 2, 3]


def test_a_run_that_gives_up_has_its_last_checkpoint(given_up):
    assert given_up[1] == ["3"]


class Pending:
    """A metric that the device has not reported yet."""

    def __init__(self, value, micro_step, log):
        self.value, self.micro_step, self.log = value, micro_step, log

    def __array__(self, dtype=None, copy=None):
        self.log.append(("fetched", self.micro_step))
        return np.asarray(self.value)


def test_the_host_fetches_a_report_only_after_it_has_handed_out_the_next_step(monkeypatch, console):
    """Except at the end of an interval. Else the device would wait for the host."""
    make_train_step, log = trainer.make_train_step, []

    class Compiled:
        def __init__(self, compiled):
            self.compiled, self.handed_out = compiled, 0

        def __call__(self, state, batch):
            self.handed_out += 1
            log.append(("handed out", self.handed_out))
            state, metrics = self.compiled(state, batch)
            return state, jax.tree.map(lambda value: Pending(value, self.handed_out, log), metrics)

        def lower(self, *shapes):
            self.lowered = self.compiled.lower(*shapes)
            return self

        def compile(self):
            self.compiled = self.lowered.compile()
            return self

    monkeypatch.setattr(trainer, "make_train_step", lambda config: Compiled(make_train_step(config)))
    train("watched")
    assert without_clock(rows("watched/metrics.jsonl")) == without_clock(rows("whole/metrics.jsonl"))
    interval_ends = {2 * step for step in range(1, LAST + 1) if not (step % 4 and step % 3 and step % 6)}
    for micro_step in range(1, 2 * LAST + 1):
        first_fetch = log.index(("fetched", micro_step))
        handed_out = [number for kind, number in log[:first_fetch] if kind == "handed out"]
        assert handed_out[-1] == micro_step + (micro_step not in interval_ends)
