"""Memory on a mesh, compared with compiled programs. `test_memory.py` runs this file on eight devices."""

import json

import jax
import pytest

from jaxlm import plan
from jaxlm.cli import read_config
from jaxlm.core.parameters import parameter_table
from jaxlm.device.backend import resolve_run
from jaxlm.device.mesh import make_mesh
from jaxlm.run import memory
from tests import tiny_run

DEVICE = jax.devices()[0]


def state_bytes(config):
    """By hand: float32 weights, Adam's two moments or Muon's momentum with one number a neuron, a float16 average."""
    sizes = {
        "matrix": lambda p: p.size * (4 + 4 + 2) + 4 * p.shape[0] * p.shape[2],
        "embedding": lambda p: p.size * (4 + 8 + 2),
        "norm_scale": lambda p: p.size * (4 + 8 + 2),
    }
    return sum(sizes[p.kind](p) for p in parameter_table(config.model))


@pytest.mark.parametrize(("preset", "data", "fsdp"), [("gpt2_124m", 8, 1), ("gpt2_350m", 1, 8)])
def test_the_plan_of_a_larger_preset_is_what_the_compiled_programs_say(preset, data, fsdp):
    flags = [f"--config={preset}", f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}"]
    config = resolve_run(read_config(flags)[0], DEVICE)
    compiled = memory.compile_step(config, make_mesh(config, DEVICE))
    state = compiled.memory_analysis().argument_size_in_bytes
    by_hand = state_bytes(config) / fsdp
    assert by_hand < state < 1.01 * by_hand
    least, here = memory.min_memory(config), memory.step_memory(config, compiled)
    assert least.weights + least.moments == pytest.approx(state, abs=100_000)  # the batch
    assert least.checkpoint_copy == pytest.approx(least.weights + least.moments, abs=1000)  # counters
    elsewhere = memory.memory_elsewhere(config)
    assert here.step < elsewhere.step < 1.2 * here.step


def test_a_plan_measures_the_run_on_all_devices(tmp_path_factory, monkeypatch, capsys):
    with tiny_run.workplace(tmp_path_factory) as place:
        monkeypatch.setenv("XDG_CACHE_HOME", str(place))
        plan.main(["--config", "tiny.py", "--json", "--config.batch_size=8", "--config.mesh.fsdp=4"])
        report = json.loads(capsys.readouterr().out)
        assert report["machine"]["data_devices"] == 2
        assert report["speed"]["tokens_per_second"] > 0
        assert report["memory"]["weights_bytes"] == report["model"]["parameters"]  # a quarter of 4 bytes each
