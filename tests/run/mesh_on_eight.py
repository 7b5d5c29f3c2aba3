"""Runs of the training command on meshes. `test_mesh.py` runs this file on eight devices."""

import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.errors import Stopped
from tests import tiny_run
from tests.run.test_trainer import LAST, at_step, poison, send, write_poisoned_tokens
from tests.tiny_run import rows, saved_state

POISONED = {1, 22, 71}  # by twos: they are in the micro-batches 0, 5 and 17, in rows of different devices
FLAGS = ("--config.batch_size=8", "--config.optimizer.average=0.5", "--config.data.dir=poisoned")


def train(workdir, data, fsdp):
    """Runs the command on a mesh. It says on which devices, and how many micro-batches it skips."""
    several, layout = data * fsdp > 1, (f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}")
    shown = tiny_run.train(workdir, *FLAGS, *layout, share="" if several else "poisoned")
    devices = f"on {data * fsdp} x CPU" if several else "on CPU"
    assert devices in shown
    return shown


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run on one device: the rows and the last state."""
    with tiny_run.workplace(tmp_path_factory), pytest.MonkeyPatch.context() as patch:
        poison(patch)
        write_poisoned_tokens("poisoned", POISONED, windows=400)
        assert train("one", 1, 1).count("not finite") == len(POISONED)
        yield rows("one/metrics.jsonl"), saved_state("one", LAST)


def assert_same_run(workdir, one):
    (expected, state), metrics = one, rows(f"{workdir}/metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, LAST + 1))
    for name in ("loss", "lr", "grad_norm", "val_loss"):
        values = [[row[name] for row in run if name in row] for run in (expected, metrics)]
        assert len(values[0]) >= 3
        np.testing.assert_allclose(*values, rtol=1e-4 if name == "grad_norm" else 1e-5)
    ended = saved_state(workdir, LAST)
    assert int(ended.batches) == 2 * LAST + len(POISONED)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), ended.weights, state.weights)
    assert len(rows(f"{workdir}/samples.jsonl")) == 6
    assert (Path(workdir) / "final_model").is_dir()


def resume_from(workdir, source, step):
    """A copy of a work directory without the checkpoints after `step`."""
    shutil.copytree(source, workdir)
    for path in Path(workdir, "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)


def test_a_stopped_run_resumes_on_fewer_devices_as_if_on_one(one):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        at_step(patch, 5, send(signal.SIGTERM))
        train("many", 4, 2)
    assert "Resuming from step" in train("many", 2, 1)
    assert_same_run("many", one)


def test_a_checkpoint_of_one_device_resumes_on_several_and_back(one):
    resume_from("there", "one", 3)
    train("there", 2, 2)
    assert_same_run("there", one)
    resume_from("back", "there", 6)
    train("back", 1, 1)
    assert_same_run("back", one)
