"""The training command: the real process, and what a person may get wrong."""

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
import pytest

from jaxlm.cli import read_config
from jaxlm.core.train_step import init_state
from jaxlm.device import backend, numerics
from jaxlm.errors import RunError, UsageError
from jaxlm.main import main
from jaxlm.run import trainer
from jaxlm.run.checkpoint import checkpoint_bytes
from jaxlm.run.memory import min_memory
from jaxlm.run.quiet import quiet_libraries
from jaxlm.run.resume import check_room, restore_or_init
from jaxlm.storage.lock import only_writer
from tests import tiny_run
from tests.tiny_run import CONFIG, assert_same_bits, disk_room, is_one_line, listing, rows, train

REPOSITORY = Path(__file__).parent.parent
TINY = ["--config", "tiny.py", "--workdir", "new"]
DONE = Path("run")


def command(*argv):
    words = [sys.executable, "-m", "jaxlm.main", *argv]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment)


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    with tiny_run.workplace(tmp_path_factory, trained=True) as place:
        yield place


def refused(argv, error=UsageError):
    """Checks that the command fails with one line and changes no file; gives that line."""
    before = listing(Path())
    with pytest.raises(error) as caught:
        main(argv)
    assert is_one_line(caught.value)
    assert "Traceback" not in str(caught.value)
    after = {path: content for path, content in listing(Path()).items() if path in before or "__pycache__" not in path}
    assert after == before
    return str(caught.value)


@pytest.mark.slow
def test_process_trains_and_ends_with_status_0():
    ended = command("--config", "tiny.py", "--config.max_steps=3", "--config.generation_interval=1")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "Step      3 | Loss " in ended.stdout
    assert "GENERATION SAMPLES (Step 3)" in ended.stdout
    assert ended.stdout.splitlines()[-1].endswith("runs/tiny/final_model")
    assert [row["step"] for row in rows("runs/tiny/metrics.jsonl")] == [1, 2, 3]
    assert sorted({row["step"] for row in rows("runs/tiny/samples.jsonl")}) == [1, 2, 3]


def test_run_starts_with_the_plan_in_three_lines():
    console = tiny_run.trained_run()[1]
    memory, disk, time = re.search(r"(?m)^(Memory: .*)\n(Disk: .*)\n(Time: .*)$", console).groups()
    assert f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.2f} GB" in memory
    assert "free" in disk
    assert "python -m jaxlm.plan" in time


def test_run_prepares_its_corpus_once():
    assert "Preparing text.txt" in train("prepared", "--config.data.dir=", share="plain")
    (directory,) = Path("data").iterdir()
    assert re.fullmatch(r"text.*300", directory.name)
    before = listing(Path("data"))
    assert "Preparing" not in train("prepared", "--config.data.dir=", share="plain")
    assert listing(Path("data")) == before


def test_help_and_usage_errors_need_no_jax():
    code = (
        "import sys\nfrom jaxlm.cli import status\nfrom jaxlm.main import main\n"
        "print([status(main, argv.split()) for argv in sys.argv[1:]], 'jax' in sys.modules)"
    )
    errors = ("--config nowhere", "--config tiny.py --config.batch_sise=4", "--config.data.corpus=novel")
    words = [sys.executable, "-c", code, "--help", "-h", *errors]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment)
    assert ended.stdout.splitlines()[-1] == "[0, 0, 2, 2, 2] False"
    assert ended.stderr.count("\n") == 3


def test_usage_error_ends_the_process_with_status_2_and_one_line_on_stderr():
    ended = command("--config", "tiny.py", "--config.batch_sise=4")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
    assert "batch_size" in ended.stderr


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
def test_config_file_that_fails_is_refused(source, named):
    Path("failing.py").write_text(source, errors="surrogateescape")
    assert named in refused(["--config", "failing.py", "--workdir", "new"])


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("def get_config():\n    raise ValueError('too\\nsmall')\n", "too small"),
        (CONFIG.replace("batch_size = 2", "batch_size = 'two'"), "batch_size"),
    ],
)
def test_error_in_a_config_file_has_no_traceback(source, named):
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
def test_wrong_flag_is_refused_by_name(flag, named):
    directory = [] if "corpus" not in flag else ["--config.data.dir=elsewhere"]
    assert named in refused([*TINY, *directory, flag])


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("empty.txt", b"", "empty.txt"),
        ("latin.txt", "café".encode("latin-1") * 100, "latin.txt"),
        ("lines.jsonl", b'{"txt": "a"}\n', "line 1"),
    ],
)
def test_unusable_corpus_is_refused_by_name(name, content, named):
    Path(name).write_bytes(content)
    message = refused([*TINY, f"--config.data.corpus={name}", "--config.data.dir=elsewhere"])
    assert named in message


@pytest.mark.parametrize(
    ("content", "named"),
    [(b"\0\0\0", "3 bytes"), (b"\1\0" * 10, "17"), (b"\xff\xff" * 100, "65535"), (None, "train.bin")],
)
def test_unusable_token_files_are_refused(content, named):
    directory = Path("foreign")
    directory.mkdir(exist_ok=True)
    for name in ("train.bin", "val.bin"):
        (directory / name).unlink(missing_ok=True)
        if content is not None:
            (directory / name).write_bytes(content)
    if content is None:
        directory.rmdir()
        assert "foreign" in refused([*TINY, "--config.data.corpus=", "--config.data.dir=foreign"])
    else:
        assert named in refused([*TINY, "--config.data.dir=foreign"])


def test_prompt_longer_than_the_context_is_refused():
    assert "16" in refused([*TINY, f'--config.sample.prompts=("{"x" * 40}",)'])


@pytest.mark.parametrize("workdir", ["tiny.py", "tiny.py/below"])
def test_work_directory_that_cannot_be_written_is_a_failure_of_one_line(workdir):
    assert "tiny.py" in refused(["--config", "tiny.py", "--workdir", workdir], RunError)


@pytest.mark.parametrize(
    ("room", "message"),
    [
        (200, "full-200"),
        pytest.param(4_000, "full-4000", marks=pytest.mark.slow),
        (20_000, "step 12 is not saved"),
    ],
)
def test_full_disk_is_a_failure_of_one_line(room, message, caplog, monkeypatch):
    """Whether there is no room for the settings, the metrics or a checkpoint."""
    monkeypatch.setattr("sys.unraisablehook", sys.unraisablehook)
    for name in ("absl", "asyncio"):
        caplog.set_level(logging.getLogger(name).level, name)  # so that it is restored
    quiet_libraries()
    with disk_room(room), pytest.raises(RunError, match=message) as caught:
        train(f"full-{room}", share="plain")
    assert caught.value.exit_status == 1
    assert is_one_line(caught.value)
    assert caplog.text == ""


def test_final_model_that_cannot_be_replaced_is_a_failure_of_one_line():
    shutil.copytree(DONE, "taken")
    shutil.rmtree("taken/final_model")
    Path("taken/final_model").write_text("a file")
    with pytest.raises(RunError, match="taken/final_model") as caught:
        train("taken")
    assert is_one_line(caught.value)
    assert Path("taken/final_model").read_text() == "a file"


def test_run_that_does_not_fit_on_the_disk_is_refused(monkeypatch):
    usage = shutil.disk_usage(".")
    state = jax.eval_shape(lambda: init_state(tiny_run.config_of(DONE)))
    weights = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.params))
    for steps, keep, saves in ((7, 5, 3), (12, 5, 4), (12, 2, 3)):
        flags = [f"--config.max_steps={steps}", f"--config.max_checkpoints={keep}"]
        needed = saves * checkpoint_bytes(state) + weights + 1000 * steps
        monkeypatch.setattr(shutil, "disk_usage", lambda path, needed=needed: usage._replace(free=needed - 1))
        message = refused(["--config", "tiny.py", "--workdir", "no/room", *flags])
        assert f"{needed / 1e9:.2f} GB" in message
        monkeypatch.setattr(shutil, "disk_usage", lambda path, needed=needed: usage._replace(free=needed))
        check_room(Path("no/room"), read_config(["--config", "tiny.py", *flags])[0])


def test_unsound_accelerator_is_refused_before_anything_is_written(monkeypatch):
    device = SimpleNamespace(platform="mps")

    def refuse(config, device_given, say):
        assert (config.model.implementation, device_given) == ("apple", device)
        raise RunError("sort differs")

    monkeypatch.setattr(backend, "start", lambda *_: device)
    monkeypatch.setattr(numerics, "require", refuse)
    assert refused([*TINY, "--force"], RunError) == "sort differs"


def test_run_that_does_not_fit_in_memory_is_refused_unless_forced(monkeypatch):
    least = min_memory(tiny_run.config_of(DONE)).total
    message = "python -m jaxlm.plan"
    monkeypatch.setattr(backend, "available_memory", lambda device: least - 1)
    assert message in refused(TINY)
    monkeypatch.setattr(backend, "available_memory", lambda device: least + 1)  # too little once the step is compiled
    with pytest.raises(UsageError, match=message) as caught:
        train("tight", share="plain")
    assert is_one_line(caught.value)
    assert rows("tight/metrics.jsonl") == []
    assert not Path("tight/config.json").exists()  # it would refuse settings that fit
    assert "Done: 12 steps" in train("tight", "--force", share="plain")


def test_second_run_in_the_work_directory_is_refused_with_pid_and_host_of_the_first():
    shutil.copytree(DONE, "busy")
    with only_writer(Path("busy")):
        message = refused(["--config", "tiny.py", "--workdir", "busy"])
    assert f"process {os.getpid()} on {socket.gethostname()}" in message


def test_damaged_config_json_is_refused():
    shutil.copytree(DONE, "damaged")
    Path("damaged/config.json").write_text('{"batch_size": 2')
    assert "config.json" in refused(["--config", "tiny.py", "--workdir", "damaged"])


def test_run_whose_only_checkpoint_is_damaged_is_refused_and_nothing_is_deleted():
    shutil.copytree(DONE, "unreadable")
    for step in (3, 6, 9):
        shutil.rmtree(f"unreadable/checkpoints/{step}")
    for file in Path("unreadable/checkpoints/12/params").rglob("manifest.ocdbt"):
        file.write_bytes(b"")
    assert "checkpoints/12" in refused(["--config", "tiny.py", "--workdir", "unreadable"])


def test_run_starts_from_a_model_folder_and_resumes_without_it(monkeypatch):
    shutil.copytree(DONE / "final_model", "initial")
    starts = []

    def noting(*arguments):
        restored = restore_or_init(*arguments)
        starts.append(jax.device_get(restored[0].params))
        return restored

    monkeypatch.setattr(trainer, "restore_or_init", noting)
    flags = ["--config.init_from=initial", "--config.seed=9"]
    train("continued", *flags, share="plain")
    assert_same_bits(starts[0], tiny_run.saved_state(DONE, 12).params)
    shutil.rmtree("initial")
    assert "Done: 12 steps" in train("continued", *flags)
    assert "| initialised from | initial |" in Path("continued/final_model/README.md").read_text()
    assert "init_from" in refused(["--config", "tiny.py", "--workdir", "continued", "--config.init_from=elsewhere"])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--config.init_from=nowhere"], "nowhere/config.json"),
        (["--config.init_from=tokens"], "tokens/config.json"),
        (["--config.init_from=run/final_model", "--config.model.width=32"], "--config.model.width=16"),
        (["--config.init_from=run/final_model", "--config.model.tied=false"], "--config.model.tied=True"),
    ],
)
def test_unfit_model_folder_is_refused_before_the_corpus_is_prepared(flags, named):
    assert named in refused([*TINY, "--config.data.dir=unprepared", *flags])


def test_help_names_the_flags(capsys):
    main(["--help"])
    shown = capsys.readouterr().out
    for flag in ("--workdir", "--config", "--[no]force"):
        assert flag in shown


def test_room_is_needed_for_the_steps_after_the_newest_checkpoint_only(monkeypatch, tmp_path):
    config = read_config(["--config", "tiny.py", "--config.max_steps=12", "--config.save_interval=3"])[0]
    state = jax.eval_shape(lambda: init_state(config))
    free = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.params)) + 3 * checkpoint_bytes(state) // 2
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    (tmp_path / "checkpoints/3").mkdir(parents=True)
    with pytest.raises(UsageError, match="make room"):
        check_room(tmp_path, config)
    (tmp_path / "checkpoints/12").mkdir()
    check_room(tmp_path, config)
