"""The training command: the real process, and what a person may get wrong."""

import json
import logging
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from safetensors.numpy import load_file, save_file

from jaxlm import main as command_main
from jaxlm import report
from jaxlm.cli import read_config
from jaxlm.core.train_step import init_state
from jaxlm.data import corpus
from jaxlm.device import backend, numerics
from jaxlm.errors import RunError, UsageError
from jaxlm.main import main
from jaxlm.planner import memory
from jaxlm.run import trainer
from jaxlm.run.checkpoint import checkpoint_bytes, writer_bytes
from jaxlm.run.memory import min_memory
from jaxlm.run.quiet import quiet_libraries
from jaxlm.run.records import record_bytes
from jaxlm.run.resume import check_room, restore_or_init
from jaxlm.storage import user_cache
from jaxlm.storage.lock import only_writer
from tests import tiny_run
from tests.test_report import data_of
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


def test_help_show_usage_errors_and_the_report_need_no_jax():
    code = (
        "import sys\nimport jaxlm.report\nfrom jaxlm.cli import status\nfrom jaxlm.main import main\n"
        "print([status(main, argv.split()) for argv in sys.argv[1:]], 'jax' in sys.modules)"
    )
    errors = ("--config nowhere", "--config tiny.py --config.batch_sise=4", "--config.data.corpus=novel")
    words = [sys.executable, "-c", code, "--help", "-h", "--show", *errors]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment)
    assert ended.stdout.splitlines()[-1] == "[0, 0, 0, 2, 2, 2] False"
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
    directory = [] if "corpus" not in flag else ["--config.data.dir="]
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
    message = refused([*TINY, f"--config.data.corpus={name}", "--config.data.dir="])
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
def test_full_disk_is_a_failure_of_one_line(room, message, capfd, monkeypatch):
    """Whether there is no room for the settings, the metrics or a checkpoint."""
    monkeypatch.setattr("sys.unraisablehook", sys.unraisablehook)
    for name in ("absl", "asyncio", "jaxlm"):  # so that they are restored
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    quiet_libraries()
    with disk_room(room), pytest.raises(RunError, match=message) as caught:
        train(f"full-{room}", share="plain")
    assert caught.value.exit_status == 1
    assert is_one_line(caught.value)
    assert capfd.readouterr().err == ""


def test_final_model_that_cannot_be_replaced_is_a_failure_of_one_line():
    shutil.copytree(DONE, "taken")
    shutil.rmtree("taken/final_model")
    Path("taken/final_model").write_text("a file")
    with pytest.raises(RunError, match="taken/final_model") as caught:
        train("taken")
    assert is_one_line(caught.value)
    assert Path("taken/final_model").read_text() == "a file"


def test_what_a_person_puts_into_final_model_stays():
    shutil.copytree(DONE, "guest")
    model = Path("guest/final_model")
    (model / ".git").mkdir()
    (model / ".git" / "HEAD").write_text("mine")
    (model / "x.gguf").write_text("mine")
    (model / "README.md").write_text("My words.")
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in model.rglob("*")}
    contents = listing(model)
    assert "Done: 12 steps" in train("guest")
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in model.rglob("*")} == before
    assert listing(model) == contents


def test_weights_that_a_person_changed_in_final_model_stay():
    shutil.copytree(DONE, "tuned")
    file = Path("tuned/final_model/model.safetensors")
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    before = listing(file.parent)
    with pytest.raises(RunError, match=r"final_model/model\.safetensors .* move it away") as caught:
        train("tuned")
    assert is_one_line(caught.value)
    assert listing(file.parent) == before


def test_the_card_names_the_text_or_the_folder_of_the_tokens():
    shutil.copytree(DONE, "bare")
    card = Path("bare/final_model/README.md")
    trained_on = card.read_text()
    assert "\n| text | text.txt (sha256 " in trained_on
    shutil.copytree("tokens", "elsewhere")
    Path("elsewhere/meta.json").unlink()
    train("bare", f"--config.data.dir={Path('elsewhere').absolute()}")
    assert "\n| text | token files in elsewhere (tokenizer gpt2, " in card.read_text()
    assert str(Path.cwd()) not in card.read_text()


def test_run_that_does_not_fit_on_the_disk_is_refused(monkeypatch):
    usage = shutil.disk_usage(".")
    state = jax.eval_shape(lambda: init_state(tiny_run.config_of(DONE)))
    weights = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.params))
    # one of the checkpoints is a rolling one; with a max_checkpoints, one more until the oldest is deleted
    for steps, keep, every, saves in ((7, 5, 0, 4), (12, 5, 0, 5), (12, 2, 0, 4), (12, 1, 0, 3), (12, 1, 6, 5)):
        flags = [f"--config.max_steps={steps}", f"--config.max_checkpoints={keep}", f"--config.keep_every={every}"]
        config = read_config(["--config", "tiny.py", *flags])[0]
        needed = saves * checkpoint_bytes(state) + weights + record_bytes(config, steps)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, needed=needed: usage._replace(free=needed - 1))
        message = refused(["--config", "tiny.py", "--workdir", "no/room", *flags])
        assert f"{needed / 1e9:.2f} GB" in message
        monkeypatch.setattr(shutil, "disk_usage", lambda path, needed=needed: usage._replace(free=needed))
        check_room(Path("no/room"), config)


def test_unsound_accelerator_is_refused_before_anything_is_written(monkeypatch):
    client = SimpleNamespace(platform_version="1")
    device = SimpleNamespace(platform="mps", device_kind="Apple M2", id=0, client=client)

    def refuse(config, device_given, say):
        assert (config.model.implementation, device_given) == ("apple", device)
        raise RunError("sort differs")

    monkeypatch.setattr(backend, "start", lambda *_: device)
    monkeypatch.setattr(numerics, "require", refuse)
    assert refused([*TINY, "--force"], RunError) == "sort differs"


def test_run_that_does_not_fit_in_memory_is_refused_unless_forced(monkeypatch):
    smallest = min_memory(tiny_run.config_of(DONE))
    least = smallest.total + 10**12 + writer_bytes(smallest.checkpoint_copy, in_own_pages=True)
    message = "python -m jaxlm.plan"
    monkeypatch.setattr(memory.measure, "peak_bytes", lambda device: 10**12)
    monkeypatch.setattr(user_cache, "get", lambda *key: None)
    monkeypatch.setattr(user_cache, "put", lambda *words: None)
    monkeypatch.setattr(backend, "available_memory", lambda device: least - 1)
    assert message in refused(TINY)
    monkeypatch.setattr(backend, "available_memory", lambda device: least + 1)  # too little once the step is compiled
    with_state = 10**12 + smallest.weights + smallest.moments + smallest.accumulated
    peaks = iter([10**12, with_state])
    monkeypatch.setattr(memory.measure, "peak_bytes", lambda device: next(peaks))
    with pytest.raises(UsageError, match=message) as caught:
        train("tight", share="plain")
    assert is_one_line(caught.value)
    assert rows("tight/metrics.jsonl") == []
    assert not Path("tight/config.json").exists()  # it would refuse settings that fit
    monkeypatch.setattr(memory.measure, "peak_bytes", lambda device: with_state)
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
    assert named in refused([*TINY, "--config.data.dir=", "--config.data.corpus=missing.txt", *flags])


def killed(*_):
    raise RunError("killed")


@pytest.mark.parametrize("lost", ["checkpoints", "checkpoints/*"])
def test_run_that_lost_its_checkpoints_is_refused_until_its_records_are_moved_away(lost):
    workdir = f"lost-{len(lost)}"
    shutil.copytree(DONE, workdir)
    for path in list(Path(workdir).glob(lost)):
        shutil.rmtree(path)
    message = refused(["--config", "tiny.py", "--workdir", workdir])
    for name in ("metrics.jsonl", "samples.jsonl", "final_model"):
        assert name in message
        Path(workdir, name).rename(f"{workdir}/{name}.old")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunError, match="killed"):
        patch.setattr(trainer.Saver, "save", killed)
        train(workdir, share="plain")
    assert len(rows(f"{workdir}/metrics.jsonl")) == 3  # it was killed before its first save, so it starts again
    assert "Done: 12 steps" in train(workdir, share="plain")
    assert rows(f"{workdir}/metrics.jsonl")[-1]["loss"] == rows(DONE / "metrics.jsonl")[-1]["loss"]


def test_run_is_marked_until_it_is_saved():
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunError, match="killed"):
        patch.setattr(trainer.Saver, "save", killed)
        train("marked", share="plain")
    assert Path("marked/never_saved").exists()
    assert "Done: 12 steps" in train("marked", share="plain")
    assert not Path("marked/never_saved").exists()


def test_finished_run_needs_no_room(monkeypatch):
    shutil.copytree(DONE, "full")
    usage = shutil.disk_usage(".")._replace(free=record_bytes(tiny_run.config_of(DONE), 0))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "Done: 12 steps" in train("full", share="plain")
    shutil.rmtree("full/final_model")
    with pytest.raises(UsageError, match=r"where 0\.00 GB are free"):
        train("full", share="plain")


def test_run_without_its_tokens_and_its_text_is_refused_before_it_prepares_another():
    copy_of_own("nothing")
    text = Path("own.txt").read_text()
    shutil.copytree("data", "data.copy")
    shutil.rmtree("data/own-txt-300")
    Path("own.txt").write_text("other text. " * 500)
    argv = ["--config", "tiny.py", "--workdir", "nothing", "--config.data.corpus=own.txt", "--config.data.dir="]
    try:
        assert "restore one of them" in refused(argv)
    finally:
        Path("own.txt").write_text(text)
        Path("data.copy/own-txt-300").rename("data/own-txt-300")
        shutil.rmtree("data.copy")


def copy_of_own(name):
    """Copies a run on `own.txt`, prepared in the default directory, with three steps left; returns its last loss."""
    if not Path("own").exists():
        tiny_run.write_text(Path("own.txt"), seed=5)
        train("own", "--config.data.corpus=own.txt", "--config.data.dir=", share="plain")
        shutil.rmtree("own/checkpoints/12")
    shutil.copytree("own", name)
    return rows("own/metrics.jsonl")[-1]["loss"]


def resume_own(name, *flags, source="own.txt"):
    return train(name, f"--config.data.corpus={source}", "--config.data.dir=", *flags, share="plain")


def unreadable(paths):
    raise UsageError("cannot read it")


@pytest.mark.parametrize("fate", ["changed", "grown", "unreadable", "removed"])
def test_run_resumes_with_its_own_tokens_whatever_became_of_the_corpus(fate, monkeypatch):
    workdir = f"own-{fate}"
    loss = copy_of_own(workdir)
    text, files = Path("own.txt").read_text(), listing(Path("data"))
    if fate == "grown":
        shutil.rmtree(f"{workdir}/final_model")
    if fate == "removed":
        Path("own.txt").unlink()
    elif fate == "unreadable":
        monkeypatch.setattr(corpus, "files_sha256", unreadable)
    else:
        Path("own.txt").write_text("other text. " * 500 if fate == "changed" else f"{text} more")
    shown = resume_own(workdir)
    Path("own.txt").write_text(text)
    assert "Done: 12 steps" in shown
    assert rows(f"{workdir}/metrics.jsonl")[-1]["loss"] == loss
    assert listing(Path("data")) == files
    assert len(re.findall(r"(?m)^own.txt has changed: .* data/own-txt-300$", shown)) == (fate != "removed")
    when = ", once this run has ended" * (fate == "grown")
    assert shown.count(f"To train its model on the new text{when}: python -m") == (fate != "removed")
    assert "Preparing" not in shown
    assert "delete" not in shown


@pytest.mark.slow
def test_command_for_a_text_that_grew_starts_from_the_model_and_the_old_run_keeps_its_tokens():
    """The flags that train the old run longer are not the new run's."""
    longer = ["--config.max_steps=16", "--config.optimizer.lr_restart_step=12"]
    copy_of_own("diary 1")
    resume_own("diary 1")  # to its end
    text, files = Path("own.txt").read_text(), listing(Path("data/own-txt-300"))
    Path("own.txt").write_text(text * 2)
    try:
        shown = resume_own("diary 1", *longer)
        words = shlex.split(re.search(r"(?m)^To train .* new text: python -m jaxlm\.main (.*)$", shown)[1])
        shown = train(words[words.index("--workdir") + 1], *words, share="plain")
        resumed = resume_own("diary 1", *longer)
    finally:
        Path("own.txt").write_text(text)
    assert "data/own-txt-300 has the tokens of another text" in shown
    assert "Done: 12 steps, the model is in diary 1-2/final_model" in shown
    assert rows("diary 1-2/metrics.jsonl")[0]["loss"] < rows("diary 1/metrics.jsonl")[0]["loss"] - 0.1
    assert "in data/own-txt-300\n" in resumed
    assert listing(Path("data/own-txt-300")) == files


def test_run_resumes_if_its_tokens_are_prepared_again():
    loss = copy_of_own("again")
    shutil.rmtree("data/own-txt-300")
    assert "Preparing own.txt" in resume_own("again")
    assert rows("again/metrics.jsonl")[-1]["loss"] == loss


@pytest.mark.parametrize("absolute", [False, True])
def test_run_resumes_with_its_corpus_written_in_another_way(absolute):
    copy_of_own(f"respelt-{absolute}")
    files = listing(Path("data"))
    shown = resume_own(f"respelt-{absolute}", source=str(Path("own.txt").absolute()) if absolute else "./own.txt")
    assert "Done: 12 steps" in shown
    assert "data.corpus" not in shown
    assert "changed" not in shown
    assert listing(Path("data")) == files


def test_other_validation_fraction_is_refused_by_its_name_on_resume():
    copy_of_own("fraction")
    flags = ["--config.data.corpus=own.txt", "--config.data.dir=", "--config.data.val_fraction=0.2"]
    message = refused(["--config", "tiny.py", "--workdir", "fraction", *flags])
    assert "data.val_fraction is 0.2" in message
    assert "delete" not in message


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--config.data.dir=tokns"], "did you mean tokens"),
        (["--config.data.dir", "tokns"], "did you mean tokens"),
        (["--config.data.corpus=tiny.py"], "not of tiny.py"),
        (["--config.data.dir=tokens", "--config.data.corpus", "tiny.py"], "not of tiny.py"),
        (["-config.data.corpus=tiny.py"], "not of tiny.py"),
        (["--config", "torn.py"], "not of another.txt"),
    ],
)
def test_data_directory_that_is_not_what_was_asked_for_is_refused(flags, named):
    Path("torn.py").write_text(CONFIG.replace("text.txt", "another.txt"))
    assert named in refused([*TINY, *flags])


@pytest.mark.parametrize(
    ("config", "flags"),
    [
        ("tiny.py", ["--config.data.corpus=./text.txt"]),
        ("torn.py", ["--config.data.dir=tokens"]),  # the flag replaces the corpus of the config
        ("novels.py", []),  # a config that names no corpus
    ],
)
def test_named_data_directory_needs_no_corpus(config, flags, monkeypatch):
    Path("torn.py").write_text(CONFIG.replace("text.txt", "another.txt"))
    Path("novels.py").write_text(CONFIG.replace('config.data.corpus = "text.txt"', ""))
    opened = []
    monkeypatch.setattr(command_main, "_train", lambda *arguments: opened.append(arguments[3].directory))
    main(["--config", config, "--workdir", "new", *flags])
    assert opened == [Path("tokens")]


@pytest.mark.slow
def test_run_that_began_with_a_model_folder_written_in_another_way_resumes():
    shutil.copytree(DONE / "final_model", "start")
    train("begun", "--config.init_from=start", share="plain")
    for path in ("./start/", str(Path("start").absolute())):
        shown = train("begun", f"--config.init_from={path}")
        assert "Done: 12 steps" in shown
        assert "init_from" not in shown
    assert "output_init" in refused(["--config", "tiny.py", "--workdir", "begun", "--config.model.output_init=zero"])


def test_missing_model_folder_is_refused_before_the_corpus_is_prepared_also_by_a_run_that_was_never_saved():
    Path("unsaved/checkpoints").mkdir(parents=True)
    shutil.copy(DONE / "config.json", "unsaved")
    settings = json.loads(Path("unsaved/config.json").read_text()) | {"init_from": "gone"}
    Path("unsaved/config.json").write_text(json.dumps(settings))
    flags = ["--config.init_from=gone", "--config.data.dir=", "--config.data.corpus=missing.txt"]
    assert "gone/config.json" in refused(["--config", "tiny.py", "--workdir", "unsaved", *flags])


def test_fewer_steps_than_are_done_end_at_once_with_the_model_of_the_last():
    shutil.copytree(DONE, "shorter")
    shutil.rmtree("shorter/final_model")
    shown = train("shorter", "--config.max_steps=6")
    assert "max_steps is 6, was 12 up to step 12" in shown
    assert "Done: 12 steps" in shown
    assert "| 12 of 12 steps, 768 tokens |" in Path("shorter/final_model/README.md").read_text()
    assert rows("shorter/metrics.jsonl") == rows(DONE / "metrics.jsonl")
    state = tiny_run.saved_state(DONE, 12)
    shutil.copy(DONE / "config.json", "shorter")
    assert_same_bits(tiny_run.saved_state("shorter", 12), state)


def test_help_names_the_flags(capsys):
    main(["--help"])
    shown = capsys.readouterr().out
    for flag in ("--workdir", "--config", "--[no]force", "--[no]show"):
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


def test_a_trained_run_has_its_page(capsys):
    report.main(["--workdir", "run"])
    assert capsys.readouterr().out == "run/report.html shows 12 steps of run\n"
    (run,) = data_of(DONE / "report.html")["runs"]
    metrics = rows("run/metrics.jsonl")
    assert run["metrics"]["loss"]["value"] == pytest.approx([row["loss"] for row in metrics], rel=1e-8)
    planned = dict(zip(run["plan"]["lr"]["step"], run["plan"]["lr"]["value"], strict=True))
    assert planned == pytest.approx({row["step"]: row["lr"] for row in metrics}, rel=1e-5)
    assert [each["name"] for each in run["checkpoints"]] == ["step 3", "step 6", "step 9", "step 12", "final_model"]
    assert run["checkpoints"][3]["val_loss"] == pytest.approx(metrics[-1]["val_loss"])
    (session,) = run["sessions"]
    assert session["device"].startswith("CPU") and "jax " in session["versions"]
    assert (session["step"], session["parameters"]) == (0, 300 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 24 + 2 * 16) + 16)
    assert run["sample_command"] == "python -m jaxlm.sample --workdir run --prompt Once"
    assert run["data"].startswith("tokens (sha256 of the text ")
    assert run["state"] == "finished"
