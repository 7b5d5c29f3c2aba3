"""A checkpoint restored elsewhere: under another version of jax, on eight devices, with other microbatch_chunks.

`tests/checkpoints/jax-VERSION` holds a checkpoint written by that version of jax, and the losses of the next steps.
`python -m tests.run.test_elsewhere` writes that of the installed version. `muon-jax-VERSION` is of a run with Muon,
written when its momentum was `b1` and its decay `weight_decay`.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.config import Config, ModelConfig, OptimizerConfig, from_config_dict, to_dict
from jaxlm.core.train_step import init_state, make_train_step
from jaxlm.device import backend  # noqa: F401  (its import settles how jax draws random bits)
from jaxlm.run.checkpoint import Checkpoints

SAVED = Path(__file__).parents[1] / "checkpoints"
SIZES = {"vocab_size": 257, "context": 16, "layers": 2, "heads": 2, "width": 8, "mlp_width": 8}
MODEL = ModelConfig(**SIZES, precision="float32", remat=True)
OPTIMIZER = OptimizerConfig(warmup_steps=2, learning_rate=1e-2)
CONFIG = Config(batch_size=8, grad_accum_steps=2, microbatch_chunks=1, max_steps=20, model=MODEL, optimizer=OPTIMIZER)
SAVED_AT, LAST = 4, 8  # steps
train_step = functools.cache(make_train_step)
ONE = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])


def batch(number):
    draw = np.random.default_rng(number)
    return draw.integers(0, 60, (CONFIG.batch_size, MODEL.context + 1), np.int32)


def losses_from(state, config, until=LAST, place=lambda ids: ids):
    """Trains from `state` to step `until`; returns the state and the losses."""
    step, losses = train_step(config), []
    for number in range(int(state.batches), until * config.grad_accum_steps):
        state, metrics = step(state, place(batch(number)))
        losses += [float(metrics.loss)] * bool(metrics.updated)
    return state, losses


def restore(place, sharding=ONE, config=CONFIG):
    like = jax.eval_shape(lambda: init_state(config))
    return Checkpoints(place).state(SAVED_AT, like, sharding)


def write(place):
    """Writes a checkpoint at SAVED_AT and the losses from there to LAST."""
    state, _ = losses_from(jax.device_put(init_state(CONFIG), ONE), CONFIG, SAVED_AT)
    checkpoints = Checkpoints(place)
    checkpoints.save(SAVED_AT, state, {"config": to_dict(CONFIG), "tokens": {}, "seconds": 1.5})
    checkpoints.wait()
    (place / "losses.json").write_text(json.dumps(losses_from(restore(place), CONFIG)[1]) + "\n")


@pytest.mark.parametrize("version", ["jax-0.4.34", "jax-0.10.2"])
@pytest.mark.parametrize("chunks", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_checkpoint_of_another_version_or_chunking_trains_on_with_the_same_losses(version, chunks):
    config = dataclasses.replace(CONFIG, microbatch_chunks=chunks)
    _, losses = losses_from(restore(SAVED / version, config=config), config)
    assert losses == pytest.approx(json.loads((SAVED / version / "losses.json").read_text()), rel=1e-5)
    assert len(losses) == LAST - SAVED_AT
    saved = from_config_dict(Checkpoints(SAVED / version).meta(SAVED_AT)["config"])
    assert saved == CONFIG


@pytest.mark.parametrize("version", [pytest.param("muon-jax-0.4.34", marks=pytest.mark.slow), "muon-jax-0.10.2"])
def test_an_old_checkpoint_of_muon_trains_on_with_the_same_losses(version):
    config = from_config_dict(Checkpoints(SAVED / version).meta(SAVED_AT)["config"])
    assert (config.optimizer.muon_momentum, config.optimizer.muon_weight_decay) == (0.8, 0.3)
    _, losses = losses_from(restore(SAVED / version, config=config), config)
    assert losses == pytest.approx(json.loads((SAVED / version / "losses.json").read_text()), rel=1e-5)


def on_eight_devices(place):
    """Restores on eight devices, trains there on sharded batches, and saves from there."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    state = restore(SAVED / "jax-0.10.2", everywhere)
    assert len(state.params["embedding"].sharding.device_set) == len(jax.devices()) == 8
    state, losses = losses_from(state, CONFIG, place=lambda ids: jax.device_put(ids, spread))
    checkpoints = Checkpoints(place)
    checkpoints.save(SAVED_AT, state, {"config": {}, "tokens": {}, "seconds": 0, "losses": losses})
    checkpoints.wait()


@pytest.mark.slow
def test_a_checkpoint_moves_from_one_device_to_eight_and_back(tmp_path):
    code = f"import pathlib; from {__name__} import on_eight_devices; on_eight_devices(pathlib.Path({str(tmp_path)!r}))"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(SAVED.parent.parent)}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=SAVED.parent, check=True)
    sharded_losses = Checkpoints(tmp_path).meta(SAVED_AT)["losses"]
    state, losses = losses_from(restore(SAVED / "jax-0.10.2"), CONFIG)
    assert sharded_losses == pytest.approx(losses, rel=1e-5)
    for a, b in zip(jax.tree.leaves(restore(tmp_path).params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


if __name__ == "__main__":
    write(SAVED / f"jax-{jax.__version__}")
