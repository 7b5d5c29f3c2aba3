"""Which device computes, and how."""

import ctypes
import dataclasses
import hashlib
import os
import platform as machine
import sys
from pathlib import Path

import jax
import jaxlib

from jaxlm.config import Config, ModelConfig
from jaxlm.core.ops import hopper
from jaxlm.device import plugins
from jaxlm.errors import UsageError
from jaxlm.storage import user_cache

# jax's defaults for this differ between versions; one seed must give one model
jax.config.update("jax_threefry_partitionable", True)

# what jax 0.4.34 reads back from this cache for the CPU corrupts memory
if jax.__version_info__ < (0, 5):
    jax.config.update("jax_enable_compilation_cache", False)

_WORTH_KEEPING = 0.1  # seconds of compilation
CHUNK_TOKENS = 1024  # tokens in a chunk, at most, where the device shares the memory of the machine

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
_SPARE = (2**26, *[2**20] * 64)  # bytes of each piece: for a small model's copy or samples, and for what is small
_SLACK = 2**21  # bytes, more than the smaller pieces: what remains is not taken before them
_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
_CUBLAS = "--xla_gpu_enable_triton_gemm=false"  # what XLA's own matrix products save elsewhere they lose themselves
APPLE = ("mps", "METAL")  # the platforms, by jax's names, that compute on an Apple GPU
_ALSO_APPLE = ("metal", "mtl", "iree_metal")  # those of other plugins
_MLX = {  # what jax-mps and the library below it read as they load, unless whoever started us has set it
    "JAX_MPS_CACHE_LIMIT_BYTES": str(256 * 10**6),  # of freed buffers kept; without it they may fill the shared memory
    "MLX_ENABLE_TF32": "0",  # soundness allows 0.001 in float32, and TF32's products are rounded to as much
}
WRONG_FROM = 32_767  # from so many contracted numbers on, matmuls on M1 and M2 read past their operands


def start(platform: str, deterministic: bool = False) -> jax.Device:
    """Starts jax on a platform: auto (the best that is there and fit), cpu, cuda, mps or metal.

    `deterministic` has an NVIDIA GPU give the same bits in every session; the other platforms do so anyway. Whoever
    sets JAX_PLATFORMS has chosen: auto then leaves it to jax.

    Returns:
        The device that will compute.

    Raises:
        UsageError: a platform named outright is not there, or unfit, or does not start.
    """
    _keep_compilations()
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # for keep_freed_memory
    flags = [_CUBLAS] * (platform in ("auto", "cuda")) + [_DETERMINISTIC] * deterministic
    given = os.environ.get("XLA_FLAGS", "").split()
    # each once, though a process that did this has started this one: what is compiled is kept under these words
    os.environ["XLA_FLAGS"] = " ".join([*(flag for flag in flags if flag not in given), *given])
    for name, value in _MLX.items():
        os.environ.setdefault(name, value)
    by_environment = jax.config.jax_platforms if platform == "auto" else None  # type: ignore[attr-defined]
    if by_environment:
        plugins.refuse_unfit(by_environment)
        names, plugin = by_environment, ""
    else:
        names, plugin = plugins.choose(platform)
    if "cpu" not in names.split(","):
        names += ",cpu"  # which draws the parameters
    jax.config.update("jax_platforms", names)
    try:
        device = jax.devices()[0]
    except RuntimeError as error:
        reason = str(error).split(". ")[0].splitlines()[0]
        if platform != "auto" or not plugin:
            raise UsageError(
                f"platform {by_environment or platform} does not start ({reason}): try --config.platform=cpu"
            ) from error
        print(f"Computing without {plugin}, which does not start any more ({reason})", file=sys.stderr)
        jax.config.update("jax_platforms", "cpu")
        device = jax.devices()[0]
    if platform not in ("auto", "cpu") and device in jax.devices("cpu"):
        raise UsageError(f"platform {platform} finds no device here: try --config.platform=auto")
    return device


def _keep_compilations() -> None:
    """Has the next start read what this one compiles, from the user's cache directory.

    A cache that jax has been given already (JAX_COMPILATION_CACHE_DIR) is left as it is, and one that cannot be written
    is done without; what is damaged in it, jax compiles anew.
    """
    if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    if directory := user_cache.directory():
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING)


def keep_freed_memory(temporaries: int) -> None:
    """Has the C library keep what a step on a CPU frees for the next one, where that is glibc's.

    For after compilation, what is left of which is given back first: jax's notes of what it traced, for one.

    As it comes, glibc gives large pieces back to the system, and to have them again costs about a microsecond a page: a
    tenth of a step. It can only keep them for the main thread, which therefore is the one that runs what a CPU computes
    (`start` sees to it); the others go on meanwhile.

    Of what is free it takes the smallest piece that is large enough. A place for the bytes of a step's `temporaries`,
    and spare ones, so that nothing which stays breaks that one and the next step needs another, are made here; they are
    no memory until something lies there.
    """
    jax.clear_caches()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.malloc_trim(0)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.malloc.restype = ctypes.c_void_p
        pieces = [libc.malloc(ctypes.c_size_t(size)) for size in (temporaries + _SLACK, *_SPARE) for _ in range(2)]
        for piece in pieces[::2]:  # with one that stays between two: they would become one
            libc.free(ctypes.c_void_p(piece))


def on_apple(device: jax.Device) -> bool:
    """Whether a device is an Apple GPU."""
    return device.platform in (*APPLE, *_ALSO_APPLE)


def resolve(model: ModelConfig, device: jax.Device) -> ModelConfig:
    """Replaces what is `auto` in a model by what fits the device.

    The precision is bf16 on an NVIDIA GPU and float32 elsewhere. The implementation is a name in `core.ops`.

    Raises:
        UsageError: the implementation that is asked for does not fit, or an Apple GPU would compute wrong numbers.
    """
    if on_apple(device):
        for name in ("context", "width", "mlp_width"):
            if getattr(model, name) >= WRONG_FROM:
                raise UsageError(
                    f"an Apple GPU computes sums over {WRONG_FROM:,} or more numbers wrong: set model.{name} lower"
                )
    if device.platform == "METAL" and model.precision in ("bf16", "bf16_matmul"):
        raise UsageError(
            f"jax-metal computes nothing in bfloat16, as model.precision {model.precision} would: set it to float32"
        )
    on_cuda = device.platform == "gpu"
    precision = ("bf16" if on_cuda else "float32") if model.precision == "auto" else model.precision
    model = dataclasses.replace(model, precision=precision)
    is_hopper = on_cuda and device.compute_capability == "9.0" and jax.__version_info__ >= (0, 11)
    hopper_fits = is_hopper and precision == "bf16" and hopper.fits(model.width, model.mlp_width)
    best = {"gpu": "hopper" if hopper_fits else "cuda", "cpu": "cpu"}.get(device.platform, "xla")
    implementation = "apple" if on_apple(device) else best
    if model.implementation == "cuda" and not on_cuda:
        raise UsageError("model.implementation cuda needs an NVIDIA GPU: set it to auto")
    if model.implementation == "hopper" and not hopper_fits:
        raise UsageError(
            "model.implementation hopper needs a Hopper GPU (H100, H200), jax 0.11, bf16 precision and a width and an"
            f" mlp_width that are multiples of {hopper.BLOCK_K}: set it to auto"
        )
    return dataclasses.replace(model, implementation=implementation) if model.implementation == "auto" else model


def resolve_run(config: Config, device: jax.Device) -> Config:
    """Replaces what is automatic in a run by what fits the device.

    Without `microbatch_chunks` an NVIDIA GPU computes a micro-batch at once. Elsewhere a chunk is one sequence, or
    several short ones: larger chunks take more memory and no less time. Without `microbatch_chunks` neither kind of GPU
    recomputes blocks, for speed.

    Raises:
        UsageError: as `resolve`.
    """
    model, chunks = resolve(config.model, device), config.microbatch_chunks
    if chunks == 0 and (device.platform == "gpu" or on_apple(device)):
        model = dataclasses.replace(model, remat=False)
    if chunks == 0 and device.platform == "gpu":
        chunks = 1
    elif chunks == 0:
        divisors = [n for n in range(1, config.batch_size + 1) if config.batch_size % n == 0]
        fitting = [n for n in divisors if config.batch_size // n * model.context <= CHUNK_TOKENS]
        chunks = min(fitting, default=config.batch_size)
    config = dataclasses.replace(config, microbatch_chunks=chunks, model=model)
    if on_apple(device) and config.chunk_size * model.context >= WRONG_FROM:
        raise UsageError(
            f"an Apple GPU computes sums over {WRONG_FROM:,} or more numbers wrong, and a gradient is one over the"
            f" {config.chunk_size * model.context:,} tokens of a chunk: set more microbatch_chunks, or 0"
        )
    return config


def available_memory(device: jax.Device) -> int:
    """Bytes that one process may have on a device.

    On an NVIDIA GPU what jax's allocator may take, on a CPU the machine's memory, or the container's limit. On an Apple
    GPU two thirds of it: Metal's recommendedMaxWorkingSetSize, as reported 10.67 of 16 GB (exo-explore/exo#1672) and
    11.84 of 16 (AlexsJones/llmfit#754), three quarters on larger machines (gpustack/gpustack#1375).
    """
    if device.platform == "gpu":
        return device.memory_stats()["bytes_limit"]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (said := limit.read_text().strip()).isdigit():
        memory = min(memory, int(said))
    return memory * 2 // 3 if on_apple(device) else memory


def identity(device: jax.Device) -> list[str]:
    """What decides what a device computes, and how fast: its kind, the system, the versions, our own source."""
    source = b"".join(file.read_bytes() for file in sorted(Path(__file__).parents[1].rglob("*.py")))
    versions = [machine.platform(), device.client.platform_version, jax.__version__, jaxlib.__version__]
    return [device.device_kind, *versions, hashlib.sha256(source).hexdigest()]


def describe(device: jax.Device) -> str:
    """The device in words, for a person."""
    return f"CPU ({os.cpu_count()} cores)" if device.platform == "cpu" else device.device_kind
