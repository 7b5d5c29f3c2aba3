"""No input is unpickled or evaluated: text, tokens, checkpoints, models and the records of a run."""

import contextlib
import pickle
import shutil
import sys
from pathlib import Path

import pytest

from jaxlm import cli, main, prepare, sample
from tests import tiny_run
from tests.tiny_run import CODE

PROMPTS = f'--config.sample.prompts=("{CODE[:9]}","A","My")'  # as many as the tiny run samples


class Payload:
    """Unpickling it runs CODE."""

    def __reduce__(self):
        return eval, (CODE,)


CONTENTS = (pickle.dumps(Payload()), CODE.encode())
evaluated, watching = [], False


def hook(event, arguments):
    if watching and (event == "pickle.find_class" or (event == "compile" and CODE in str(arguments[0]))):
        evaluated.append(event)


sys.addaudithook(hook)  # it cannot be removed


@contextlib.contextmanager
def watched():
    """Yields the list of events in which code from data is run."""
    global watching
    evaluated.clear()
    watching = True
    try:
        yield evaluated
    finally:
        watching = False


def exit_status(module, *argv):
    """The exit status of a command, after a check that it ran no code from data."""
    with watched() as events:
        status = cli.status(module.main, list(argv))
    assert events == []
    assert not Path("ran").exists()
    return status


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    with tiny_run.workplace(tmp_path_factory, trained=True) as place:
        yield place


def test_the_hook_sees_code_in_a_pickle():
    with watched() as events:
        pickle.loads(CONTENTS[0])
    assert events == ["pickle.find_class", "compile"]
    Path("ran").rmdir()


def test_a_corpus_is_not_code():
    assert CODE in Path("text.txt").read_text(encoding="utf-8")
    assert exit_status(prepare, "--corpus", "text.txt", "--out", "prepared", "--vocab_size", "300") == 0


def test_records_and_prompts_are_not_code():
    for name in ("metrics.jsonl", "samples.jsonl"):
        with Path("run", name).open("ab") as file:
            file.write(b"\n".join((*CONTENTS, b"")))
    shutil.rmtree("run/checkpoints/12")  # so that the last steps run again
    with tiny_run.shared_compilation("plain"):
        assert exit_status(main, "--config", "tiny.py", "--workdir", "run", PROMPTS) == 0
    assert len(tiny_run.rows("run/metrics.jsonl")) == 12
    assert exit_status(sample, "--workdir", "run", "--prompt", CODE[:9], "--tokens", "5") == 0


@pytest.mark.parametrize("name", ["train.bin", "meta.json"])
def test_token_files_are_not_code(name):
    shutil.copytree("tokens", f"changed-{name}")
    Path(f"changed-{name}", name).write_bytes(CONTENTS[0])
    assert exit_status(main, "--config", "tiny.py", f"--config.data.dir=changed-{name}", "--workdir", "new") == 2


@pytest.mark.parametrize("content", CONTENTS, ids=["pickle", "source"])
def test_checkpoints_are_not_code(content):
    shutil.copytree("run", "hostile", dirs_exist_ok=True)
    for path in Path("hostile/checkpoints/3").rglob("*"):
        if path.is_file():
            path.write_bytes(content)
    assert exit_status(sample, "--workdir", "hostile", "--step", "3") == 2


@pytest.mark.parametrize("content", CONTENTS, ids=["pickle", "source"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_models_are_not_code(name, content):
    shutil.copytree("run/final_model", "changed-model", dirs_exist_ok=True)
    Path("changed-model", name).write_bytes(content)
    assert exit_status(sample, "--model", "changed-model", "--tokens", "5") == 2
