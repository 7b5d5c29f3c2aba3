"""The short run, in its own process, and what follows from it for a run that is larger."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from jaxlm.cli import read_config
from jaxlm.config import to_dict
from jaxlm.errors import RunError
from jaxlm.planner import measure
from jaxlm.planner.measure import BenchmarkResult
from jaxlm.run.memory import least_memory
from tests import tiny_run
from tests.tiny_run import listing


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    with tiny_run.workplace(tmp_path_factory) as place:
        yield place


@pytest.fixture(scope="module")
def config(place):
    return tiny_run.resolved(read_config(["--config", "tiny.py"])[0])


def measured(**changes):
    times = dict.fromkeys(("start", "first", "update", "evaluation", "samples", "save", "saving", "end"), 0.0)
    sizes = dict.fromkeys(("peak_bytes", "checkpoint_bytes", "model_bytes"), 1)
    step = {"step": 1.0, "step_fast": 1.0, "step_slow": 1.0, "flops_per_second": 1e9}
    return BenchmarkResult(batch_size=2, grad_accum_steps=2, microbatch_chunks=2, **times | sizes | step | changes)


@pytest.mark.slow
def test_the_short_run_measures_the_real_loop_and_leaves_nothing(config):
    device = jax.devices()[0]
    before, shares = listing(Path()), []
    found = measure.measure(config, device, Path(), shares.append)
    assert listing(Path()) == before
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] == 1.0
    assert found.step_fast <= found.step_slow
    values = dataclasses.asdict(found)
    assert all(value > 0 for name, value in values.items() if name not in ("update", "first"))
    assert found.start > found.step
    assert measure.reduced(config, found) == config
    state = least_memory(config)
    assert 0.5 * state.checkpoint_copy < found.checkpoint_bytes < state.checkpoint_copy + 40_000
    assert state.weights < found.model_bytes < state.weights + 5_000_000  # the tokenizer's files


def test_a_run_that_fails_is_said_in_one_line(config):
    longer = dataclasses.replace(config, sample=dataclasses.replace(config.sample, prompts=("word " * 40,)))
    with pytest.raises(RunError, match="context") as caught:
        measure.measure(longer, jax.devices()[0], Path(), lambda share: None)
    assert tiny_run.is_one_line(caught.value)


def test_the_short_run_ends_with_the_process_that_asked_for_it(config, tmp_path):
    words = [str(tmp_path / "short"), "0", "1e9", str(time.monotonic()), json.dumps(to_dict(config))]
    command = [sys.executable, "-m", "jaxlm.planner.measure", *words]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert "checkpoint_bytes" not in done.stdout


def test_whole_steps_are_taken_as_they_were_measured(config):
    s = measure.seconds(config, measured(evaluation=0.5, saving=3.0, end=2.0, start=4.0, first=1.5), 21)
    assert (s.step, s.start, s.end) == (1.0, 5.5, 5.0)
    assert config.chunk_size == 2
    assert (s.evaluation, s.last_evaluation) == (1.0, 5.5)  # 4 windows, and 21, two at a time


def test_a_slice_is_taken_as_often_as_the_step_has_slices_and_the_update_once_a_micro_batch():
    config, _ = read_config(["--config", "tiny.py", "--config.batch_size=8", "--config.microbatch_chunks=4"])
    s = measure.seconds(config, measured(step=1.25, update=0.25), 0)
    assert s.step == 2 * (4 * 1.0 + 0.25)


def test_what_was_measured_holds_for_other_intervals_but_not_for_other_shapes(config):
    device = jax.devices()[0]
    key = measure.key(config, device)
    same = {"max_checkpoints": 2, "eval_interval": 7, "save_interval": 9, "seed": 3}
    assert measure.key(dataclasses.replace(config, **same), device) == key
    assert json.loads(json.dumps(key)) == json.loads(json.dumps(measure.key(config, device)))
    for other in (
        dataclasses.replace(config, batch_size=4),
        dataclasses.replace(config, model=dataclasses.replace(config.model, remat=False)),
        dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, name="muon")),
        dataclasses.replace(config, sample=dataclasses.replace(config.sample, tokens=6)),
    ):
        assert measure.key(other, device) != key
