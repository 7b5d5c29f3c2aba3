"""Which device computes, and in which dtype."""

import os

import jax

from jaxlm.errors import RequestError

# jax's defaults for this differ between versions; one seed must give one model
jax.config.update("jax_threefry_partitionable", True)

_JAX_NAMES = {"cpu": "cpu", "cuda": "cuda", "mps": "mps", "metal": "METAL"}


def start(platform: str) -> jax.Device:
    """Starts jax on a platform: auto (the best that is there), cpu, cuda, mps or metal.

    Returns:
        The device that will compute.

    Raises:
        RequestError: a platform named outright does not start.
    """
    if platform != "auto":
        jax.config.update("jax_platforms", f"{_JAX_NAMES[platform]},cpu")  # the CPU draws the first parameters
    try:
        device = jax.devices()[0]
    except RuntimeError as error:
        reason = str(error).split(". ")[0].splitlines()[0]
        raise RequestError(f"platform {platform} does not start ({reason}): try --config.platform=auto") from error
    if platform not in ("auto", "cpu") and device.platform == "cpu":
        raise RequestError(f"platform {platform} is not here: install its plugin, or try --config.platform=auto")
    return device


def compute_dtype(setting: str, device: jax.Device) -> str:
    """The dtype of the computation: `setting`, or for auto bfloat16 on an NVIDIA GPU and float32 elsewhere."""
    if setting != "auto":
        return setting
    return "bfloat16" if device.platform == "gpu" else "float32"


def describe(device: jax.Device) -> str:
    """The device in words, for a person."""
    return f"CPU ({os.cpu_count()} cores)" if device.platform == "cpu" else device.device_kind
