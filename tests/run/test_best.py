"""A run that keeps its best step: the checkpoint outlives newer ones, and the final model is made of it."""

import shutil
import signal
from pathlib import Path

import pytest

from jaxlm.errors import Stopped, UsageError
from jaxlm.interop.huggingface import read_params
from jaxlm.run import trainer
from jaxlm.run.events import EvaluationEvent
from jaxlm.run.load import restore
from tests.run.test_trainer import at_step, send
from tests.tiny_run import assert_same_bits, config_of, resolved, saved_state, train, workplace

FLAGS = ["--config.keep_best=True", "--config.data.eval_sequences=0", "--config.eval_interval=1"]
FLAGS += ["--config.max_checkpoints=1"]
BEST, LAST = 6, 12


@pytest.fixture(scope="module")
def losses():
    """Of the validation text, by step: the lowest is that of step 6 of 12."""
    losses = {step: 4.0 + abs(step - BEST) / 10 for step in range(1, LAST + 1)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "_evaluate", lambda self, step, limit: EvaluationEvent(step, losses[step], 1.0))
        yield losses


@pytest.fixture(scope="module")
def shown(tmp_path_factory, losses):
    """What the run in `whole` shows; the same without keep_best is in `run`."""
    with workplace(tmp_path_factory, trained=True):
        yield train("whole", *FLAGS, share="plain")


def steps(folder):
    return [path.name for path in Path(folder, "checkpoints").iterdir()]


def assert_is_of_the_best_step(workdir):
    best = saved_state("run", BEST).params
    assert (steps(f"{workdir}/best"), steps(workdir)) == ([str(BEST)], [str(LAST)])
    assert_same_bits(read_params(Path(workdir, "final_model"), resolved(config_of(workdir)).model), best)
    assert_same_bits(restore(Path(workdir), None, "cpu").params, best)
    assert (restore(Path(workdir), BEST, "cpu").step, restore(Path(workdir), LAST, "cpu").step) == (BEST, LAST)


def test_the_best_step_outlives_newer_checkpoints_and_makes_the_final_model(shown):
    assert_is_of_the_best_step("whole")
    assert f"Done: {LAST} steps, the model of step {BEST}, whose validation loss was the lowest, is in" in shown
    assert shown.count("The validation loss has risen from 4.0000 at step 6 to 4.5000") == 1
    assert f"{BEST} of {LAST} steps" in Path("whole/final_model/README.md").read_text()


def test_a_run_that_is_stopped_after_its_best_step_still_ends_with_it(shown):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        at_step(patch, 8, send(signal.SIGTERM))
        train("stopped", *FLAGS, share="plain")
    train("stopped", *FLAGS, share="plain")
    assert_is_of_the_best_step("stopped")
    assert_same_bits(saved_state("stopped", LAST), saved_state("whole", LAST))


def test_a_best_step_that_the_run_has_lost_is_found_again(shown, losses, monkeypatch):
    """As after a crash, with an evaluation that differs in its last bits."""
    shutil.copytree("whole", "crashed")
    shutil.rmtree("crashed/checkpoints")
    shutil.copytree("run/checkpoints/3", "crashed/checkpoints/3")
    monkeypatch.setitem(losses, 5, 3.9)
    assert "the model of step 5" in train("crashed", *FLAGS, share="plain")
    assert steps("crashed/best") == ["5"]


def test_a_best_step_that_is_damaged_is_skipped_for_the_newest(shown, capsys):
    """Those in `checkpoints/` can still be chosen, and an unknown step names both."""
    shutil.copytree("whole", "damaged")
    for file in Path("damaged/best/checkpoints", str(BEST)).rglob("d/*"):
        file.write_bytes(b"")
    assert restore(Path("damaged"), None, "cpu").step == LAST
    assert f"Skipped best/checkpoints/{BEST}: " in capsys.readouterr().err
    with pytest.raises(UsageError, match=f"choose from {BEST}, {LAST}"):
        restore(Path("damaged"), 1, "cpu")


def test_a_best_step_that_is_lost_leaves_the_model_of_the_last(shown):
    for folder in ("best/checkpoints", "final_model"):
        shutil.rmtree(f"whole/{folder}")
    assert f"Done: {LAST} steps, the model is in" in train("whole", *FLAGS, share="plain")
