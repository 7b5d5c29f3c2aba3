"""How commands find their config file, and how they end."""

import argparse
import contextlib
import importlib
import io
import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from configs import quickstart
from jaxlm.cli import ArgumentParser, expand_homes, find_config, path, read_config, run_errors, status
from jaxlm.config import differences, from_config_dict, to_dict
from jaxlm.data.text_files import names_of
from jaxlm.errors import RunError, Stopped, UsageError

CONFIGS = Path(quickstart.__file__).parent
QUICKSTART = from_config_dict(quickstart.get_config())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text((CONFIGS / "quickstart.py").read_text())


def test_without_a_config_the_quickstart_runs_from_any_folder(folder):
    assert read_config([]) == (QUICKSTART, Path("runs/quickstart"))


def test_a_preset_is_found_by_name_from_any_folder(folder):
    config, workdir = read_config(["--config", "m2_60m", "--config.seed=5"])
    assert (config.data.corpus, config.model.layers, config.seed) == ("tinystories", 8, 5)
    assert workdir == Path("runs/m2_60m")
    assert find_config("quickstart") == CONFIGS / "quickstart.py"


def test_a_config_file_is_found_by_path(folder):
    assert read_config(["--config", "mine.py"]) == (QUICKSTART, Path("runs/mine"))
    assert find_config(str(CONFIGS / "m2_60m.py")) == CONFIGS / "m2_60m.py"


def test_a_file_has_precedence_over_a_preset(folder):
    Path("m2_60m").touch()
    assert find_config("m2_60m") == Path("m2_60m")


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("mine", "did you mean mine.py?"),
        ("./mien.py", "did you mean mine.py?"),
        ("m2_6om", "did you mean m2_60m?"),
        ("configs/m2_60m.py", "did you mean m2_60m?"),
        ("quickstrat.py", "did you mean quickstart?"),
        ("no/such/folder/xyzzy.py", "choose from gpt2_124m, gpt2_350m, m2_60m, m2_60m_fast, m2_8k_fast"),
        ("xyzzy", "choose from mine.py, gpt2_124m, gpt2_350m, m2_60m, m2_60m_fast"),
        ("", "choose from"),
    ],
)
def test_an_unknown_config_is_refused_with_the_nearest(folder, name, advice):
    with pytest.raises(UsageError) as caught:
        read_config(["--config", name])
    message = str(caught.value)
    assert f"no config file or preset {name}" in message
    assert advice in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UsageError("no such file"), 2),
        (RunError("the disk is full"), 1),
        (Stopped("stopped after step 3", 15), 143),
        (Stopped("stopped after step 3", 2), 130),
        (KeyboardInterrupt(), 130),
    ],
)
def test_an_error_gives_one_line_and_a_status(error, expected, capsys):
    def main(argv):
        raise error

    assert status(main, []) == expected
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith(f"{error}\n")
    assert captured.err.count("\n") == 1


def test_success_is_status_0_without_output(capsys):
    seen = []
    assert status(seen.append, ["--flag", "value"]) == 0
    assert seen == [["--flag", "value"]]
    assert capsys.readouterr() == ("", "")


def test_an_unexpected_error_keeps_its_traceback():
    def main(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        status(main, [])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "^cannot write to runs/x .No space left on device.: make room"),
        (OSError(5, "Input/output error"), "^cannot write to runs/x .Input/output error.: the disk may be failing"),
        (OSError(22, "Invalid argument"), "^cannot write to runs/x .Invalid argument.: check the disk"),
        (OSError("lost"), "^cannot write to runs/x .lost.: check the disk"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB"),
            "^out of memory: set .*, or a smaller batch_size$",
        ),
        (jax.errors.JaxRuntimeError("INTERNAL: lost\nlong"), "^the device failed .INTERNAL: lost.: the same command"),
    ],
)
def test_errors_of_disk_and_device_say_what_to_do(error, message):
    with pytest.raises(RunError, match=message), run_errors(Path("runs/x")):
        raise error


def command(code, *argv, **options):
    """Runs a process whose command is this code."""
    program = f"from jaxlm.cli import run\nimport os, sys, time\ndef main(argv):\n    {code}\nrun(main)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    options = {"capture_output": True, "text": True, "timeout": 20, "env": environment} | options
    return subprocess.run([sys.executable, "-c", program, *argv], **options)


def test_the_process_ends_with_the_status_and_all_output():
    done = command("print(argv, 'x' * 9999)", "a", "b")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"['a', 'b'] {'x' * 9999}\n"


def test_the_process_ends_with_status_1_after_an_unexpected_error():
    done = command("1 / 0")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_ctrl_c_is_one_line():
    done = command("os.kill(os.getpid(), 2); time.sleep(20)")
    assert (done.returncode, done.stderr.count("\n")) == (130, 1)


def test_a_closed_pipe_gives_no_traceback():
    reading, writing = os.pipe()
    os.close(reading)
    done = command("print('x' * 100)", capture_output=False, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert done.returncode in (0, 128 + 13)  # the latter if the write fails
    assert done.stderr == ""


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # of jax; the child runs Python, not jax
def test_closed_streams_are_empty():
    """Python has None in their place."""
    code = "assert sys.stdin.read() == '' and not sys.stdout.isatty() and sys.stderr.fileno() > 0; print('unseen')"
    closed = {"preexec_fn": lambda: os.closerange(0, 3), "capture_output": False, "stdin": None}
    assert command(code, **closed).returncode == 0


@pytest.mark.parametrize(
    ("argv", "named"),
    [(["--coun", "1"], "--coun"), (["--count", "x"], "--count"), (["stray"], "stray"), ([], "--need")],
)
def test_wrong_arguments_are_a_usage_error_that_names_them(argv, named, capsys):
    parser = ArgumentParser(prog="command", allow_abbrev=False)
    parser.add_argument("--count", type=int)
    parser.add_argument("--need", required=argv == [])
    with pytest.raises(UsageError) as caught:
        parser.parse_args(argv)
    assert named in str(caught.value)
    assert "--help" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert capsys.readouterr() == ("", "")


def test_an_unknown_flag_of_any_command_is_named_with_the_nearest():
    """Also where a required flag is missing, for which it may stand."""
    lines = {
        "sample --wrkdir x": "--workdir",
        "sample --workdir x --promt=hi": "--prompt",
        "export --workdir x --outt y": "--out",
        "prepare --corpsu x --out y": "--corpus",
        "plan --jsn": "--json",
        "plan --no-mesure": "--no-measure",
        "plan --confg=m2_60m": "--config",
        "plan --wrkdir x": "--workdir",
        "plan --config.batchsize=3": "batch_size",
        "doctor --ot x": "--out",
        "main --wrkdir=x": "--workdir",
        "main --conifg x": "--config",
    }
    for line, nearest in lines.items():
        command, *argv = line.split()
        with pytest.raises(UsageError, match=rf"did you mean {nearest}\b") as caught:
            importlib.import_module(f"jaxlm.{command}").main(argv)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(UsageError, match="no flag --stepz: python"):  # nothing is near
        importlib.import_module("jaxlm.plan").main(["--stepz", "3"])


def test_an_abbreviation_and_a_flag_of_jaxlm_main_are_known():
    parser = ArgumentParser(prog="command")
    parser.add_argument("--temperature")
    assert parser.parse_args(["--temp", "1"]).temperature == "1"
    flags = ["--force", "--config.model.width=8", "--workdir=w"]
    assert parser.parse_known_args(flags)[1] == flags


def test_a_flag_overrides_the_old_name_in_a_config_file(tmp_path):
    file = tmp_path / "old.py"
    file.write_text(
        "from jaxlm.config import default_config\n\n\ndef get_config():\n    config = default_config()\n"
        "    config.slices = 4\n    config.model.hidden = 64\n    config.model.loops = 'unrolled'\n    return config\n"
    )
    config, _ = read_config(
        ["--config", str(file), "--config.model.mlp_width=128", "--config.model.implementation=xla"]
    )
    assert (config.microbatch_chunks, config.model.mlp_width, config.model.implementation) == (4, 128, "xla")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def test_every_path_of_a_command_line_may_begin_with_the_home_directory(home):
    (home / "mine.py").write_text(
        "from configs.quickstart import get_config as quickstart\n\n\ndef get_config():\n"
        "    config = quickstart()\n    config.data.dir = '~/tokens'\n    return config\n"
    )
    config, workdir = read_config(
        ["--config=~/mine.py", "--workdir=~/run", "--config.init_from=~", "--config.data.corpus=~/a.txt, ~/*/~b.txt,c~"]
    )
    assert workdir == home / "run"
    assert config.data.corpus == f"{home}/a.txt, {home}/*/~b.txt,c~"
    assert (config.data.dir, config.init_from) == (f"{home}/tokens", str(home))
    assert read_config(["--config=~/mine.py"])[1] == Path("runs/mine")
    assert expand_homes("novels") == "novels"
    assert path("") == Path()


def test_the_texts_of_a_run_are_words_of_their_own(home):
    (home / "a,b.txt").touch()
    (home / "mine.py").write_text(
        "from jaxlm.config import default_config\n\n\ndef get_config():\n    config = default_config()\n"
        "    config.data.corpus = ('x.txt', 'my texts')\n    config.data.exclude = ['*.md']\n    return config\n"
    )
    flags = ["--config=~/mine.py", "--config.data.corpus", "~/a,b.txt", "my texts", "--config.seed=3"]
    flags += ["--config.data.exclude=drafts", "-config.data.exclude", "*.md", "b c", "--config.data.corpus=c*.txt"]
    config = read_config(flags)[0]
    assert names_of(config.data.corpus) == [f"{home}/a,b.txt", "my texts", "c*.txt"]
    assert (config.data.exclude, config.seed) == (("drafts", "*.md", "b c"), 3)
    config = read_config(flags[:1])[0]
    assert (names_of(config.data.corpus), config.data.exclude) == (["x.txt", "my texts"], ("*.md",))
    assert read_config(["--config.data.corpus=", "--config.data.dir=x"])[0].data.corpus == ""
    for wrong in (["--config.data.corpus=a", "b"], ["--config.data.corpus"], ["--config.data.corpora", "a"]):
        with pytest.raises(UsageError, match=r"config\.data\.corpus|did you mean corpus"):
            read_config(wrong)


def test_flags_may_have_one_dash(home):
    text = (CONFIGS / "quickstart.py").read_text().replace("return config", "config.slices = 4; return config")
    (home / "mine.py").write_text(text)
    flags = ["config=~/mine.py", "config.microbatch_chunks=2", "config.data.corpus=b.txt", "workdir=w"]
    for dash in ("-", "--"):
        config, workdir = read_config([dash + flag for flag in flags])
        assert (config.microbatch_chunks, config.data.corpus, workdir) == (2, "b.txt", Path("w"))


def test_the_folder_of_the_initial_weights_is_saved_for_any_working_directory(home, monkeypatch):
    (home / "model").mkdir()
    (home / "link").symlink_to("model")
    saved = json.loads(json.dumps(to_dict(read_config(["--config.init_from=home/link"])[0])))
    monkeypatch.chdir(home)
    assert differences(saved, read_config(["--config.init_from=model"])[0]) == []
    assert [change.name for change in differences(saved, read_config(["--config.init_from=home"])[0])] == ["init_from"]


def test_another_users_home_directory_is_found(home):
    root = pwd.getpwuid(0)
    assert path(f"~{root.pw_name}/x") == Path(root.pw_dir, "x")


@pytest.mark.parametrize("text", ["~nobody-of-this-name/x", "~", "~/x"])
def test_a_path_without_its_home_directory_is_refused(home, monkeypatch, text):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    for flag in ("--workdir", "--config", "--config.data.dir", "--config.data.corpus", "--config.init_from"):
        with pytest.raises(UsageError, match="no home directory") as caught:
            read_config([f"{flag}={text}"])
        assert len(str(caught.value).splitlines()) == 1


def flags_of(command, monkeypatch):
    """The flags that a command defines, by name."""
    flags = {}

    def add_argument(group, *names, original=argparse._ActionsContainer.add_argument, **options):
        flags[names[0]] = options
        return original(group, *names, **options)

    monkeypatch.setattr("argparse._ActionsContainer.add_argument", add_argument)
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module(f"jaxlm.{command}").main(["--help"])
    return flags


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("sample", {"--workdir", "--model"}),
        ("export", {"--workdir", "--out"}),
        ("prepare", {"--corpus", "--out"}),
        ("doctor", {"--out"}),
    ],
)
def test_every_flag_for_a_path_has_its_type(home, monkeypatch, command, named):
    types = {name: options.get("type") for name, options in flags_of(command, monkeypatch).items()}
    assert {name for name, kind in types.items() if kind in (path, expand_homes)} == named
    assert Path not in types.values()
    assert all(str(types[name]("~/books")) == f"{home}/books" for name in named)
