"""The decoder: a flax module that holds the parameters and calls the layers.

Architecture: Llama's (RMSNorm before, RoPE, SwiGLU, no biases), input embedding and output head tied. The
parameters of all blocks are stacked along a leading axis L, so that one scan walks them:

    embedding            [V, D]
    blocks/attention_norm, mlp_norm        [L, D]
    blocks/query, key, value, output       [L, D, D]
    blocks/gate, up      [L, D, F]
    blocks/down          [L, F, D]
    norm                 [D]
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm import kernels, layers
from jaxlm.config import ModelConfig
from jaxlm.loss import cross_entropy

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Cache(NamedTuple):
    """Keys and values of the positions already read, for one block each."""

    keys_BSHK: tuple[jax.Array, ...]
    values_BSHK: tuple[jax.Array, ...]


def init_blocks(key: jax.Array, config: ModelConfig) -> dict[str, jax.Array]:
    """Draws the stacked parameters of all blocks.

    Matrices are normal(0, 0.02); the two output projections, which write to the residual stream, are smaller by
    sqrt(2 L) (GPT-2) or zero, as `config.output_init` says. Norm scales are 1.
    """
    L, D, F = config.layers, config.width, config.hidden
    output_std = 0.0 if config.output_init == "zero" else 0.02 / math.sqrt(2 * L)
    shapes = {
        "query": (D, D),
        "key": (D, D),
        "value": (D, D),
        "output": (D, D),
        "gate": (D, F),
        "up": (D, F),
        "down": (F, D),
    }
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    blocks = {
        name: (output_std if name in ("output", "down") else 0.02) * jax.random.normal(keys[name], (L, *shape))
        for name, shape in shapes.items()
    }
    return blocks | {"attention_norm": jnp.ones((L, D)), "mlp_norm": jnp.ones((L, D))}


def block(
    p: Mapping[str, jax.Array], x_BTD: jax.Array, table: tuple[jax.Array, jax.Array], attend: Attend, c: ModelConfig
) -> jax.Array:
    """One block: attention, then the gated MLP, each added to the residual stream.

    Args:
        p: one block's parameters (without the L axis).
        x_BTD: the residual stream.
        table: RoPE's cosines and sines for the positions of x.
        attend: takes q, k, v [B, T, H, K] of these positions, gives [B, T, H, K].
        c: the sizes.

    Returns:
        [B, T, D].
    """
    B, T, D = x_BTD.shape
    h_BTD = layers.rms_norm(x_BTD, p["attention_norm"], c.norm_eps)
    fused = c.kernels == "fused" and kernels.fits(B * T)
    weights = [p[name] for name in ("query", "key", "value")]
    if fused:
        qkv = jnp.split(layers.linear(h_BTD, jnp.concatenate(weights, axis=1)), 3, axis=-1)
    else:
        qkv = [layers.linear(h_BTD, weight) for weight in weights]
    q, k, v = (array.reshape(B, T, c.heads, -1) for array in qkv)
    out_BTHK = attend(layers.rope(q, table), layers.rope(k, table), v)
    x_BTD = x_BTD + layers.linear(out_BTHK.reshape(B, T, D), p["output"])
    h_BTD = layers.rms_norm(x_BTD, p["mlp_norm"], c.norm_eps)
    if fused:
        return x_BTD + kernels.swiglu(h_BTD.reshape(-1, D), p["gate"], p["up"], p["down"]).reshape(B, T, D)
    return x_BTD + layers.swiglu(h_BTD, p["gate"], p["up"], p["down"])


class Decoder(nn.Module):
    """The language model. `init` draws float32 parameters; the methods go through `apply`."""

    config: ModelConfig

    def setup(self):
        c = self.config
        self.embedding = self.param("embedding", nn.initializers.normal(0.02), (c.vocab_size, c.width))
        self.blocks = self.param("blocks", init_blocks, c)
        self.norm = self.param("norm", nn.initializers.ones, (c.width,))

    def __call__(self, ids_BT: jax.Array) -> jax.Array:
        """Logits [B, T, V] float32 for the token that follows each position of ids [B, T]."""
        return layers.tied_head(self.hidden(ids_BT), self.embedding)

    def hidden(self, ids_BT: jax.Array) -> jax.Array:
        """The normed residual stream [B, T, D], in the dtype of the computation, that the head reads."""
        c = self.config
        positions_1T = jnp.arange(ids_BT.shape[1])[None]
        table = layers.rope_table(positions_1T, c.width // c.heads, c.rope_theta)
        attend = layers.cudnn_attention if c.attention == "cudnn" else layers.causal_attention

        def body(x_BTD: jax.Array, p: Mapping[str, jax.Array]) -> tuple[jax.Array, None]:
            return block(p, x_BTD, table, attend, c), None

        x_BTD = layers.embed(ids_BT, self.embedding).astype(c.dtype)
        if c.remat:
            x_BTD, _ = jax.lax.scan(jax.checkpoint(body), x_BTD, self.blocks)
        else:
            for layer in range(c.layers):
                x_BTD, _ = body(x_BTD, jax.tree.map(lambda stacked, layer=layer: stacked[layer], self.blocks))
        return layers.rms_norm(x_BTD, self.norm, c.norm_eps)

    def loss(self, inputs_BT: jax.Array, targets_BT: jax.Array) -> jax.Array:
        """Sum over the batch of -ln p(target), nats, float32; targets below 0 count nothing."""
        x_BTD = self.hidden(inputs_BT)
        loss = kernels.cross_entropy if self.config.kernels == "fused" else cross_entropy
        return loss(x_BTD.reshape(-1, x_BTD.shape[-1]), self.embedding, targets_BT.reshape(-1))

    def extend(
        self, ids_BT: jax.Array, positions_BT: jax.Array, cache: Cache, start: jax.Array, visible_BTS: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """Reads T more tokens behind what the cache holds.

        Args:
            ids_BT: the tokens; they take the slots start .. start + T - 1 of the cache, which must be there.
            positions_BT: their positions in each text, for RoPE.
            cache: S slots for each block.
            start: [] integer.
            visible_BTS: True where a token may attend to a slot.

        Returns:
            Logits [B, V] float32 for the token after the last one read, and the cache with T more slots filled.
        """
        c = self.config
        table = layers.rope_table(positions_BT, c.width // c.heads, c.rope_theta)
        x_BTD = layers.embed(ids_BT, self.embedding).astype(c.dtype)
        keys, values = [], []
        for layer in range(c.layers):

            def attend(q_BTHK, k_BTHK, v_BTHK, layer=layer):
                at = (0, start, 0, 0)
                keys.append(jax.lax.dynamic_update_slice(cache.keys_BSHK[layer], k_BTHK, at))
                values.append(jax.lax.dynamic_update_slice(cache.values_BSHK[layer], v_BTHK, at))
                return layers.attention(q_BTHK, keys[-1], values[-1], visible_BTS)

            p = jax.tree.map(lambda stacked, layer=layer: stacked[layer], self.blocks)
            x_BTD = block(p, x_BTD, table, attend, c)
        x_B1D = layers.rms_norm(x_BTD[:, -1:], self.norm, c.norm_eps)
        return layers.tied_head(x_B1D, self.embedding)[:, 0], Cache(tuple(keys), tuple(values))


def init_params(config: ModelConfig, key: jax.Array) -> Any:
    """Draws the parameters, float32, without running the model."""
    return Decoder(config).init(key, method=lambda decoder: decoder.norm)["params"]


def empty_cache(config: ModelConfig, batch: int, slots: int) -> Cache:
    """A cache of zeros: `slots` positions for each of `batch` texts, in the dtype of the computation."""
    shape = (batch, slots, config.heads, config.width // config.heads)
    zeros = tuple(jnp.zeros(shape, config.dtype) for _ in range(config.layers))
    return Cache(zeros, zeros)


def parameter_count(params: Any) -> int:
    """How many numbers a tree of parameters (or of their shapes) holds."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
