"""Nothing that a person is handed is unpickled or evaluated: not text, tokens, checkpoints, nor what a run recorded."""

import contextlib
import pickle
import shutil
import sys
from pathlib import Path

import pytest

from jaxlm import cli, main, sample
from tests import tiny_run

CODE = "__import__('os').mkdir('ran')"


class Payload:
    """Unpickled, it runs CODE."""

    def __reduce__(self):
        return eval, (CODE,)


evaluated, watching = [], False


def watch(event, arguments):
    if watching and (event == "pickle.find_class" or (event == "compile" and CODE in str(arguments[0]))):
        evaluated.append(event)


sys.addaudithook(watch)  # for good: there is no way to take it away


@contextlib.contextmanager
def watched():
    """Gives the list that code run from data comes to stand in."""
    global watching
    evaluated.clear()
    watching = True
    try:
        yield evaluated
    finally:
        watching = False


def ended(module, *argv):
    """The exit status of a command that ran nothing from data."""
    with watched() as ran:
        status = cli.status(module.main, list(argv))
    assert ran == []
    assert not Path("ran").exists()
    return status


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    with tiny_run.workplace(tmp_path_factory) as place:
        tiny_run.write_text(place / "text.txt", words=f"{CODE.replace(' ', '')} the king went home")
        tiny_run.train("run", "--config.max_steps=6", f'--config.sample.prompts=("{CODE[:9]}",)')
        yield place


def test_the_watch_sees_what_it_should():
    with watched() as ran:
        pickle.loads(pickle.dumps(Payload()))
    assert ran == ["pickle.find_class", "compile"]
    Path("ran").rmdir()


def test_text_and_records_are_no_code():
    for name in ("metrics.jsonl", "samples.jsonl"):
        with Path("run", name).open("ab") as file:
            file.write(pickle.dumps(Payload()) + b"\n" + CODE.encode() + b"\n")
    code = ["--config", "tiny.py", "--workdir", "run", f'--config.sample.prompts=("{CODE[:9]}",)']
    assert ended(main, *code, "--config.max_steps=8") == 0
    assert ended(sample, "--workdir", "run", "--prompt", CODE[:9], "--tokens", "5") == 0


@pytest.mark.parametrize("name", ["train.bin", "meta.json"])
def test_token_files_are_no_code(name):
    shutil.copytree("tokens", f"handed-{name}")
    Path(f"handed-{name}", name).write_bytes(pickle.dumps(Payload()))
    assert ended(main, "--config", "tiny.py", f"--config.data.dir=handed-{name}", "--workdir", "new") == 2


def test_checkpoints_are_no_code():
    """Whatever file of one is a pickle or a line of code."""
    for held in (pickle.dumps(Payload()), CODE.encode()):
        shutil.copytree("run", "hostile", dirs_exist_ok=True)
        for path in Path("hostile/checkpoints/3").rglob("*"):
            if path.is_file():
                path.write_bytes(held)
        assert ended(sample, "--workdir", "hostile", "--step", "3") == 2


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_models_are_no_code(name):
    for held in (pickle.dumps(Payload()), CODE.encode()):
        shutil.copytree("run/final_model", "handed-model", dirs_exist_ok=True)
        Path("handed-model", name).write_bytes(held)
        assert ended(sample, "--model", "handed-model", "--tokens", "5") == 2
