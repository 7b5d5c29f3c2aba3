"""The average of the weights, for evaluation, sampling and the final model."""

import jax
import jax.numpy as jnp

from jaxlm.config import Config
from jaxlm.core.parameters import Params

AVERAGE_DTYPE = jnp.float16
AVERAGE_SCALE = 256.0  # float16 then holds differences up to 255, in steps of 2e-10 or a part in 2048


def average_start(config: Config, params: Params) -> Params | None:
    """The average of weights before the first step, as `average_step` keeps it; None if `optimizer.average` is 0."""
    return jax.tree.map(lambda p: jnp.zeros_like(p, AVERAGE_DTYPE), params) if config.optimizer.average else None


def average_step(decay: float, step: jax.Array, average: Params, updates: Params) -> Params:
    """The exponential average of the weights after each of the first step + 1 optimizer steps.

    Debiased as Adam's moments (Kingma and Ba 2015), so it is a weighted mean of weights from the first step on. It is
    kept as AVERAGE_SCALE * (average - weights) in float16, half the bytes. With a decay of 0.98, its rounding error is
    below half a percent of that difference, or 2e-9. Beyond the largest float16 the average follows the weights at
    this distance.

    Args:
        decay: the weight of each average relative to the next weights.
        step: [] int32, the optimizer steps done before.
        average: before the step: like the parameters, float16.
        updates: what the step adds to the weights, float32.
    """
    previous_share = decay * (1 - decay**step) / (1 - decay ** (step + 1))
    largest = float(jnp.finfo(AVERAGE_DTYPE).max)

    def shifted(difference: jax.Array, u: jax.Array) -> jax.Array:
        scaled = previous_share * (difference.astype(jnp.float32) - AVERAGE_SCALE * u)
        return jnp.clip(scaled, -largest, largest).astype(AVERAGE_DTYPE)

    return jax.tree.map(shifted, average, updates)


def averaged(params: Params, average: Params | None) -> Params:
    """The average of the weights; the weights themselves if there is none."""
    return add_average(params, average) if average else params


@jax.jit
def add_average(params: Params, average: Params) -> Params:
    """The average of the weights, from its difference as `average_step` keeps it."""
    return jax.tree.map(lambda p, d: p + d.astype(p.dtype) / AVERAGE_SCALE, params, average)
