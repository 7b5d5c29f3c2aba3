"""The training command at its edge: what a person may get wrong, and the real process."""

import logging
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxlm.cli import read_config
from jaxlm.core.train_step import init_state
from jaxlm.device import backend, numerics
from jaxlm.errors import RunError, UsageError
from jaxlm.main import main
from jaxlm.run.checkpoint import checkpoint_bytes
from jaxlm.run.memory import compile_step, least_memory, step_memory
from jaxlm.run.quiet import quiet_libraries
from jaxlm.run.resume import check_room
from jaxlm.storage.lock import only_writer
from tests import tiny_run
from tests.tiny_run import CONFIG, disk_room, is_one_line, listing, rows, train

REPOSITORY = Path(__file__).parent.parent
TINY = ["--config", "tiny.py", "--workdir", "new"]
SHORT = ["--config.max_steps=3"]


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    with tiny_run.workplace(tmp_path_factory) as place:
        train("done", *SHORT)
        yield place


def refused(argv, error=UsageError):
    """The message, after a look at what the refusal left behind: nothing."""
    before = listing(Path())
    with pytest.raises(error) as caught:
        main(argv)
    assert is_one_line(caught.value)
    assert "Traceback" not in str(caught.value)
    after = {path: held for path, held in listing(Path()).items() if path in before or "__pycache__" not in path}
    assert after == before
    return str(caught.value)


def test_a_missing_config_file_is_named():
    assert "nowhere/near.py" in refused(["--config", "nowhere/near.py"])


def test_a_misspelt_config_file_is_named_with_the_nearest():
    message = refused(["--config=tinny.py"])
    assert "tinny.py" in message
    assert "did you mean tiny.py" in message


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("def get_config(:\n", "syntax"),
        ("import no_such_module_at_all\n", "no_such_module_at_all"),
        (CONFIG.replace("batch_size", "batch_sise"), "batch_size"),
        (CONFIG.replace("heads=2", "heads=3"), "heads"),
        (CONFIG.replace("heads=2", "haeds=2"), "haeds"),
        ("def get_config():\n    pass\n", "get_config"),
        ("\udcff", ""),
    ],
)
def test_a_config_file_that_fails_is_refused(source, named):
    Path("failing.py").write_text(source, errors="surrogateescape")
    assert named in refused(["--config", "failing.py", "--workdir", "new"])


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("def get_config():\n    raise ValueError('too\\nsmall')\n", "too small"),
        (CONFIG.replace("batch_size = 2", "batch_size = 'two'"), "batch_size"),
    ],
)
def test_an_error_in_a_config_file_is_said_without_its_traceback(source, named):
    Path("raising.py").write_text(source)
    message = refused(["--config", "raising.py", "--workdir", "new"])
    assert named in message
    assert len(message) < 500


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--config.batch_sise=4", "did you mean batch_size"),
        ("--config.model.widht=4", "did you mean width"),
        ("--config.modle.width=4", "did you mean model"),
        ("--config.batch_size=four", "batch_size"),
        ("--config.batch_size=1.5", "batch_size"),
        ("--config.batch_size", "batch_size"),
        ("--config.batch_size=0", "batch_size"),
        ("--config.optimizer.learning_rate=fast", "learning_rate"),
        ("--config.model.remat=perhaps", "remat"),
        ("--config.model=small", "model"),
        ("--config.max_steps=2", "warmup_steps"),
        ("--config.platform=gpu9", "platform"),
        ("--confg.batch_size=4", "confg"),
        ("--work=new", "work"),
        ("--workdir", "workdir"),
        ("stray", "stray"),
        ("--config.data.corpus=novel", "novels"),
        ("--config.data.corpus=no_such_text.txt", "no_such_text.txt"),
    ],
)
def test_a_wrong_flag_is_refused_by_name(flag, named):
    directory = [] if "corpus" not in flag else ["--config.data.dir=elsewhere"]
    assert named in refused([*TINY, *directory, flag])


@pytest.mark.parametrize(
    ("name", "held", "named"),
    [
        ("empty.txt", b"", "empty.txt"),
        ("latin.txt", "café".encode("latin-1") * 100, "latin.txt"),
        ("lines.jsonl", b'{"txt": "a"}\n', "line 1"),
    ],
)
def test_a_text_that_does_not_do_is_refused_by_name(name, held, named):
    Path(name).write_bytes(held)
    message = refused([*TINY, f"--config.data.corpus={name}", "--config.data.dir=elsewhere"])
    assert named in message


@pytest.mark.parametrize(
    ("held", "named"), [(b"\0\0\0", "3 bytes"), (b"\1\0" * 10, "17"), (b"\xff\xff" * 100, "65535"), (None, "train.bin")]
)
def test_token_files_that_do_not_do_are_refused(held, named):
    directory = Path("foreign")
    directory.mkdir(exist_ok=True)
    for name in ("train.bin", "val.bin"):
        (directory / name).unlink(missing_ok=True)
        if held is not None:
            (directory / name).write_bytes(held)
    if held is None:
        directory.rmdir()
        assert "foreign" in refused([*TINY, "--config.data.corpus=", "--config.data.dir=foreign"])
    else:
        assert named in refused([*TINY, "--config.data.dir=foreign"])


def test_a_prompt_longer_than_the_context_is_refused():
    assert "16" in refused([*TINY, f'--config.sample.prompts=("{"x" * 40}",)'])


@pytest.mark.parametrize("workdir", ["tiny.py", "tiny.py/below"])
def test_a_work_directory_that_cannot_be_written_is_a_failure_of_one_line(workdir):
    assert "tiny.py" in refused(["--config", "tiny.py", "--workdir", workdir], RunError)


@pytest.mark.parametrize("room", [200, 4_000, 20_000])
def test_a_full_disk_is_a_failure_of_one_line(room):
    """Whether the settings find no room, or the metrics, or a checkpoint."""
    with disk_room(room), pytest.raises(RunError) as caught:
        train(f"full-{room}", *SHORT)
    assert caught.value.exit_status == 1
    assert is_one_line(caught.value)


def test_a_model_that_cannot_take_its_place_is_a_failure_of_one_line():
    Path("taken").mkdir()
    Path("taken/final_model").write_text("a file")
    with pytest.raises(RunError, match="taken/final_model") as caught:
        train("taken", *SHORT)
    assert is_one_line(caught.value)
    assert Path("taken/final_model").read_text() == "a file"


def test_a_checkpoint_that_finds_no_room_says_nothing_beside_that_line(caplog, monkeypatch):
    monkeypatch.setattr("sys.unraisablehook", sys.unraisablehook)
    for name in ("absl", "asyncio"):
        caplog.set_level(logging.getLogger(name).level, name)  # so that it is restored
    quiet_libraries()
    with disk_room(20_000), pytest.raises(RunError, match="step 3 is not saved"):
        train("full-again", *SHORT)
    assert caplog.text == ""


def test_a_disk_without_room_for_the_run_is_refused_before_it_begins(monkeypatch):
    usage = shutil.disk_usage(".")
    state = jax.eval_shape(lambda: init_state(tiny_run.config_of("done")))
    weights = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.params))
    for steps, keep, saves in ((7, 5, 3), (12, 5, 4), (12, 2, 3)):
        flags = [f"--config.max_steps={steps}", f"--config.max_checkpoints={keep}"]
        needed = saves * checkpoint_bytes(state) + weights + 1000 * steps
        monkeypatch.setattr(shutil, "disk_usage", lambda path, needed=needed: usage._replace(free=needed - 1))
        message = refused(["--config", "tiny.py", "--workdir", "no/room", *flags])
        assert f"{needed / 1e9:.2f} GB" in message
        monkeypatch.setattr(shutil, "disk_usage", lambda path, needed=needed: usage._replace(free=needed))
        check_room(Path("no/room"), read_config(["--config", "tiny.py", *flags])[0])


def test_an_accelerator_that_computes_wrong_is_refused_before_anything_is_written(monkeypatch):
    device = SimpleNamespace(platform="mps")

    def refuse(config, device_given, say):
        assert (config.model.loops, device_given) == ("unrolled", device)
        raise RunError("sort differs")

    monkeypatch.setattr(backend, "start", lambda *_: device)
    monkeypatch.setattr(numerics, "require", refuse)
    assert refused([*TINY, "--force"], RunError) == "sort differs"


def test_the_start_says_the_plan_in_three_lines():
    console = train("planned", *SHORT)
    memory, disk, time = re.search(r"(?m)^(Memory: .*)\n(Disk: .*)\n(Time: .*)$", console).groups()
    assert f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.2f} GB" in memory
    assert "free" in disk
    assert "python -m jaxlm.plan" in time


def test_a_run_that_does_not_fit_in_memory_is_refused_unless_forced(monkeypatch):
    config = tiny_run.resolved(read_config(TINY[:2])[0])
    step = step_memory(config, compile_step(config))
    least = least_memory(config).total
    assert least < step.total - 1
    message = "python -m jaxlm.plan"
    monkeypatch.setattr(backend, "available_memory", lambda device: least - 1)
    assert message in refused([*TINY, *SHORT])
    monkeypatch.setattr(backend, "available_memory", lambda device: step.total - 1)
    with pytest.raises(UsageError, match=message) as caught:
        train("tight", *SHORT)
    assert is_one_line(caught.value)
    assert rows("tight/metrics.jsonl") == []
    assert not Path("tight/config.json").exists()  # which would refuse the settings that fit
    assert "Done: 3 steps" in train("tight", *SHORT, "--force")
    monkeypatch.setattr(backend, "available_memory", lambda device: step.total)
    assert "Done: 3 steps" in train("fits", *SHORT)


def test_a_second_run_in_the_same_place_is_refused_with_the_pid_and_host_of_the_first():
    shutil.copytree("done", "busy")
    with only_writer(Path("busy")):
        message = refused(["--config", "tiny.py", "--workdir", "busy", "--config.max_steps=5"])
    assert f"process {os.getpid()} on {socket.gethostname()}" in message


def test_a_damaged_config_json_is_refused():
    shutil.copytree("done", "damaged")
    Path("damaged/config.json").write_text('{"batch_size": 2')
    assert "config.json" in refused(["--config", "tiny.py", "--workdir", "damaged"])


def test_a_run_whose_only_checkpoint_is_damaged_is_refused_and_nothing_is_deleted():
    shutil.copytree("done", "unreadable")
    for file in Path("unreadable/checkpoints/3/params").rglob("manifest.ocdbt"):
        file.write_bytes(b"")
    assert "checkpoints/3" in refused(["--config", "tiny.py", "--workdir", "unreadable", *SHORT])


def test_the_work_directory_is_named_after_the_config_and_overrides_reach_the_run():
    main(["--config", "tiny.py", *SHORT, "--config.generation_interval=1"])
    assert [row["step"] for row in rows("runs/tiny/metrics.jsonl")] == [1, 2, 3]
    assert sorted({row["step"] for row in rows("runs/tiny/samples.jsonl")}) == [1, 2, 3]
    assert tiny_run.config_of("runs/tiny").generation_interval == 1


def test_a_run_begins_with_the_model_of_a_folder_and_needs_it_no_more():
    shutil.copytree("done/final_model", "begin")
    begin = ["--config.init_from=begin", "--config.seed=9"]
    train("begun", *SHORT, *begin, "--config.optimizer.learning_rate=1e-9")
    drawn = jax.tree.leaves(init_state(tiny_run.config_of("begun")).params)
    given, after = (jax.tree.leaves(tiny_run.saved_state(name, 3).params) for name in ("done", "begun"))
    for random, its, now in zip(drawn, given, after, strict=True):
        np.testing.assert_allclose(now, its, atol=1e-7)
        assert (random != now).any() or (random == its).all()
    shutil.rmtree("begin")
    train("begun", "--config.max_steps=6", *begin, "--config.optimizer.learning_rate=1e-9")
    assert rows("begun/metrics.jsonl")[-1]["step"] == 6
    assert "| began with | begin |" in Path("begun/final_model/README.md").read_text()
    assert "init_from" in refused(["--config", "tiny.py", "--workdir", "begun", "--config.init_from=elsewhere"])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--config.init_from=nowhere"], "nowhere/config.json"),
        (["--config.init_from=tokens"], "tokens/config.json"),
        (["--config.init_from=done/final_model", "--config.model.width=32"], "--config.model.width=16"),
        (["--config.init_from=done/final_model", "--config.model.tied=false"], "--config.model.tied=True"),
    ],
)
def test_a_folder_that_a_run_cannot_begin_with_is_refused_before_anything_is_prepared(flags, named):
    assert named in refused([*TINY, "--config.data.dir=unprepared", *flags])


def test_a_run_prepares_its_text_and_the_next_finds_it():
    flags = ("--config.data.dir=", *SHORT)
    assert "Preparing text.txt" in train("prepares", *flags)
    (directory,) = Path("data").iterdir()
    assert directory.name.startswith("text")
    assert directory.name.endswith("300")
    before = listing(Path("data"))
    assert "Preparing" not in train("prepares", *flags)
    assert listing(Path("data")) == before


def test_help_names_the_flags_and_ends_well(capsys):
    for flag in ("--help", "-h"):
        main([flag])
        shown = capsys.readouterr().out
        assert "--workdir" in shown
        assert "--config" in shown


def command(*argv):
    return subprocess.run(
        [sys.executable, "-m", "jaxlm.main", *argv],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )


def test_the_process_trains_and_ends_with_status_0():
    done = command("--config", "tiny.py", "--workdir", "process", *SHORT)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Step      3 | Loss " in done.stdout
    assert "GENERATION SAMPLES (Step 3)" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("process/final_model")
    assert [row["step"] for row in rows("process/metrics.jsonl")] == [1, 2, 3]


def test_the_process_ends_a_wrong_request_with_status_2_and_one_line_on_stderr():
    done = command("--config", "tiny.py", "--config.batch_sise=4")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "batch_size" in done.stderr
