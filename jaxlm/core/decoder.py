"""The decoder as a flax module, and its initial parameters."""

import math
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.core import layers
from jaxlm.core.model import final_hidden_with_accumulator, loss
from jaxlm.core.parameters import Parameter, Params, parameter_table


def approx_normal_init(key: Any, shape: tuple[int, ...], std: float) -> jax.Array:
    """Draws numbers of mean 0 and this standard deviation, float32: the same bits from a key on every device.

    Each is the sum of eight random bytes, in whole numbers up to the one multiplication at the end. (The logarithm that
    a normal number needs differs in its last bit between versions of XLA.) The excess kurtosis is -0.15, and no number
    is beyond 4.9 standard deviations. The first axis is drawn index by index, which takes little memory.
    """
    scale = std / math.sqrt(8 * (256**2 - 1) / 12)

    def draw(key: jax.Array) -> jax.Array:
        words = jax.random.bits(key, (2, *shape[1:]), jnp.uint32)
        byte_sum = jax.lax.bitcast_convert_type(words, jnp.uint8).sum(axis=(0, -1), dtype=jnp.int32)
        return (byte_sum - 4 * 255).astype(jnp.float32) * scale

    return jax.lax.map(draw, jax.random.split(key, shape[0]))


def init_group(key: jax.Array, group: Sequence[Parameter]) -> jax.Array | dict[str, jax.Array]:
    """Draws one array, or the dict of the stacked ones. Each random one has its own part of the key; others are 1."""
    count = sum(p.init_std is not None for p in group)
    keys = iter(list(jax.random.split(key, count)) if group[0].stacked else [key])
    arrays = {
        p.path[-1]: jnp.ones(p.shape) if p.init_std is None else approx_normal_init(next(keys), p.shape, p.init_std)
        for p in group
    }
    return arrays if group[0].stacked else arrays[group[0].path[-1]]


class Decoder(nn.Module):
    """The language model. `init` draws float32 parameters; the methods go through `apply`."""

    config: ModelConfig

    def setup(self):
        groups = groupby(parameter_table(self.config), lambda parameter: parameter.path[0])
        arrays: dict[str, Any] = {name: self.param(name, init_group, list(group)) for name, group in groups}
        self.embedding, self.blocks, self.norm = (arrays[name] for name in ("embedding", "blocks", "norm"))
        self.head_VD = arrays.get("head", self.embedding)

    def __call__(self, ids_BT: jax.Array) -> jax.Array:
        """Logits [B, T, V] float32 for the token that follows each position of ids [B, T]."""
        return layers.tied_head(self.final_hidden(ids_BT), self.head_VD)

    def final_hidden(self, ids_BT: jax.Array) -> jax.Array:
        """The normed residual stream [B, T, D], in the activation dtype: the input of the head."""
        params = {"embedding": self.embedding, "blocks": self.blocks, "norm": self.norm}
        return final_hidden_with_accumulator(self.config, params, ids_BT)[0]

    def loss(self, inputs_BT: jax.Array, targets_BT: jax.Array) -> jax.Array:
        """`loss` of its parameters."""
        params = {"embedding": self.embedding, "blocks": self.blocks, "norm": self.norm, "head": self.head_VD}
        return loss(self.config, params, inputs_BT, targets_BT)


@partial(jax.jit, static_argnums=0)
def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Draws the parameters, float32, without running the model."""
    return Decoder(config).init(key, method=lambda decoder: decoder.norm)["params"]
