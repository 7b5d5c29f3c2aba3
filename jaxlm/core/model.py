"""The decoder: functions of its parameters, which call the layers. `decoder.Decoder` holds these as a flax module.

Architecture: Llama's (RMSNorm before, RoPE, SwiGLU, no biases), or Qwen3's with `qk_norm`. The input embedding and the
output head are tied unless the configuration says otherwise. `parameters.parameter_table` lists the parameters; those
of all blocks are stacked along a leading axis L, so that one scan runs them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.core import layers, ops
from jaxlm.core.grad_accumulation import embed_with_accumulator, remat_blocks, unstack_with_accumulator
from jaxlm.core.parameters import Params, by_path

Attend = Callable[..., tuple[jax.Array, Any]]  # q, k, v [B, T, H, K], saved=None -> [B, T, H, K], residuals
FUSED = {"query_key_value": ("query", "key", "value"), "gate_up": ("gate", "up")}  # matrices with the same input


class Cache(NamedTuple):
    """Keys and values of the positions read so far, an array for each block, in the layout of `layers.split_heads`.

    With two axes for sequences and heads, a CPU would copy the cache of one sequence for each token.
    """

    keys_GSK: tuple[jax.Array, ...]
    values_GSK: tuple[jax.Array, ...]


def fused_linear(p: Mapping[str, Any], name: str, x_BTD: jax.Array, c: ModelConfig) -> Sequence[jax.Array]:
    """x times each matrix of FUSED[name]; by one matmul if p holds them fused, as for decoding."""
    device_ops = ops.get(c.implementation)
    if name not in p:
        return device_ops.fused_linear(device_ops, x_BTD, [p[part] for part in FUSED[name]], c.matmul_dtype)
    out_BTF = layers.linear(x_BTD, p[name], c.matmul_dtype, device_ops.weight_gradient)
    widths = [by_path(c)["blocks", part].shape[-1] for part in FUSED[name]]
    return jnp.split(out_BTF, list(accumulate(widths))[:-1], axis=-1)


def block(
    p: Mapping[str, Any],
    x_BTD: jax.Array,
    rope_cos_sin: tuple[jax.Array, jax.Array],
    saved: Any = None,
    *,
    attend: Attend,
    c: ModelConfig,
) -> tuple[jax.Array, Any]:
    """One block: attention and a SwiGLU MLP, each with an RMSNorm before it and added to the residual stream.

    Args:
        p: one block's parameters (without the L axis).
        x_BTD: the residual stream.
        rope_cos_sin: RoPE's cosines and sines for the positions of x.
        saved: the residuals that `attend` returned for the same x, or None.
        attend: the attention.
        c: the sizes.

    Returns:
        [B, T, D]; and the residuals of `attend`.
    """
    B, T, D = x_BTD.shape
    h_BTD = layers.rms_norm(x_BTD, p["attention_norm"], c.norm_eps)
    q_BTHK, k_BTHK, v_BTHK = query_key_value(p, h_BTD, rope_cos_sin, c)
    if c.kv_heads:
        k_BTHK, v_BTHK = (jnp.repeat(x, c.heads // c.kv_heads, axis=2) for x in (k_BTHK, v_BTHK))
    out_BTHK, residuals = attend(q_BTHK, k_BTHK, v_BTHK, saved)
    x_BTD = x_BTD + linear(out_BTHK.reshape(B, T, D), p["output"], c)
    return x_BTD + mlp(p, layers.rms_norm(x_BTD, p["mlp_norm"], c.norm_eps), c), residuals


def query_key_value(
    p: Mapping[str, Any], x_BTD: jax.Array, rope_cos_sin: tuple[jax.Array, jax.Array], c: ModelConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, T, H, K], and keys and values with the heads of `c.kv_heads`; RoPE has rotated the first two."""
    name = "query_key_value"
    if c.qk_norm and name not in p:
        device_ops, weights = ops.get(c.implementation), [p[part] for part in FUSED[name]]
        scales = p["query_norm"], p["key_norm"]
        return device_ops.query_key_value(device_ops, x_BTD, weights, scales, rope_cos_sin, c.norm_eps, c.matmul_dtype)
    heads = (*x_BTD.shape[:2], -1, c.width // c.heads)
    q_BTHK, k_BTHK, v_BTHK = (array.reshape(heads) for array in fused_linear(p, name, x_BTD, c))
    if not c.qk_norm:
        return layers.rope(q_BTHK, rope_cos_sin), layers.rope(k_BTHK, rope_cos_sin), v_BTHK
    q_BTHK = layers.rms_norm_rope(q_BTHK, p["query_norm"], rope_cos_sin, c.norm_eps)
    return q_BTHK, layers.rms_norm_rope(k_BTHK, p["key_norm"], rope_cos_sin, c.norm_eps), v_BTHK


def mlp(p: Mapping[str, Any], x_BTD: jax.Array, c: ModelConfig) -> jax.Array:
    """SwiGLU."""
    if "gate_up" in p:
        return linear(layers.swiglu_activation(*fused_linear(p, "gate_up", x_BTD, c)), p["down"], c)
    device_ops = ops.get(c.implementation)
    return device_ops.swiglu(device_ops, x_BTD, p["gate"], p["up"], p["down"], c.matmul_dtype)


def linear(x_BTD: jax.Array, w_DF: Any, c: ModelConfig) -> jax.Array:
    """x times a matrix, in the dtypes and the form of the configuration."""
    return layers.linear(x_BTD, w_DF, c.matmul_dtype, ops.get(c.implementation).weight_gradient)


def final_hidden_with_accumulator(
    c: ModelConfig, params: Params, ids_BT: jax.Array, gather_block: Callable | None = None
) -> tuple[jax.Array, Params]:
    """`Decoder.final_hidden`, and the parameters for their next use (see `grad_accumulation`).

    `gather_block` makes the whole parameters of a block from those given, if they are parts.
    """
    attend = partial(ops.get(c.implementation).attention, matmul_dtype=c.matmul_dtype)
    run_block: Any = partial(block, attend=lambda q, k, v, saved: attend(q, k, v, saved=saved), c=c)
    if gather_block:
        run_whole = run_block
        run_block = lambda p, *arguments: run_whole(gather_block(p), *arguments)  # noqa: E731
    rope_cos_sin = _rope_cos_sin_on_host(ids_BT.shape[1], c)
    rows_BTD, embedding_VD = embed_with_accumulator(ids_BT, params["embedding"])
    x_BTD, blocks = rows_BTD.astype(c.activation_dtype), dict(params["blocks"])
    if c.remat:
        x_BTD, blocks = remat_blocks(blocks, x_BTD, rope_cos_sin, run_block, ops.get(c.implementation).scan)
    else:
        by_layer, blocks = unstack_with_accumulator(blocks)
        for p in by_layer:
            x_BTD, _ = run_block(p, x_BTD, rope_cos_sin)
    return layers.rms_norm(x_BTD, params["norm"], c.norm_eps), params | {"embedding": embedding_VD, "blocks": blocks}


def loss(
    c: ModelConfig,
    params: Params,
    inputs_BT: jax.Array,
    targets_BT: jax.Array,
    gather_block: Callable | None = None,
) -> jax.Array:
    """Sum over the batch of -ln p(target), in nats, float32, for evaluation; targets below 0 are ignored.

    `gather_block` is as for `final_hidden_with_accumulator`.
    """
    device_ops, head_VD = ops.get(c.implementation), params.get("head", params["embedding"])
    x_BTD, _ = final_hidden_with_accumulator(c, params, inputs_BT, gather_block)
    x_ND = x_BTD.reshape(-1, c.width)
    return device_ops.cross_entropy(device_ops, x_ND, head_VD, targets_BT.reshape(-1), c.matmul_dtype)


def _rope_cos_sin_on_host(length: int, c: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """`rope_cos_sin` of positions 0 to length - 1, as constants of the traced program.

    Otherwise XLA computes a sine and a cosine for each number that they rotate. The CPU computes them, because the
    numerics check has yet to trust the device.
    """
    with jax.core.eval_context(), jax.default_device(jax.local_devices(backend="cpu")[0]):
        return _rope_cos_sin(np.arange(length, dtype=np.int32)[None], c.width // c.heads, c.rope_theta)


_rope_cos_sin = jax.jit(layers.rope_cos_sin, static_argnums=(1, 2))  # eager, each operation would compile alone


def loss_and_gradient(
    c: ModelConfig,
    params: Params,
    inputs_BT: jax.Array,
    targets_BT: jax.Array,
    scale: jax.Array | float,
    grad_accumulator: Params,
    gather_block: Callable | None = None,
) -> tuple[jax.Array, Params]:
    """`loss`, and its gradient with respect to the parameters.

    Returns:
        [] float32, in nats; and `grad_accumulator` (like the parameters, float32), to which the gradient times `scale`
        is added in place.
    """
    device_ops, head = ops.get(c.implementation), "embedding" if c.tied else "head"
    (x_BTD, _), vjp_fn = jax.vjp(lambda p: final_hidden_with_accumulator(c, p, inputs_BT, gather_block), params)
    loss_sum, d_x_ND, head_accumulator_VD = device_ops.cross_entropy_and_grad(
        device_ops,
        x_BTD.reshape(-1, c.width),
        params[head],
        targets_BT.reshape(-1),
        scale,
        grad_accumulator[head],
        c.matmul_dtype,
    )
    (grad_accumulator,) = vjp_fn((d_x_ND.reshape(x_BTD.shape), grad_accumulator | {head: head_accumulator_VD}))
    return loss_sum, grad_accumulator


@partial(jax.jit, static_argnums=0)
def prepare_decode_params(config: ModelConfig, params: Params) -> Params:
    """The parameters as `forward_with_cache` reads them, so that no token pays for slicing, casting or transposing.

    `blocks` becomes a tuple with the parameters of each block, in which matrices with the same input are fused (FUSED).
    `head` is [V, D] with zero rows up to a multiple of `Ops.head_row_multiple`. Matrices have the matmul dtype and are
    transposed, [F, D], the form in which a CPU multiplies fastest.
    """
    blocks = []
    for layer in range(config.layers):
        p = {name: leaf[layer] for name, leaf in params["blocks"].items()}
        p |= {name: jnp.concatenate([p[part] for part in parts], axis=1) for name, parts in FUSED.items()}
        names = [name for name in p if not any(name in parts for parts in FUSED.values())]
        blocks.append({name: p[name].astype(config.matmul_dtype).T if p[name].ndim == 2 else p[name] for name in names})
    head_VD = params["embedding" if config.tied else "head"].astype(config.matmul_dtype)
    if missing := -config.vocab_size % ops.get(config.implementation).head_row_multiple:
        head_VD = jnp.pad(head_VD, ((0, missing), (0, 0)))
    return params | {"blocks": tuple(blocks), "head": head_VD}


def empty_cache(config: ModelConfig, batch: int, slots: int) -> Cache:
    """A cache of zeros: `slots` positions for each of `batch` sequences, in the activation dtype."""
    shape_GSK = batch * config.heads, slots, config.width // config.heads
    return Cache(*(tuple(jnp.zeros(shape_GSK, config.activation_dtype) for _ in range(config.layers)) for _ in "kv"))


def forward_with_cache(
    c: ModelConfig,
    weights: Params,
    ids_BT: jax.Array,
    positions_BT: jax.Array,
    cache: Cache,
    start: jax.Array,
    mask_BTS: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Reads T more tokens, which take the slots from `start` on of the cache's S slots.

    Args:
        c: the sizes.
        weights: from `prepare_decode_params`.
        ids_BT: the tokens.
        positions_BT: their positions in each sequence, for RoPE.
        cache: the keys and values so far.
        start: [] integer, at most S - T.
        mask_BTS: True where a token may attend to a slot.

    Returns:
        Logits [B, V] float32 for the token after the last one read, and the new cache.
    """
    rope_cos_sin = layers.rope_cos_sin(positions_BT, c.width // c.heads, c.rope_theta)
    x_BTD = layers.embed(ids_BT, weights["embedding"]).astype(c.activation_dtype)
    filled = []
    for p, *keys_and_values in zip(weights["blocks"], *cache, strict=True):
        x_BTD, keys_and_values = _block_with_cache(c, p, x_BTD, rope_cos_sin, *keys_and_values, start, mask_BTS)
        filled.append(keys_and_values)
    layout = ops.get(c.implementation).decode_layout
    x_BD = layers.rms_norm(x_BTD[:, -1], weights["norm"], c.norm_eps)
    logits_BV = linear(x_BD.astype(jnp.float32), layout(weights["head"]), c)
    return logits_BV[:, : c.vocab_size], Cache(*zip(*filled, strict=True))


@partial(jax.jit, static_argnums=0)  # traced once for all blocks
def _block_with_cache(c, p, x_BTD, rope_cos_sin, keys_GSK, values_GSK, start, mask_BTS):
    def attend(q_BTHK, k_BTHK, v_BTHK, saved):
        k_GTK, v_GTK = layers.split_heads(k_BTHK), layers.split_heads(v_BTHK)
        k_GSK = jax.lax.dynamic_update_slice(keys_GSK, k_GTK, (0, start, 0))
        v_GSK = jax.lax.dynamic_update_slice(values_GSK, v_GTK, (0, start, 0))
        return layers.attention(q_BTHK, k_GSK, v_GSK, mask_BTS), (k_GSK, v_GSK)

    layout = ops.get(c.implementation).decode_layout
    p = {name: layout(leaf) if leaf.ndim == 2 else leaf for name, leaf in p.items()}
    return block(p, x_BTD, rope_cos_sin, attend=attend, c=c)


def parameter_count(params: Params) -> int:
    """How many numbers a tree of parameters (or of their shapes) holds."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
