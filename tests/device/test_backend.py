"""What is compiled is kept for the next start, in the user's cache, and nothing about that place stops a program."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxlm.config import Config, ModelConfig
from jaxlm.device import backend
from jaxlm.device.backend import APPLE, CHUNK_TOKENS, available_memory, resolve_run
from jaxlm.errors import UsageError
from tests.tiny_run import is_one_line

PROGRAM = """
import warnings, jax, jax.numpy as jnp
from jaxlm.device import backend
warnings.simplefilter("ignore")
backend._WORTH_KEEPING = 0.0
backend.start("cpu")
found = []
jax.monitoring.register_event_listener(lambda name, **_: found.append(name))
print(jax.jit(lambda x: jnp.sort(x) @ jnp.cumsum(x))(jnp.arange(9.0)))
print(sum(name.endswith("/cache_hits") for name in found))
"""
EXPECTED = np.arange(9.0) @ np.cumsum(np.arange(9.0))
sound = pytest.mark.skipif(jax.__version_info__ < (0, 5), reason="this jax's cache corrupts memory on the CPU")


def compute(home: Path, **settings: str) -> int:
    """Computes in a process of its own whose home is `home`; gives how much of it the cache held."""
    usual = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XDG_"))}
    environment = usual | {"PYTHONPATH": str(Path(__file__).parents[2]), "HOME": str(home)} | settings
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    result, hits = done.stdout.split()
    assert float(result) == EXPECTED
    return int(hits)


def files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


@sound
@pytest.mark.parametrize("variable", [None, "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"])
def test_the_next_start_reads_what_this_one_compiled(tmp_path, variable):
    home, named = tmp_path / "home", tmp_path / "named"
    settings = {variable: str(named)} if variable else {}
    if variable == "JAX_COMPILATION_CACHE_DIR":
        settings["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    assert compute(home, **settings) == 0
    assert compute(home, **settings) > 0
    place = next((home / name for name in (".cache/jaxlm", "Library/Caches/jaxlm") if (home / name).exists()), named)
    assert files(tmp_path) == files(place) != []


@sound
@pytest.mark.parametrize("damage", [lambda held: held[:100], lambda held: b"", lambda held: bytes(len(held))])
def test_what_is_damaged_is_compiled_anew(tmp_path, damage):
    compute(tmp_path)
    for path in files(tmp_path):
        path.write_bytes(damage(path.read_bytes()))
    assert compute(tmp_path) == 0


def test_a_place_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").touch()
    assert compute(tmp_path / "file") == 0


@pytest.mark.skipif(jax.__version_info__ >= (0, 5), reason="this jax's cache is sound")
def test_a_jax_whose_cache_is_unsound_keeps_nothing(tmp_path):
    assert compute(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "named")) == 0
    assert not files(tmp_path)


@pytest.mark.parametrize(("batch", "context"), [(32, 1024), (12, 300), (7, 500), (2, 4096), (16, 128), (1, 8)])
def test_without_slices_as_few_are_taken_as_fit(batch, context):
    config = Config(batch_size=batch, model=ModelConfig(context=context))
    found = resolve_run(config, jax.devices("cpu")[0])
    assert found.chunk_size * found.microbatch_chunks == batch
    assert found.chunk_size == 1 or found.chunk_size * context <= CHUNK_TOKENS
    larger = [size for size in range(found.chunk_size + 1, batch + 1) if batch % size == 0]
    assert all(size * context > CHUNK_TOKENS for size in larger)
    assert (found.model.precision, found.model.remat) == ("float32", True)


@pytest.mark.parametrize("platform", APPLE)
def test_an_apple_gpu_takes_a_sequence_at_a_time_recomputes_nothing_and_gets_no_loops(platform):
    device = SimpleNamespace(platform=platform)
    found = resolve_run(Config(), device)
    assert (found.chunk_size, found.model.remat, found.model.implementation) == (1, False, "apple")
    assert found.model.precision == "float32"
    told = resolve_run(Config(microbatch_chunks=8, model=ModelConfig(implementation="xla")), device)
    assert (told.microbatch_chunks, told.model.remat, told.model.implementation) == (8, True, "xla")
    assert resolve_run(Config(), jax.devices("cpu")[0]).model.implementation == "cpu"


@pytest.mark.parametrize("platform", APPLE)
def test_sums_that_an_apple_gpu_computes_wrong_are_refused_by_the_setting_to_change(platform):
    device, cpu = SimpleNamespace(platform=platform), jax.devices("cpu")[0]

    def run(**sizes):
        slices = sizes.pop("microbatch_chunks", 1)
        return Config(batch_size=7, microbatch_chunks=slices, model=ModelConfig(**{"context": 31, "heads": 1} | sizes))

    for wrong, setting in (
        (run(context=4681), "microbatch_chunks"),  # 7 x 4681
        (run(width=32768), "model.width"),
        (run(mlp_width=32767), "model.mlp_width"),
        (run(context=32767, microbatch_chunks=7), "model.context"),
    ):
        with pytest.raises(UsageError, match=rf"32,767 .* set .*{setting}") as caught:
            resolve_run(wrong, device)
        assert is_one_line(caught.value)
        assert resolve_run(wrong, cpu).model.implementation == "cpu"
    for right in (run(context=4680), run(width=32764), run(mlp_width=32766), run(context=32766, microbatch_chunks=7)):
        resolve_run(right, device)


@pytest.mark.parametrize("precision", ["bf16", "bf16_matmul"])
def test_jax_metal_is_asked_for_nothing_in_bfloat16(precision):
    config = Config(model=ModelConfig(precision=precision))
    with pytest.raises(UsageError, match="set it to float32") as caught:
        resolve_run(config, SimpleNamespace(platform="METAL"))
    assert is_one_line(caught.value)
    assert resolve_run(config, SimpleNamespace(platform="mps")).model.precision == precision


@pytest.mark.parametrize("set_before", [None, "1"])
def test_jax_mps_keeps_few_freed_buffers_and_rounds_no_float32_unless_it_is_told_to(monkeypatch, set_before):
    for name in ("JAX_MPS_CACHE_LIMIT_BYTES", "MLX_ENABLE_TF32"):
        monkeypatch.setenv(name, set_before or "")
        if set_before is None:
            monkeypatch.delenv(name)
    backend.start("cpu")
    assert os.environ["MLX_ENABLE_TF32"] == (set_before or "0")
    assert os.environ["JAX_MPS_CACHE_LIMIT_BYTES"] == (set_before or "256000000")


@pytest.mark.parametrize("remat", [True, False])
def test_a_gpu_takes_a_micro_batch_at_once_unless_told_otherwise(remat):
    gpu = SimpleNamespace(platform="gpu", compute_capability="8.0")
    config = Config(model=ModelConfig(remat=remat))
    found = resolve_run(config, gpu)
    assert (found.microbatch_chunks, found.model.remat, found.model.precision) == (1, False, "bf16")
    told = resolve_run(replace(config, microbatch_chunks=8), gpu)
    assert (told.microbatch_chunks, told.model.remat) == (8, remat)


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="Linux tells there what memory it has")
def test_a_process_may_have_a_part_of_the_memory_that_an_apple_gpu_shares():
    with open("/proc/meminfo") as file:
        memory = int(file.readline().split()[1]) * 1024
    assert available_memory(jax.devices("cpu")[0]) == pytest.approx(memory, rel=0.01)
    for platform in APPLE:
        share = available_memory(SimpleNamespace(platform=platform)) / memory
        assert share == pytest.approx(2 / 3, rel=0.01)
    assert available_memory(SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 7})) == 7


def test_a_process_started_by_another_compiles_under_the_same_words(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=true")
    backend.start("cpu", deterministic=True)
    once = os.environ["XLA_FLAGS"]
    backend.start("cpu", deterministic=True)
    assert os.environ["XLA_FLAGS"] == once
    assert once.split()[-1] == "--xla_cpu_multi_thread_eigen=true"
