"""Runs everything on the CPU; holds the models that the tests share."""

import atexit
import collections
import importlib.metadata
import os
import shutil
import signal
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # tests compile more than they compute
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # the other code generator, the only one of jax 0.4.34, compiles in a third of the time; jax 0.11 has no choice
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
# tests and their processes share compiled programs (except where jaxlm.device.backend turns that cache off)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker has its directory from the process that started it
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxlm-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm.device.backend  # noqa: F401  (its import sets how jax draws random bits, as in every command)
from jaxlm.config import ModelConfig
from jaxlm.core.decoder import init_params

hypothesis.settings.register_profile("no deadline", deadline=None)  # an example compiles, or waits for other processes
hypothesis.settings.load_profile("no deadline")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it, and so do its processes

LONG = 100  # quick tests that take as long as one that is slow
FEW_AND_LONG = ("test_sharding.py", "test_evening.py")


@pytest.hookimpl(trylast=True)  # without those that a marker leaves out
def pytest_collection_modifyitems(items):
    """Begins with the files that take long, so that no worker waits for another at the end."""
    work = collections.Counter()
    for item in items:
        work[item.path] += LONG if item.path.name in FEW_AND_LONG or item.get_closest_marker("slow") else 1
    items.sort(key=lambda item: -work[item.path])


@pytest.fixture(scope="session", autouse=True)
def quick_fsync():
    """Checks the descriptor only: a disk takes milliseconds for each of thousands, and no test here cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture(scope="module")
def optimized_compilation():
    """Compiles with optimizations, as a run does."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def small_model():
    """A model of odd sizes, with parameters so large and unequal that each of them changes the logits."""
    sizes = {"vocab_size": 257, "context": 24, "layers": 2, "heads": 3, "width": 24, "mlp_width": 20}
    config = ModelConfig(**sizes, rope_theta=50.0, norm_eps=0.03, precision="float32", remat=True)
    return config, strong_params(config)


@pytest.fixture(scope="session")
def small_shared_model():
    """As `small_model`, with keys and values that two query heads share and a head that is not the embedding."""
    sizes = {"vocab_size": 257, "context": 24, "layers": 2, "heads": 4, "kv_heads": 2, "width": 24, "mlp_width": 20}
    config = ModelConfig(**sizes, rope_theta=50.0, norm_eps=0.03, tied=False, precision="float32", remat=True)
    return config, strong_params(config)


@pytest.fixture(scope="session")
def small_qk_norm_model():
    """As `small_model`, with norms of queries and keys, and keys and values that two query heads share."""
    sizes = {"vocab_size": 257, "context": 24, "layers": 2, "heads": 4, "kv_heads": 2, "width": 24, "mlp_width": 20}
    config = ModelConfig(**sizes, rope_theta=50.0, norm_eps=0.03, qk_norm=True, precision="float32", remat=True)
    return config, strong_params(config)


def strong_params(config):
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.4, leaf.shape), jnp.float32), shapes)
