"""Two real processes on loopback: they train one run, stop together, and resume after one of them was killed."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.process_kills import free_port
from jaxlm.prepare import prepare
from tests import tiny_run
from tests.tiny_run import rows

pytestmark = pytest.mark.slow
FLAGS = ("--config.max_steps=60", "--config.save_interval=10", "--config.generation_interval=20")

TRACKIO = """
import os

Markdown = str


def note(what):
    with open("logged", "a") as file:
        print(os.getpid(), what, file=file)


class Run:
    def log(self, metrics, step):
        if "loss" in metrics:
            note(step)

    def finish(self):
        pass


def init(*arguments, **options):
    note(0)
    return Run()
"""


@pytest.fixture
def place(tmp_path_factory):
    with tiny_run.workplace(tmp_path_factory) as place:
        prepare("text.txt", Path("tokens"), 300, 0.1)
        yield place


def start(workdir, *flags, devices=1):
    """Starts the command; its lines come at once."""
    options = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"}
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "jaxlm.main", "--config=tiny.py", "--workdir", workdir, *FLAGS, *flags],
        env=os.environ | options | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_two(workdir, *flags):
    flags = (f"--coordinator=127.0.0.1:{free_port()}", "--processes=2", *flags)
    return [start(workdir, *flags, f"--process={process}") for process in range(2)]


def wait_for_step(processes, workdir, step):
    """Returns once a step is recorded, or a process has ended."""
    file, deadline = Path(workdir, "metrics.jsonl"), time.monotonic() + 300
    while all(process.poll() is None for process in processes):
        if file.exists() and file.read_bytes().count(b"\n") >= step:
            return
        assert time.monotonic() < deadline, f"step {step} is not recorded"
        time.sleep(0.005)


def ended(processes):
    """The exit status, the lines of stdout and those of stderr of each."""
    outputs = [process.communicate(timeout=300) for process in processes]
    return [(p.returncode, *(text.splitlines() for text in o)) for p, o in zip(processes, outputs, strict=True)]


def test_two_processes_are_one_run(place):
    alone = start("one", devices=2)

    processes = start_two("two")
    wait_for_step(processes, "two", 4)
    processes[1].send_signal(signal.SIGTERM)
    first, second = ended(processes)
    assert first[0] == second[0] == 128 + signal.SIGTERM, (first, second)
    assert first[2][-1] == second[2][-1]  # stopped after the same step
    stopped = int(first[2][-1].split("step ")[1].split(":")[0])
    assert Path("two/checkpoints", str(stopped)).is_dir()

    processes = start_two("two")
    wait_for_step(processes, "two", stopped + 15)
    processes[1].kill()
    first, second = ended(processes)
    reason = f"process 1 of 2 on {socket.gethostname()} has ended"
    line = f"error: {reason}, so this run stops: the same command resumes from the last checkpoint"
    assert (first[0], first[2]) == (1, [line])
    assert f"Resuming from step {stopped}" in first[1]
    assert second[0] == -signal.SIGKILL

    Path("trackio.py").write_text(TRACKIO)
    processes = start_two("two", "--trackio=stories")
    first, second = ended(processes)
    assert (first[0], first[2]) == (second[0], second[2]) == (0, []), (first, second)
    assert first[1][-1] == "Done: 60 steps, the model is in two/final_model"
    assert second[1] == []  # one writes
    logged = [[int(word) for word in line.split()] for line in Path("logged").read_text().splitlines()]
    assert {pid for pid, _ in logged} == {processes[0].pid}
    opened, *steps = [step for _, step in logged]
    assert opened == 0
    assert steps == list(range(steps[0], 61))
    assert steps[0] > stopped + 15

    assert ended([alone])[0][0] == 0
    two, one = (rows(Path(workdir, "metrics.jsonl")) for workdir in ("two", "one"))
    assert [row["step"] for row in two] == list(range(1, 61))
    for key in ("loss", "grad_norm", "lr"):
        np.testing.assert_allclose([row[key] for row in two], [row[key] for row in one], rtol=1e-4)
    validations = [[row["val_loss"] for row in each if "val_loss" in row] for each in (two, one)]
    np.testing.assert_allclose(*validations, rtol=1e-4)
    assert len(rows("two/samples.jsonl")) == len(rows("one/samples.jsonl")) == 9


def test_processes_of_other_settings_are_refused(place):
    processes = start_two("refused")
    processes[1].kill()
    processes[1].wait()
    address = next(word for word in processes[0].args if word.startswith("--coordinator"))
    processes[1] = start("refused", address, "--processes=2", "--process=1", "--config.seed=1")
    first, second = ended(processes)
    assert second[0] == 2
    assert second[2] == ["error: process 1 has other settings than process 0: start all processes by the same command"]
    assert first[0] == 1
    assert "process 1 of 2 on" in first[2][-1]
    assert "has other settings" in first[2][-1]
