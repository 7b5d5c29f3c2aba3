"""A run with Muon and an average of the weights evaluates and publishes the average, and resumes exactly."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.core.train_step import make_eval_step
from jaxlm.data.token_files import TokenFiles, val_batches
from jaxlm.errors import UsageError
from jaxlm.interop.huggingface import read_params
from jaxlm.main import open_data
from jaxlm.run.load import restore
from tests.tiny_run import assert_same_bits, config_of, resolved, rows, saved_state, train, workplace

pytestmark = pytest.mark.slow
RECIPE = {"name": "muon", "muon_momentum_warmup": 6, "muon_b2": 0.9, "cautious": "true", "average": 0.8}
FLAGS = [f"--config.optimizer.{name}={value}" for name, value in RECIPE.items()]
LAST = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with workplace(tmp_path_factory, trained=True) as place:
        train("average", *FLAGS, share="average")
        yield place


def average_of(workdir, step):
    state = saved_state(workdir, step)
    return jax.tree.map(lambda p, d: p + np.float32(d) / np.float32(256), state.params, state.average)


@pytest.mark.usefixtures("place")
def test_the_average_is_what_is_evaluated_and_published():
    average, config = average_of("average", LAST), resolved(config_of("average"))
    last = saved_state("average", LAST).params
    assert all(np.abs(a - b).max() > 1e-5 for a, b in zip(*map(jax.tree.leaves, (average, last)), strict=True))
    assert_same_bits(read_params(Path("average/final_model"), config.model), average)
    assert_same_bits(restore(Path("average"), None, "cpu").params, average)
    tokens: TokenFiles = open_data(config)
    evaluate, loss_sum, count = make_eval_step(config), 0.0, 0
    for inputs, targets in val_batches(tokens.val, config.model.context, config.chunk_size, 0):
        loss_sum += float(evaluate(average, inputs, targets))
        count += int((targets >= 0).sum())
    assert rows("average/metrics.jsonl")[-1]["val_loss"] == pytest.approx(loss_sum / count, rel=1e-6)


@pytest.mark.parametrize("step", [3, 9])
def test_a_run_that_resumes_ends_with_the_bits_of_an_uninterrupted_one(place, step):
    shutil.copytree("average", f"resumed{step}", ignore=shutil.ignore_patterns("final_model", "tensorboard", "lock"))
    for later in range(step + 3, LAST + 1, 3):
        shutil.rmtree(place / f"resumed{step}/checkpoints/{later}")
    assert f"Resuming from step {step}" in train(f"resumed{step}", *FLAGS, share="average")
    assert_same_bits(saved_state(f"resumed{step}", LAST), saved_state("average", LAST))
    for keys in (("step", "loss", "lr", "grad_norm"), ("val_loss",)):
        picked = [
            [[row[key] for key in keys] for row in rows(f"{name}/metrics.jsonl") if keys[0] in row]
            for name in (f"resumed{step}", "average")
        ]
        assert picked[0] == picked[1]
    assert rows(f"resumed{step}/samples.jsonl") == rows("average/samples.jsonl")


@pytest.mark.usefixtures("place")
def test_a_run_keeps_its_average():
    with pytest.raises(UsageError, match=r"optimizer\.average is 0\.0, the saved run has 0\.8"):
        train("average", *FLAGS[:-1])
