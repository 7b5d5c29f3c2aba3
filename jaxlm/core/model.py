"""The decoder: a flax module that holds the parameters and calls the layers.

Architecture: Llama's (RMSNorm before, RoPE, SwiGLU, no biases), input embedding and output head tied unless the
configuration says otherwise. The parameters of all blocks are stacked along a leading axis L, so that one scan walks
them:

    embedding            [V, D]
    head                 [V, D]    (not when tied)
    blocks/attention_norm, mlp_norm        [L, D]
    blocks/query, output [L, D, D]
    blocks/key, value    [L, D, K x heads of keys and values]
    blocks/gate, up      [L, D, F]
    blocks/down          [L, F, D]
    norm                 [D]
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.core import layers
from jaxlm.core.loss import GPU_TILE, KEPT, KEPT_ON_GPU, TILE, UNROLLED_TILE, cross_entropy, cross_entropy_and_gradient
from jaxlm.core.ops import hopper
from jaxlm.core.parameters import Parameter, by_path, parameter_table

Attend = Callable[..., tuple[jax.Array, Any]]
JOINED = {"query_key_value": ("query", "key", "value"), "gate_up": ("gate", "up")}  # what reads the same input


class Cache(NamedTuple):
    """Keys and values of the positions already read, for one block each; G counts texts and in each their heads.

    Were texts and heads two axes, a CPU would write a cache of one text anew for each token, not in its place.
    """

    keys_GSK: tuple[jax.Array, ...]
    values_GSK: tuple[jax.Array, ...]


def approx_normal_init(key: Any, shape: tuple[int, ...], std: float) -> jax.Array:
    """Draws numbers of mean 0 and this standard deviation, float32: the same bits from a key wherever it is done.

    Each is the sum of eight random bytes, whole numbers up to the one product at the end. (The logarithm that a normal
    number takes differs in its last bit between versions of XLA.) Their excess kurtosis is -0.15; none is beyond 4.9
    standard deviations. One index of the first axis after the other is drawn, which takes no memory to speak of.
    """
    scale = std / math.sqrt(8 * (256**2 - 1) / 12)

    def draw(key: jax.Array) -> jax.Array:
        words = jax.random.bits(key, (2, *shape[1:]), jnp.uint32)
        total = jax.lax.bitcast_convert_type(words, jnp.uint8).sum(axis=(0, -1), dtype=jnp.int32)
        return (total - 4 * 255).astype(jnp.float32) * scale

    return jax.lax.map(draw, jax.random.split(key, shape[0]))


def init_group(key: jax.Array, group: Sequence[Parameter]) -> jax.Array | dict[str, jax.Array]:
    """Draws one array, or the dict of arrays below one name, each random one with its own part of the key."""
    if not group[0].stacked:
        return init_array(key, group[0])
    keys = iter(jax.random.split(key, sum(p.init_std is not None for p in group)))
    return {p.path[-1]: init_array(None if p.init_std is None else next(keys), p) for p in group}


def init_array(key: jax.Array | None, p: Parameter) -> jax.Array:
    """Draws one parameter, float32; the key is not used for ones."""
    return jnp.ones(p.shape) if p.init_std is None else approx_normal_init(key, p.shape, p.init_std)


def joined(p: Mapping[str, jax.Array], name: str) -> jax.Array:
    """The matrices of JOINED[name] of one block side by side, [D, F]."""
    return jnp.concatenate([p[part] for part in JOINED[name]], axis=1)


def projections(
    p: Mapping[str, jax.Array], name: str, x_BTD: jax.Array, c: ModelConfig, join: bool = False
) -> Sequence[jax.Array]:
    """x times each matrix of JOINED[name]: by one product where they lie side by side in p, or if they shall."""
    if name not in p and not join:
        return [layers.linear(x_BTD, p[part], c.matmul_dtype) for part in JOINED[name]]
    out_BTF = layers.linear(x_BTD, p[name] if name in p else joined(p, name), c.matmul_dtype)
    widths = [by_path(c)["blocks", part].shape[-1] for part in JOINED[name]]
    return jnp.split(out_BTF, list(accumulate(widths))[:-1], axis=-1)


def block(
    p: Mapping[str, jax.Array], x_BTD: jax.Array, table: tuple[jax.Array, jax.Array], attend: Attend, c: ModelConfig
) -> tuple[jax.Array, Any]:
    """One block: attention, then the gated MLP, each added to the residual stream.

    Args:
        p: one block's parameters (without the L axis).
        x_BTD: the residual stream.
        table: RoPE's cosines and sines for the positions of x.
        attend: takes q, k, v [B, T, H, K] of these positions, gives [B, T, H, K] and what else it has to hand on.
        c: the sizes.

    Returns:
        [B, T, D]; and what attention hands on.
    """
    B, T, D = x_BTD.shape
    h_BTD = layers.rms_norm(x_BTD, p["attention_norm"], c.norm_eps)
    fused = c.kernels == "fused" and hopper.fits(B * T)
    qkv = projections(p, "query_key_value", h_BTD, c, join=fused)
    q, k, v = (array.reshape(B, T, -1, D // c.heads) for array in qkv)
    q, k = layers.rope(q, table), layers.rope(k, table)
    if c.kv_heads:
        k, v = (jnp.repeat(shared, c.heads // c.kv_heads, axis=2) for shared in (k, v))
    out_BTHK, handed_on = attend(q, k, v)
    x_BTD = x_BTD + layers.linear(out_BTHK.reshape(B, T, D), p["output"], c.matmul_dtype)
    h_BTD = layers.rms_norm(x_BTD, p["mlp_norm"], c.norm_eps)
    if fused:
        gated_BTD = hopper.swiglu(h_BTD.reshape(-1, D), p["gate"], p["up"], p["down"]).reshape(B, T, D)
    else:
        act_BTF = layers.swiglu_activation(*projections(p, "gate_up", h_BTD, c))
        gated_BTD = layers.linear(act_BTF, p["down"], c.matmul_dtype)
    return x_BTD + gated_BTD, handed_on


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def remat_blocks(
    blocks: Any, x_BTD: jax.Array, table: tuple[jax.Array, jax.Array], attend: Attend, c: ModelConfig
) -> tuple[jax.Array, Any]:
    """All blocks, one after the other; of each, its input is kept for the backward pass, which runs it again.

    What attention gave to know is kept too, so that it is not computed again.

    Args:
        blocks: the stacked parameters.
        x_BTD, table, attend, c: as of `block`.

    Returns:
        [B, T, D]; and the blocks' parameters, for their next use. Backward, the gradient of that next use arrives
        whole and this one is added to it where it lies, block by block.
    """
    return _recomputed_forward(blocks, x_BTD, table, attend, c)[0]


def _recomputed_forward(blocks, x_BTD, table, attend, c):
    def run(x_BTD, p):
        out_BTD, known = block(p, x_BTD, table, attend, c)
        return out_BTD, (x_BTD, known)

    out_BTD, kept = layers.scan(run, x_BTD, blocks, unroll=c.unrolled)
    return (out_BTD, blocks), (blocks, kept, table)


def _recomputed_backward(attend, c, residuals, d_outputs):
    blocks, kept, table = residuals

    def add_block(carry, layer):
        d_x_BTD, d_blocks = carry
        p, (x_BTD, known) = jax.tree.map(
            lambda stacked: jax.lax.dynamic_index_in_dim(stacked, layer, 0, False), (blocks, kept)
        )
        again = partial(attend, known=known)
        _, pull, _ = jax.vjp(lambda p, x_BTD: block(p, x_BTD, table, again, c), p, x_BTD, has_aux=True)
        d_p, d_x_BTD = pull(d_x_BTD)

        def add(total, part):
            before = jax.lax.dynamic_index_in_dim(total, layer, 0, False)
            return jax.lax.dynamic_update_index_in_dim(total, before + part, layer, 0)

        return (d_x_BTD, jax.tree.map(add, d_blocks, d_p)), None

    (d_x_BTD, d_blocks), _ = layers.scan(add_block, d_outputs, jnp.arange(c.layers), reverse=True, unroll=c.unrolled)
    return d_blocks, d_x_BTD, None


remat_blocks.defvjp(_recomputed_forward, _recomputed_backward)


@jax.custom_vjp
def cut_and_pass(blocks: Any) -> tuple[list[Any], Any]:
    """The parameters of each block, and all of them stacked, for their next use.

    Backward, the gradient of that next use arrives whole, and those of the blocks are added to it at once.
    """
    count = len(jax.tree.leaves(blocks)[0])
    return [jax.tree.map(lambda stacked, layer=layer: stacked[layer], blocks) for layer in range(count)], blocks


cut_and_pass.defvjp(
    lambda blocks: (cut_and_pass(blocks), None),
    lambda _, d: (jax.tree.map(lambda total, *parts: total + jnp.stack(parts), d[1], *d[0]),),
)


class Decoder(nn.Module):
    """The language model. `init` draws float32 parameters; the methods go through `apply`."""

    config: ModelConfig

    def setup(self):
        groups = groupby(parameter_table(self.config), lambda parameter: parameter.path[0])
        arrays = {name: self.param(name, init_group, list(group)) for name, group in groups}
        self.embedding, self.blocks, self.norm = (arrays[name] for name in ("embedding", "blocks", "norm"))
        self.head_VD = arrays.get("head", self.embedding)

    def __call__(self, ids_BT: jax.Array) -> jax.Array:
        """Logits [B, T, V] float32 for the token that follows each position of ids [B, T]."""
        return layers.tied_head(self.hidden(ids_BT), self.head_VD)

    def hidden(self, ids_BT: jax.Array) -> jax.Array:
        """The normed residual stream [B, T, D], in the dtype of the computation, that the head reads."""
        return self.hidden_and_pass(ids_BT)[0]

    def hidden_and_pass(self, ids_BT: jax.Array) -> tuple[jax.Array, Any]:
        """`hidden`, and the parameters for their next use.

        A gradient with respect to these, given to the backward pass, is what the gradient of this use is added to,
        where it lies: gradients of many slices add up without a second set of them.
        """
        c = self.config
        # here and now, or XLA computes a sine and a cosine for each number that they turn; and not on the device, which
        # `soundness` has yet to trust
        with jax.ensure_compile_time_eval(), jax.default_device(jax.devices("cpu")[0]):
            positions_1T = jnp.arange(ids_BT.shape[1])[None]
            rope_cos_sin = jax.jit(
                layers.rope_cos_sin, static_argnums=(1, 2)
            )  # one program, not one for each operation
            table = rope_cos_sin(positions_1T, c.width // c.heads, c.rope_theta)
        attend = (
            layers.cudnn_attention if c.attention == "cudnn" else partial(layers.causal_attention, dtype=c.matmul_dtype)
        )
        rows_BTD, embedding_VD = layers.embed_and_pass(ids_BT, self.embedding)
        x_BTD, blocks = rows_BTD.astype(c.activation_dtype), dict(self.blocks)
        if c.remat:
            x_BTD, blocks = remat_blocks(blocks, x_BTD, table, attend, c)
        else:
            by_layer, blocks = cut_and_pass(blocks)
            for p in by_layer:
                x_BTD, _ = block(p, x_BTD, table, attend, c)
        x_BTD = layers.rms_norm(x_BTD, self.norm, c.norm_eps)
        passed = {"embedding": embedding_VD, "blocks": blocks, "norm": self.norm}
        return x_BTD, passed if c.tied else passed | {"head": self.head_VD}

    def loss(self, inputs_BT: jax.Array, targets_BT: jax.Array) -> jax.Array:
        """Sum over the batch of -ln p(target), nats, float32; targets below 0 count nothing.

        To be evaluated; for training there is `loss_and_gradient`.
        """
        c, x_BTD = self.config, self.hidden(inputs_BT)
        x_ND, targets_N = x_BTD.reshape(-1, c.width), targets_BT.reshape(-1)
        if c.kernels == "fused":
            return hopper.cross_entropy(x_ND, self.head_VD, targets_N)
        return cross_entropy(x_ND, self.head_VD, targets_N, c.matmul_dtype, _tile(c), c.unrolled)


def _tile(c: ModelConfig) -> int:
    if c.unrolled:
        return UNROLLED_TILE
    return GPU_TILE if jax.default_backend() == "gpu" else TILE


def loss_and_gradient(
    c: ModelConfig, params: Any, inputs_BT: jax.Array, targets_BT: jax.Array, scale: jax.Array | float, total: Any
) -> tuple[jax.Array, Any]:
    """`Decoder.loss`, and its gradient by the parameters.

    Args:
        c: the sizes.
        params: the parameters.
        inputs_BT, targets_BT: as of `Decoder.loss`.
        scale: [], of the gradient.
        total: like the parameters, float32.

    Returns:
        [] float32, nats; and `total`, to which the gradient times the scale is added where it lies.
    """
    run: Any = partial(Decoder(c).apply, method="hidden_and_pass")
    (x_BTD, _), pull = jax.vjp(lambda p: run({"params": p}, inputs_BT), params)
    x_ND, targets_N, name = x_BTD.reshape(-1, c.width), targets_BT.reshape(-1), "embedding" if c.tied else "head"
    if c.kernels == "fused":
        nats, pull_loss = jax.vjp(lambda *a: hopper.cross_entropy(*a, targets_N), x_ND, params[name])
        d_x_ND, d_head_VD = pull_loss(jnp.float32(scale))
        total_VD = total[name] + d_head_VD
    else:
        kept = KEPT_ON_GPU if jax.default_backend() == "gpu" else KEPT
        nats, d_x_ND, total_VD = cross_entropy_and_gradient(
            x_ND, params[name], targets_N, scale, total[name], c.matmul_dtype, kept, _tile(c), c.unrolled
        )
    (total,) = pull((d_x_ND.reshape(x_BTD.shape), total | {name: total_VD}))
    return nats, total


@partial(jax.jit, static_argnums=0)
def init_params(config: ModelConfig, key: jax.Array) -> Any:
    """Draws the parameters, float32, without running the model."""
    return Decoder(config).init(key, method=lambda decoder: decoder.norm)["params"]


@partial(jax.jit, static_argnums=0)
def prepare_decode_params(config: ModelConfig, params: Any) -> Any:
    """The parameters as `forward_with_cache` reads them, so that no token pays for cutting, casting and turning them.

    Returns:
        As `params`, but `blocks` is a tuple with the parameters of each, in which the matrices that read the same input
        are one (JOINED); and there is `head` [V, D], with rows of zeros up to a multiple of GPU_MULTIPLE. Matrices are
        in the dtype of the computation and lie turned, [F, D], as a CPU multiplies fastest with.
    """
    blocks = []
    for layer in range(config.layers):
        p = {name: leaf[layer] for name, leaf in params["blocks"].items()}
        p |= {name: joined(p, name) for name in JOINED}
        kept = [name for name in p if not any(name in parts for parts in JOINED.values())]
        blocks.append({name: p[name].astype(config.matmul_dtype).T if p[name].ndim == 2 else p[name] for name in kept})
    head_VD = params.get("head", params["embedding"]).astype(config.matmul_dtype)
    head_VD = jnp.pad(head_VD, ((0, -config.vocab_size % layers.GPU_MULTIPLE), (0, 0)))
    return params | {"blocks": tuple(blocks), "head": head_VD}


def empty_cache(config: ModelConfig, batch: int, slots: int) -> Cache:
    """A cache of zeros: `slots` positions for each of `batch` texts, in the dtype of the computation."""
    shape_GSK = batch * config.heads, slots, config.width // config.heads
    keys_GSK, values_GSK = (
        tuple(jnp.zeros(shape_GSK, config.activation_dtype) for _ in range(config.layers)) for _ in Cache._fields
    )
    return Cache(keys_GSK, values_GSK)


def forward_with_cache(
    c: ModelConfig,
    weights: Any,
    ids_BT: jax.Array,
    positions_BT: jax.Array,
    cache: Cache,
    start: jax.Array,
    visible_BTS: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Reads T more tokens behind what the cache holds.

    Args:
        c: the sizes.
        weights: the parameters, as `prepare_decode_params` gives them.
        ids_BT: the tokens; they take the slots start .. start + T - 1 of the cache, which must be there.
        positions_BT: their positions in each text, for RoPE.
        cache: S slots for each block.
        start: [] integer.
        visible_BTS: True where a token may attend to a slot.

    Returns:
        Logits [B, V] float32 for the token after the last one read, and the cache with T more slots filled.
    """
    c = replace(c, kernels="plain")  # the fused ones read the matrices as training has them
    table = layers.rope_cos_sin(positions_BT, c.width // c.heads, c.rope_theta)
    x_BTD = layers.embed(ids_BT, weights["embedding"]).astype(c.activation_dtype)
    reads_turned = jax.default_backend() == "cpu" and not c.unrolled
    lying = layers.Turned if reads_turned else jnp.transpose
    filled = []
    for layer, p in enumerate(weights["blocks"]):

        def attend(q_BTHK, k_BTHK, v_BTHK, layer=layer):
            k_GTK, v_GTK = layers.to_cache_layout(k_BTHK, v_BTHK)
            keys_GSK = jax.lax.dynamic_update_slice(cache.keys_GSK[layer], k_GTK, (0, start, 0))
            values_GSK = jax.lax.dynamic_update_slice(cache.values_GSK[layer], v_GTK, (0, start, 0))
            return layers.attention_with_cache(q_BTHK, keys_GSK, values_GSK, visible_BTS), (keys_GSK, values_GSK)

        p = {name: lying(leaf) if leaf.ndim == 2 else leaf for name, leaf in p.items()}
        x_BTD, both = block(p, x_BTD, table, attend, c)
        filled.append(both)
    x_BD = layers.rms_norm(x_BTD[:, -1], weights["norm"], c.norm_eps)
    logits_BV = layers.linear(x_BD.astype(jnp.float32), lying(weights["head"]), c.matmul_dtype)
    return logits_BV[:, : c.vocab_size], Cache(*zip(*filled, strict=True))


def parameter_count(params: Any) -> int:
    """How many numbers a tree of parameters (or of their shapes) holds."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
