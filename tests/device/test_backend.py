"""How jax starts: the compilation cache, the environment, the memory, and what is resolved for each device."""

import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxlm.config import Config, MeshConfig, ModelConfig, OptimizerConfig
from jaxlm.device import backend
from jaxlm.device.backend import APPLE, CHUNK_TOKENS, available_memory, identity, resolve_run
from jaxlm.errors import UsageError
from jaxlm.run.memory import compile_step, step_memory
from tests.tiny_run import is_one_line

EVENTS: list[str] = []
jax.monitoring.register_event_listener(lambda name, **_: EVENTS.append(name))
caches = pytest.mark.skipif(jax.__version_info__ < (0, 5), reason="this jax's cache corrupts memory on the CPU")
CPU = jax.devices("cpu")[0]
CACHE_SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


def cache_hits() -> int:
    """Compiles and runs a program; returns how many of its parts came from the cache."""
    compilation_cache.reset_cache()
    EVENTS.clear()
    assert jax.jit(lambda x: jnp.sort(x) @ jnp.cumsum(x))(jnp.arange(9.0)) == 750
    return sum(name.endswith("/cache_hits") for name in EVENTS)


def files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


@pytest.fixture
def new_start(monkeypatch, tmp_path):
    """jax as in a new process without settings, whose home is an empty directory."""
    before = {name: getattr(jax.config, name) for name in CACHE_SETTINGS}
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(backend, "_MIN_COMPILE_SECONDS", 0.0)
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@caches
@pytest.mark.parametrize("variable", [None, "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"])
def test_programs_are_cached_in_the_users_directory(new_start, monkeypatch, tmp_path, variable):
    if variable == "XDG_CACHE_HOME":
        monkeypatch.setenv(variable, str(tmp_path / "named"))
    elif variable:  # jax reads it when it is imported
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "named"))
    backend.start("cpu")
    assert cache_hits() == 0
    assert cache_hits() > 0
    homes = [tmp_path / "home" / name for name in (".cache/jaxlm", "Library/Caches/jaxlm")]
    directory = tmp_path / "named" if variable else next(home for home in homes if home.exists())
    assert files(tmp_path) == files(directory) != []


@caches
@pytest.mark.filterwarnings("ignore:Error reading")
@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: b"", lambda data: bytes(len(data))])
def test_damaged_programs_are_compiled_again(new_start, tmp_path, damage):
    backend.start("cpu")
    cache_hits()
    for path in files(tmp_path):
        path.write_bytes(damage(path.read_bytes()))
    assert cache_hits() == 0


def test_the_programs_that_were_read_last_are_kept(new_start, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(backend, "_CACHE_BYTES", 250)
    directory = tmp_path / "jaxlm"
    directory.mkdir()
    ages = {"old-cache": (9, 9), "read-cache": (1, 10), "new-cache": (2, 2), "measured.json": (99, 99)}
    for name, (read, written) in ages.items():
        (directory / name).write_bytes(bytes(100))
        os.utime(directory / name, (1e9 - read, 1e9 - written))
    backend.start("cpu")
    assert {path.name for path in directory.iterdir()} == {"read-cache", "new-cache", "measured.json"}


def test_a_cache_that_the_user_names_is_not_bounded(new_start, monkeypatch, tmp_path):
    monkeypatch.setattr(backend, "_CACHE_BYTES", 0)
    (tmp_path / "old-cache").write_bytes(bytes(100))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    backend.start("cpu")
    assert (tmp_path / "old-cache").exists()


def test_a_directory_that_cannot_be_written_is_no_error(new_start, tmp_path):
    (tmp_path / "home").touch()
    backend.start("cpu")
    assert cache_hits() == 0
    assert jax.config.jax_compilation_cache_dir is None


PROGRAM = """
import jax, jax.numpy as jnp
from jaxlm.device import backend
backend._MIN_COMPILE_SECONDS = 0.0
backend.start("cpu")
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
jax.jit(lambda x: jnp.sort(x) @ jnp.cumsum(x))(jnp.arange(9.0))
print(sum(name.endswith("/cache_hits") for name in events))
"""


def cache_hits_of_a_process(home: Path, **settings: str) -> int:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XDG_"))}
    environment = inherited | {"PYTHONPATH": str(Path(__file__).parents[2]), "HOME": str(home)} | settings
    command = [sys.executable, "-c", PROGRAM]
    return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
@caches
def test_a_process_reads_what_another_compiled(tmp_path):
    assert cache_hits_of_a_process(tmp_path) == 0
    assert cache_hits_of_a_process(tmp_path) > 0


@pytest.mark.skipif(jax.__version_info__ >= (0, 5), reason="this jax's cache works")
def test_a_jax_whose_cache_corrupts_memory_caches_nothing(tmp_path):
    assert cache_hits_of_a_process(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "named")) == 0
    assert not files(tmp_path)


@pytest.mark.parametrize(("batch", "context"), [(32, 1024), (12, 300), (7, 500), (2, 4096), (16, 128), (1, 8)])
def test_a_cpu_gets_the_largest_chunks_that_fit(batch, context):
    config = Config(batch_size=batch, model=ModelConfig(context=context))
    resolved = resolve_run(config, CPU)
    assert resolved.chunk_size * resolved.microbatch_chunks == batch
    assert resolved.chunk_size == 1 or resolved.chunk_size * context <= CHUNK_TOKENS
    larger = [size for size in range(resolved.chunk_size + 1, batch + 1) if batch % size == 0]
    assert all(size * context > CHUNK_TOKENS for size in larger)
    assert (resolved.model.precision, resolved.model.implementation) == ("float32", "cpu")


def test_blocks_are_recomputed_where_memory_is_short(monkeypatch):
    def recomputes(room, batch=32, chunks=0, devices=1, device=CPU, **sizes):
        monkeypatch.setattr(backend, "available_memory", lambda device: room)
        mesh = MeshConfig(devices, 1)
        config = Config(batch_size=batch, microbatch_chunks=chunks, model=ModelConfig(**sizes), mesh=mesh)
        return resolve_run(config, device).model.remat

    assert [recomputes(room * 10**9) for room in (1, 4, 16, 25)] == [True, True, False, False]
    assert recomputes(16 * 10**9, chunks=1)  # 32 sequences at once
    assert recomputes(16 * 10**9, layers=64)
    # each of eight devices has 8 sequences, and devices of a CPU share its memory
    gpu = SimpleNamespace(platform="gpu", compute_capability="8.0")
    spread = [{"batch": 64, "chunks": 1, "devices": 8, "device": device} for device in (gpu, CPU)]
    assert [[recomputes(room * 10**9, **each) for room in (10, 20, 110)] for each in spread] == [
        [True, False, False],
        [True, True, False],
    ]
    assert recomputes(16 * 10**9, remat=True) and not recomputes(10**9, remat=False)  # as a person says


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"layers": 2}, {"vocab_size": 300, "mlp_width": 512, "layers": 4}])
def test_a_step_without_remat_takes_about_what_is_expected(sizes):
    """By XLA's analysis."""
    config = resolve_run(Config(batch_size=2, model=ModelConfig(remat=False, **sizes)), CPU)
    expected = backend._bytes_without_remat(config)
    assert 0.5 * expected < step_memory(config, compile_step(config)).step < 1.2 * expected


@pytest.mark.parametrize("platform", APPLE)
def test_an_apple_gpu_gets_chunks_of_one_sequence_and_no_remat(platform):
    device = SimpleNamespace(platform=platform)
    resolved = resolve_run(Config(), device)
    assert (resolved.chunk_size, resolved.model.remat) == (1, False)
    assert (resolved.model.precision, resolved.model.implementation) == ("float32", "apple")
    model = ModelConfig(precision="float32", implementation="xla")
    explicit = Config(microbatch_chunks=8, model=replace(model, remat=True), mesh=MeshConfig(data=1))
    assert resolve_run(explicit, device) == explicit


@pytest.mark.parametrize("platform", APPLE)
def test_sums_that_an_apple_gpu_computes_wrong_are_refused(platform):
    device = SimpleNamespace(platform=platform)

    def run(microbatch_chunks=1, **sizes):
        model = ModelConfig(**{"context": 31, "heads": 1} | sizes)
        return Config(batch_size=7, microbatch_chunks=microbatch_chunks, model=model)

    for wrong, setting in (
        (run(context=4681), "microbatch_chunks"),  # 7 x 4681
        (run(width=32768), "model.width"),
        (run(mlp_width=32767), "model.mlp_width"),
        (run(context=32767, microbatch_chunks=7), "model.context"),
    ):
        with pytest.raises(UsageError, match=rf"32,767 .* set .*{setting}") as caught:
            resolve_run(wrong, device)
        assert is_one_line(caught.value)
        resolve_run(wrong, CPU)
    for right in (run(context=4680), run(width=32764), run(mlp_width=32766), run(context=32766, microbatch_chunks=7)):
        resolve_run(right, device)


@pytest.mark.parametrize("precision", ["bf16", "bf16_matmul"])
def test_jax_metal_refuses_bfloat16(precision):
    config = Config(model=ModelConfig(precision=precision))
    with pytest.raises(UsageError, match="set it to float32") as caught:
        resolve_run(config, SimpleNamespace(platform="METAL"))
    assert is_one_line(caught.value)
    assert resolve_run(config, SimpleNamespace(platform="mps")).model.precision == precision


def test_jax_metal_refuses_the_float16_of_an_average():
    config = Config(optimizer=OptimizerConfig(average=0.9))
    with pytest.raises(UsageError, match=r"optimizer\.average needs: set it to 0") as caught:
        resolve_run(config, SimpleNamespace(platform="METAL"))
    assert is_one_line(caught.value)
    assert resolve_run(config, SimpleNamespace(platform="mps")).optimizer.average == 0.9


@pytest.mark.parametrize("remat", [None, True, False])
def test_an_nvidia_gpu_computes_a_micro_batch_at_once(remat):
    small = {"bytes_limit": 2 * 10**9}
    gpu = SimpleNamespace(platform="gpu", compute_capability="8.0", memory_stats=lambda: small)
    config = Config(model=ModelConfig(remat=remat))
    resolved = resolve_run(config, gpu)
    assert (resolved.microbatch_chunks, resolved.model.remat, resolved.model.precision) == (1, False, "bf16")
    explicit = resolve_run(replace(config, microbatch_chunks=8), gpu)
    assert (explicit.microbatch_chunks, explicit.model.remat) == (8, remat is not False)


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="Linux tells its memory there")
@pytest.mark.parametrize("limit", [math.inf, 3e15, 123_000_000])
def test_a_process_can_use_the_memory_or_its_limit(monkeypatch, limit):
    monkeypatch.setattr(backend, "memory_limit", lambda: limit)
    expected = min(int(Path("/proc/meminfo").read_text().split()[1]) * 1024, limit)
    assert available_memory(CPU) == pytest.approx(expected, rel=0.01)
    for platform in APPLE:
        assert available_memory(SimpleNamespace(platform=platform)) == pytest.approx(expected * 2 / 3, rel=0.01)
    assert available_memory(SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 7})) == 7


@pytest.mark.parametrize(
    ("capability", "precision", "implementation"),
    [
        ("8.0", "auto", "cuda"),
        ("12.0", "bf16", "cuda"),
        ("7.5", "auto", "xla"),  # Turing, which has no such attention in cuDNN
        ("7.5", "float32", "cuda"),
        ("gfx90a", "auto", "xla"),  # of AMD
    ],
)
def test_a_gpu_gets_the_kernels_that_it_can_run(capability, precision, implementation):
    gpu = SimpleNamespace(platform="gpu", compute_capability=capability)
    model = ModelConfig(precision=precision)
    assert backend.resolve(model, gpu).implementation == implementation
    explicit = replace(model, implementation="cuda")
    if implementation == "cuda":
        assert backend.resolve(explicit, gpu).implementation == "cuda"
        return
    with pytest.raises(UsageError, match=r"Ampere .* set it to auto") as caught:
        backend.resolve(explicit, gpu)
    assert is_one_line(caught.value)


def test_a_change_of_any_source_file_changes_the_identity(monkeypatch, tmp_path):
    package = Path(backend.__file__).parents[1]
    shutil.copytree(package, tmp_path / "jaxlm", ignore=shutil.ignore_patterns("__pycache__", "*.tiktoken"))
    original = identity(CPU)
    monkeypatch.setattr(backend, "__file__", str(tmp_path / "jaxlm" / "device" / "backend.py"))
    assert identity(CPU) == original
    for name in ("config.py", "core/model.py", "core/ops/hopper.py"):
        file = tmp_path / "jaxlm" / name
        source = file.read_bytes()
        file.write_bytes(source + b"\n")
        assert identity(CPU) != original
        file.write_bytes(source)
    assert identity(CPU) == original


class Driver:
    """NVIDIA's driver, with two cards."""

    def __init__(self, status: int = 0):
        self.status = status

    def cuDeviceGet(self, handle, ordinal):
        handle._obj.value = 100 + ordinal
        return self.status

    def cuDeviceGetUuid_v2(self, uuid, handle):
        uuid._obj[:] = [handle.value] * 16
        return 0


def test_a_card_is_known_by_its_uuid_else_by_its_index(monkeypatch):
    first, second = (SimpleNamespace(platform="gpu", id=i + 8, local_hardware_id=i) for i in range(2))
    monkeypatch.setattr(backend.ctypes, "CDLL", lambda name: Driver())
    assert [backend.card(first), backend.card(second)] == ["64" * 16, "65" * 16]
    assert backend.card(CPU) == str(CPU.id)
    for driver in (Driver(status=3), object()):
        monkeypatch.setattr(backend.ctypes, "CDLL", lambda name, driver=driver: driver)
        assert backend.card(second) == "9"
    monkeypatch.setattr(backend.ctypes, "CDLL", mock.Mock(side_effect=OSError))
    assert backend.card(second) == "9"


@pytest.mark.parametrize("inherited", [None, "1"])
def test_jax_mps_gets_its_environment_unless_it_is_set(monkeypatch, inherited):
    for name in ("JAX_MPS_CACHE_LIMIT_BYTES", "MLX_ENABLE_TF32"):
        monkeypatch.setenv(name, inherited or "")
        if inherited is None:
            monkeypatch.delenv(name)
    backend.start("cpu")
    assert os.environ["MLX_ENABLE_TF32"] == (inherited or "0")
    assert os.environ["JAX_MPS_CACHE_LIMIT_BYTES"] == (inherited or "256000000")


def test_a_child_process_compiles_with_the_same_flags(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=true")
    backend.start("cpu", deterministic=True)
    flags = os.environ["XLA_FLAGS"]
    backend.start("cpu", deterministic=True)
    assert os.environ["XLA_FLAGS"] == flags
    assert flags.split()[-1] == "--xla_cpu_multi_thread_eigen=true"


@pytest.mark.parametrize(("device", "calls"), [(CPU, True), (SimpleNamespace(platform="gpu"), False)])
def test_malloc_is_configured_for_a_cpu_only(monkeypatch, device, calls):
    libc = mock.MagicMock()
    libc.malloc.return_value = 8
    monkeypatch.setattr(backend.ctypes, "CDLL", lambda name: libc)
    backend.keep_freed_memory(device, 10)
    assert libc.mallopt.called == libc.malloc.called == calls
