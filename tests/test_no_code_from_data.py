"""Nothing that a person is handed is unpickled or evaluated: not text, tokens, checkpoints, nor what a run recorded."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run

CODE = "__import__('os').mkdir('ran')"


class Payload:
    """Unpickled, it runs CODE."""

    def __reduce__(self):
        return eval, (CODE,)


WATCH = f"""
import sys
CODE = {CODE!r}
def watch(event, arguments):
    if event == "pickle.find_class" or (event == "compile" and CODE in str(arguments[0])):
        print("evaluated:", event, arguments, file=sys.stderr)
sys.addaudithook(watch)
"""


def watched(module, *argv):
    """What a command printed on stderr about code that it ran from data; and it ended in order."""
    program = f"{WATCH}\nimport runpy\nrunpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    done = subprocess.run(
        [sys.executable, "-c", program, *argv],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert "Traceback" not in done.stderr
    return done.returncode, [line for line in done.stderr.splitlines() if line.startswith("evaluated:")]


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    with tiny_run.workplace(tmp_path_factory) as place:
        tiny_run.write_text(place / "text.txt", words=f"{CODE.replace(' ', '')} the king went home")
        tiny_run.train("run", "--config.max_steps=6", f'--config.sample.prompts=("{CODE[:9]}",)')
        yield place


def test_the_watch_sees_what_it_should():
    Path("handed").write_bytes(pickle.dumps(Payload()))
    done = subprocess.run(
        [sys.executable, "-c", f"{WATCH}\nimport pickle\npickle.load(open('handed', 'rb'))"],
        capture_output=True,
        text=True,
    )
    assert "pickle.find_class" in done.stderr
    assert "compile" in done.stderr
    Path("ran").rmdir()


def test_text_and_records_are_no_code():
    for name in ("metrics.jsonl", "samples.jsonl"):
        with Path("run", name).open("ab") as file:
            file.write(pickle.dumps(Payload()) + b"\n" + CODE.encode() + b"\n")
    code = ["--config", "tiny.py", "--workdir", "run", f'--config.sample.prompts=("{CODE[:9]}",)']
    assert watched("jaxlm.main", *code, "--config.max_steps=8") == (0, [])
    assert watched("jaxlm.sample", "--workdir", "run", "--prompt", CODE[:9], "--tokens", "5") == (0, [])
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", ["train.bin", "meta.json"])
def test_token_files_are_no_code(name):
    shutil.copytree("tokens", f"handed-{name}")
    Path(f"handed-{name}", name).write_bytes(pickle.dumps(Payload()))
    status, evaluated = watched(
        "jaxlm.main", "--config", "tiny.py", f"--config.data.dir=handed-{name}", "--workdir", "new"
    )
    assert (status, evaluated) == (2, [])
    assert not Path("ran").exists()


def test_checkpoints_are_no_code():
    """Whatever file of one is a pickle or a line of code."""
    for held in (pickle.dumps(Payload()), CODE.encode()):
        shutil.copytree("run", "hostile", dirs_exist_ok=True)
        for path in Path("hostile/checkpoints/3").rglob("*"):
            if path.is_file():
                path.write_bytes(held)
        assert watched("jaxlm.sample", "--workdir", "hostile", "--step", "3") == (2, [])
        assert not Path("ran").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_models_are_no_code(name):
    for held in (pickle.dumps(Payload()), CODE.encode()):
        shutil.copytree("run/final_model", "handed-model", dirs_exist_ok=True)
        Path("handed-model", name).write_bytes(held)
        assert watched("jaxlm.sample", "--model", "handed-model", "--tokens", "5") == (2, [])
        assert not Path("ran").exists()
