"""Starts jax on a device, and decides what depends on the device."""

import contextlib
import ctypes
import dataclasses
import hashlib
import os
import platform as machine
import re
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax
import jaxlib

from jaxlm.config import Config, ModelConfig
from jaxlm.core.ops import hopper
from jaxlm.core.parameters import parameter_table
from jaxlm.device import plugins
from jaxlm.device.memory_limit import memory_limit
from jaxlm.device.mesh import resolve_mesh, share
from jaxlm.errors import UsageError
from jaxlm.storage import user_cache

# Settings of jax that change numbers or samples, or raise where training continues. They are fixed, so that one seed
# gives one model in any environment. The default of the first differs between versions of jax.
_SETTINGS = {
    "jax_threefry_partitionable": True,
    "jax_enable_x64": False,
    "jax_default_prng_impl": "threefry2x32",
    "jax_enable_custom_prng": False,
    "jax_legacy_prng_key": "allow",
    "jax_random_seed_offset": 0,
    "jax_high_dynamic_range_gumbel": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_explicit_x64_dtypes": "warn",
    "jax_default_matmul_precision": None,  # `model.precision` decides
    "jax_allow_f16_reductions": True,
    "jax_disable_jit": False,
    "jax_debug_nans": False,  # training skips micro-batches that are not finite
    "jax_debug_infs": False,
    "jax_transfer_guard": "allow",
}
_ignored = ["JAX_PLATFORM_NAME"] * ("JAX_PLATFORM_NAME" in os.environ)  # variables, which `start` names
jax.config.update("jax_platform_name", "")  # `platform` or JAX_PLATFORMS decides
for _name, _value in _SETTINGS.items():
    if hasattr(jax.config, _name):  # versions of jax differ
        if getattr(jax.config, _name) != _value and _name.upper() in os.environ:
            _ignored.append(_name.upper())
        jax.config.update(_name, _value)

# jax 0.4.34 corrupts memory when it reads CPU programs from this cache
if jax.__version_info__ < (0, 5):
    jax.config.update("jax_enable_compilation_cache", False)

CHUNK_TOKENS = 1024  # tokens in a chunk, at most, on devices that share the machine's memory
APPLE = ("mps", "METAL")  # jax's names for the platforms of an Apple GPU
CONTRACTION_LIMIT = 32_767  # matmuls on M1 and M2 that contract so many numbers or more read past their operands

_ALSO_APPLE = ("metal", "mtl", "iree_metal")  # the platforms of other plugins
_MIN_COMPILE_SECONDS = 0.1  # of a program that is worth caching
_CACHE_BYTES = 10**9  # of compiled programs; the preset's take some 10 MB for each version of jax
_XLA_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
_XLA_CUBLAS = "--xla_gpu_enable_triton_gemm=false"  # Triton's matmuls lose the time that they save elsewhere
_MPS_ENVIRONMENT = {  # what jax-mps and MLX read when they load
    "JAX_MPS_CACHE_LIMIT_BYTES": str(256 * 10**6),  # of freed buffers; the default may fill the shared memory
    "MLX_ENABLE_TF32": "0",  # the numerics check allows 0.001 in float32; TF32 rounds to that
}
_CUDNN_CAPABILITY = (8, 0)  # of Ampere, the first with cuDNN's attention; jax does not check it
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
_SPARE_CHUNKS = (2**26, *[2**20] * 64)  # bytes: one for a small model's samples, and one for each small buffer
_SLACK = 2**21  # bytes; larger than the small chunks, so that malloc does not take them from the rest of the large one


def start(platform: str, deterministic: bool = False) -> jax.Device:
    """Starts jax.

    Args:
        platform: cpu, cuda, mps, metal, or auto for the best that works here. If JAX_PLATFORMS is set, auto uses that.
        deterministic: makes an NVIDIA GPU compute the same bits in every session, as the other platforms do.

    Returns:
        The device to compute on.

    Raises UsageError if the named platform is not here, cannot be used, or does not start.
    """
    for name in _ignored:
        print(f"{name} is ignored: jaxlm's own settings say what is computed", file=sys.stderr)
    _cache_compilations()
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # for keep_freed_memory
    flags = [_XLA_CUBLAS] * (platform in ("auto", "cuda")) + [_XLA_DETERMINISTIC] * deterministic
    inherited = os.environ.get("XLA_FLAGS", "").split()
    # each flag once, even if the parent process has set it: the compilation cache depends on this string
    os.environ["XLA_FLAGS"] = " ".join([*(flag for flag in flags if flag not in inherited), *inherited])
    for name, value in _MPS_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    by_environment = jax.config.jax_platforms if platform == "auto" else None  # type: ignore[attr-defined]
    if by_environment:
        plugins.refuse_wrong_versions(by_environment)
        names, plugin = by_environment, ""
    else:
        names, plugin = plugins.choose(platform)
    may_be_cpu = "cpu" in names.split(",")
    jax.config.update("jax_platforms", names if may_be_cpu else f"{names},cpu")  # the CPU draws the parameters
    try:
        device = jax.local_devices()[0]
        if device in jax.devices("cpu") and not may_be_cpu:  # jax passes over cuda where it sees no GPU
            raise RuntimeError("it finds no device")
    except RuntimeError as error:
        reason = str(error).split(". ")[0].splitlines()[0]
        if platform != "auto" or not plugin:
            asked = f"JAX_PLATFORMS={by_environment}" if by_environment else f"platform {platform}"
            raise UsageError(
                f"{asked} does not start ({reason}): check the driver and jax's plugin, or set the platform to cpu"
            ) from error
        print(f"Computing without {plugin}, which no longer starts ({reason})", file=sys.stderr)
        jax.config.update("jax_platforms", "cpu")
        device = jax.local_devices()[0]
    return device


def _cache_compilations() -> None:
    """Caches compiled programs in the user's cache directory, unless JAX_COMPILATION_CACHE_DIR names another.

    Without a directory that can be written, nothing is cached. jax compiles again what it cannot read. In the user's
    directory the programs that were not read for longest are deleted above `_CACHE_BYTES`. (jax's own limit needs a
    package that jax does not install.)
    """
    if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    if directory := user_cache.directory():
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)
        _bound_cache(directory)


def _bound_cache(directory: Path) -> None:
    room = _CACHE_BYTES
    programs = []
    for path in directory.glob("*-cache"):
        with contextlib.suppress(OSError):  # another process may delete it
            programs.append((path.stat(), path))
    for status, path in sorted(programs, key=lambda entry: -max(entry[0].st_atime, entry[0].st_mtime)):
        room -= status.st_size
        if room < 0:
            with contextlib.suppress(OSError):
                path.unlink()


def keep_freed_memory(device: jax.Device, temporaries: int) -> None:
    """Makes glibc's malloc keep freed memory for the next step, if a CPU computes it. Call it after compilation.

    By default, malloc returns large chunks to the system. Getting them back costs about a microsecond a page, a tenth
    of a step. malloc keeps them for the main thread only, so `start` makes the CPU compute in it.

    malloc reuses the smallest free chunk that fits. One chunk of the step's size and some small ones are allocated and
    freed here, so that later allocations do not fragment the large one. They use no memory until they are written.
    Before that, on every device, jax's caches of traced functions are freed.

    Args:
        device: what computes the step.
        temporaries: bytes that a step allocates and frees.
    """
    jax.clear_caches()
    libc = ctypes.CDLL(None)
    if device.platform == "cpu" and hasattr(libc, "mallopt"):
        libc.malloc_trim(0)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.malloc.restype = ctypes.c_void_p
        sizes = (temporaries + _SLACK, *_SPARE_CHUNKS)
        chunks = [libc.malloc(ctypes.c_size_t(size)) for size in sizes for _ in range(2)]
        for chunk in chunks[::2]:  # those between them stay allocated, or malloc would merge the free ones
            libc.free(ctypes.c_void_p(chunk))


def on_apple(device: jax.Device) -> bool:
    """Whether a device is an Apple GPU."""
    return device.platform in (*APPLE, *_ALSO_APPLE)


def takes_threads(device: jax.Device) -> bool:
    """Whether two threads may use a device at once. Apple's plugins may not expect it."""
    return not on_apple(device)


def where_memory_is_analysed(device: jax.Device) -> AbstractContextManager[Any]:
    """The context in which to compile a step whose memory is asked for: Apple's plugins tell none, so for the CPU."""
    return jax.default_device(jax.local_devices(backend="cpu")[0]) if on_apple(device) else nullcontext()


def resolve(model: ModelConfig, device: jax.Device) -> ModelConfig:
    """Replaces what is `auto` in a model by what fits the device.

    The precision is bf16 on an NVIDIA GPU and float32 elsewhere. The implementation is a name in `core.ops`.

    Raises UsageError if the implementation that is asked for does not fit, or an Apple GPU would compute wrong numbers.
    """
    if on_apple(device):
        for name in ("context", "width", "mlp_width"):
            if getattr(model, name) >= CONTRACTION_LIMIT:
                limit = f"{CONTRACTION_LIMIT:,}"
                raise UsageError(
                    f"an Apple GPU computes sums of {limit} or more numbers wrong: set a lower model.{name}"
                )
    if device.platform == "METAL" and model.precision in ("bf16", "bf16_matmul"):
        raise UsageError(
            f"jax-metal computes nothing in bfloat16, as model.precision {model.precision} would: set it to float32"
        )
    on_cuda, implementation = device.platform == "gpu", model.implementation
    precision = ("bf16" if on_cuda else "float32") if model.precision == "auto" else model.precision
    capability = _compute_capability(device)
    cuda_fits = on_cuda and (capability >= _CUDNN_CAPABILITY or precision != "bf16")
    is_hopper = capability == (9, 0) and jax.__version_info__ >= (0, 11)
    hopper_fits = is_hopper and precision == "bf16" and hopper.fits(model.width, model.mlp_width)
    if implementation == "auto":
        best = "hopper" if hopper_fits else "cuda" if cuda_fits else "cpu" if device.platform == "cpu" else "xla"
        implementation = "apple" if on_apple(device) else best
    if implementation == "cuda" and not cuda_fits:
        raise UsageError(
            "model.implementation cuda needs an NVIDIA GPU, and for bf16 precision one of the Ampere generation or"
            " later: set it to auto"
        )
    if implementation == "hopper" and not hopper_fits:
        raise UsageError(
            "model.implementation hopper needs a Hopper GPU (H100, H200), jax 0.11, bf16 precision and a width and an"
            f" mlp_width that are multiples of {hopper.BLOCK_K}: set it to auto"
        )
    return dataclasses.replace(model, precision=precision, implementation=implementation)


def _compute_capability(device: jax.Device) -> tuple[int, int]:
    """The version of an NVIDIA GPU's architecture; (0, 0) for any other device."""
    version = re.fullmatch(r"(\d+)\.(\d+)", getattr(device, "compute_capability", ""))
    return (int(version[1]), int(version[2])) if version else (0, 0)


def resolve_run(config: Config, device: jax.Device) -> Config:
    """Replaces what is automatic in a run by what fits the device, or each device of its mesh.

    Without `microbatch_chunks` an NVIDIA GPU computes a micro-batch at once. Elsewhere a chunk is one sequence, or
    several short ones: larger chunks take more memory and no less time. Without `microbatch_chunks` neither kind of GPU
    recomputes blocks, for speed. Otherwise blocks are recomputed if `remat` says so, or if it is None and the run could
    take more than half the memory without.

    Raises UsageError as `resolve` and `resolve_mesh`.
    """
    config = resolve_mesh(config, device)
    if device.platform == "METAL" and config.optimizer.average:
        raise UsageError("jax-metal computes nothing in float16, as optimizer.average needs: set it to 0")
    model, chunks = resolve(config.model, device), config.microbatch_chunks
    if chunks == 0:
        on_cuda, B = device.platform == "gpu", config.batch_size // config.mesh.devices
        if on_cuda or on_apple(device):
            model = dataclasses.replace(model, remat=False)
        fitting = [n for n in range(1, B + 1) if B % n == 0 and B // n * model.context <= CHUNK_TOKENS]
        chunks = 1 if on_cuda else min(fitting, default=B)
    config = dataclasses.replace(config, microbatch_chunks=chunks, model=model)
    if model.remat is None:
        sharing = config.mesh.devices if device.platform == "cpu" else 1  # devices that share one memory
        remat = 2 * sharing * _bytes_without_remat(share(config)) > available_memory(device)
        config = dataclasses.replace(config, model=dataclasses.replace(model, remat=remat))
    if on_apple(device) and config.chunk_size * model.context >= CONTRACTION_LIMIT:
        raise UsageError(
            f"an Apple GPU computes sums of {CONTRACTION_LIMIT:,} or more numbers wrong, and a gradient is one over the"
            f" {config.chunk_size * model.context:,} tokens of a chunk: set more microbatch_chunks, or 0"
        )
    return config


def _bytes_without_remat(config: Config) -> int:
    """About the memory of a training step that recomputes no block: eight arrays like the weights, and what it saves.

    The eight are the weights, two moments, gradients, their sum, an average and copies for the blocks.
    """
    c, tokens = config.model, config.chunk_size * config.model.context
    weights = sum(parameter.size for parameter in parameter_table(c))
    return 4 * (8 * weights + tokens * c.layers * (16 * c.width + 4 * c.mlp_width))


def available_memory(device: jax.Device) -> int:
    """Bytes that a process can use on a device.

    On an NVIDIA GPU, the limit of jax's allocator. On a CPU, the machine's memory or the process's limit. On an Apple
    GPU two thirds of that, as Metal's recommendedMaxWorkingSetSize: 10.67 of 16 GB (exo-explore/exo#1672), 11.84 of 16
    (AlexsJones/llmfit#754), three quarters on larger machines (gpustack/gpustack#1375).
    """
    if device.platform == "gpu":
        return device.memory_stats()["bytes_limit"]
    memory = int(min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), memory_limit()))
    return memory * 2 // 3 if on_apple(device) else memory


def identity(device: jax.Device) -> list[str]:
    """What the numbers and the speed of a device depend on: its kind, the system, the versions, jaxlm's source."""
    source = b"".join(file.read_bytes() for file in sorted(Path(__file__).parents[1].rglob("*.py")))
    versions = [machine.platform(), device.client.platform_version, jax.__version__, jaxlib.__version__]
    return [device.device_kind, *versions, hashlib.sha256(source).hexdigest()]


def card(device: jax.Device) -> str:
    """Identifies one card among those of its kind: the UUID of an NVIDIA GPU, else the device's index."""
    if device.platform == "gpu":
        with contextlib.suppress(OSError, AttributeError):  # no driver of NVIDIA's, or an old one
            driver, handle, uuid = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), (ctypes.c_ubyte * 16)()
            failed = driver.cuDeviceGet(ctypes.byref(handle), device.local_hardware_id)
            if not failed and not driver.cuDeviceGetUuid_v2(ctypes.byref(uuid), handle):
                return bytes(uuid).hex()
    return str(device.id)


def describe(device: jax.Device) -> str:
    """A device's name for messages."""
    return f"CPU ({os.cpu_count()} cores)" if device.platform == "cpu" else device.device_kind
