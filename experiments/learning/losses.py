"""Other losses than cross-entropy, computed from whole logits: what the study compares, and jaxlm does not have.

`soft-cap C` bounds the logits by C tanh(logits / C), as in Gemma 2 (arXiv 2408.00118). `z-loss W` adds W logsumexp^2 to
the training loss, as in PaLM (arXiv 2204.02311). Validation losses are cross-entropies, with the soft-cap.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core import ops


def install(name: str) -> None:
    """Makes every implementation of this process compute the loss `name`, such as `soft-cap 15`."""
    kind, value = name.split()
    cap, z_weight = (float(value), 0.0) if kind == "soft-cap" else (0.0, float(value))
    functions = {
        "cross_entropy": partial(_cross_entropy, cap, 0.0),
        "cross_entropy_and_grad": partial(_cross_entropy_and_grad, cap, z_weight),
    }
    ops.IMPLEMENTATIONS |= {key: replace(record, **functions) for key, record in ops.IMPLEMENTATIONS.items()}


def _cross_entropy(cap, z_weight, record, x_ND, embedding_VD, targets_N, matmul_dtype) -> Any:
    logits_NV = jnp.matmul(
        x_ND.astype(matmul_dtype), embedding_VD.astype(matmul_dtype).T, preferred_element_type=jnp.float32
    )
    if cap:
        logits_NV = cap * jnp.tanh(logits_NV / cap)
    logsumexp_N = jax.nn.logsumexp(logits_NV, axis=1)
    target_N = jnp.take_along_axis(logits_NV, jnp.maximum(targets_N, 0)[:, None], axis=1)[:, 0]
    loss_N = logsumexp_N - target_N + z_weight * jnp.square(logsumexp_N)
    return jnp.sum(jnp.where(targets_N >= 0, loss_N, 0))


def _cross_entropy_and_grad(cap, z_weight, record, x_ND, embedding_VD, targets_N, scale, accumulator_VD, matmul_dtype):
    def loss(x_ND, embedding_VD):
        return _cross_entropy(cap, z_weight, record, x_ND, embedding_VD, targets_N, matmul_dtype)

    loss_sum, (d_x_ND, d_embedding_VD) = jax.value_and_grad(loss, (0, 1))(x_ND, embedding_VD)
    return loss_sum, scale * d_x_ND, accumulator_VD + scale * d_embedding_VD
