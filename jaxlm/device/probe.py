"""The program that tries a plugin of jax: python -m jaxlm.device.probe MODULE

Loads that plugin and no other, computes a small model's logits, loss and gradients with it, and holds them against
float64 NumPy. The last line that it prints is a JSON object: `name`, jax's name for the platform, and `failure`, empty
when all is well. (`jaxlm.device.plugins` runs it, and stops it when it hangs.)
"""

import json
import logging
import os
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.backend import backends

from jaxlm.config import ModelConfig
from jaxlm.core.model import Decoder, init_params, loss_and_gradient
from jaxlm.device import backend, plugins

SIZES = ModelConfig(vocab_size=257, context=24, layers=2, heads=2, width=32, mlp_width=48, precision="float32")
TOLERANCE = 0.02  # of float32 products in a GPU's shortened formats, with room; what is wrong is far from it
NUDGE = 1e-5  # of the finite differences
DIRECTIONS = 4  # in which each gradient is looked at


def check(device: jax.Device) -> str:
    """What is wrong with the numbers that a device computes, in words; empty for nothing."""
    config = backend.resolve(SIZES, device)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape), shapes)
    ids_BT = rng.integers(0, config.vocab_size, (2, config.context + 1))
    inputs_BT, targets_BT = (ids.astype(np.int32) for ids in (ids_BT[:, :-1], ids_BT[:, 1:]))

    def compute(p: Any, inputs_BT: jax.Array, targets_BT: jax.Array) -> Any:
        none = jax.tree.map(jnp.zeros_like, p)
        of_loss = loss_and_gradient(config, p, inputs_BT, targets_BT, 1.0, none)
        return Decoder(config).apply({"params": p}, inputs_BT), *of_loss

    narrow = jax.tree.map(np.float32, params)
    given = jax.device_put((narrow, inputs_BT, targets_BT), device)
    logits_BTV, nats, gradients = jax.device_get(jax.jit(compute)(*given))

    expected_BTV = reference_logits(params, inputs_BT, config)
    if not np.abs(logits_BTV - expected_BTV).max() <= TOLERANCE * np.abs(expected_BTV).max():
        return "computes wrong: the logits of a small model are not NumPy's"
    if not abs(nats / _nats(expected_BTV, targets_BT) - 1) <= TOLERANCE:
        return "computes wrong: the loss of a small model is not NumPy's"

    leaves, tree = jax.tree.flatten(params)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    names = ["/".join(key.key for key in path) for path in paths]
    for index, (name, gradient) in enumerate(zip(names, jax.tree.leaves(gradients), strict=True)):
        for direction in rng.normal(size=(DIRECTIONS, *gradient.shape)):

            def nats_at(distance: float, index: int = index, direction: np.ndarray = direction) -> float:
                moved = [*leaves[:index], leaves[index] + distance * direction, *leaves[index + 1 :]]
                return _nats(reference_logits(jax.tree.unflatten(tree, moved), inputs_BT, config), targets_BT)

            slope = (nats_at(NUDGE) - nats_at(-NUDGE)) / (2 * NUDGE)
            if not abs(np.vdot(gradient, direction) - slope) <= TOLERANCE * np.linalg.norm(gradient):
                return f"computes wrong: the gradient of a small model's {name} is not NumPy's"
    return ""


def reference_logits(params: Any, ids_BT: np.ndarray, c: ModelConfig) -> np.ndarray:
    """The logits [B, T, V] of a model with a tied head and keys of its own for each head, in float64."""
    (B, T), H, K = ids_BT.shape, c.heads, c.width // c.heads
    angles_TK = np.arange(T)[:, None] / c.rope_theta ** (np.arange(K // 2) / (K // 2))
    turns_T1K = np.exp(1j * angles_TK)[:, None]

    def normed(x_BTD: np.ndarray, scale_D: np.ndarray) -> np.ndarray:
        return scale_D * x_BTD / np.sqrt((x_BTD**2).mean(-1, keepdims=True) + c.norm_eps)

    def turned(x_BTHK: np.ndarray) -> np.ndarray:
        pairs = turns_T1K * (x_BTHK[..., : K // 2] + 1j * x_BTHK[..., K // 2 :])
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    x_BTD = params["embedding"][ids_BT]
    for layer in range(c.layers):
        p = {name: stacked[layer] for name, stacked in params["blocks"].items()}
        h_BTD = normed(x_BTD, p["attention_norm"])
        q_BTHK, k_BTHK, v_BTHK = ((h_BTD @ p[name]).reshape(B, T, H, K) for name in ("query", "key", "value"))
        scores_BHTS = np.einsum("bthk,bshk->bhts", turned(q_BTHK), turned(k_BTHK)) / np.sqrt(K)
        weights_BHTS = np.exp(scores_BHTS) * np.tri(T)
        weights_BHTS /= weights_BHTS.sum(-1, keepdims=True)
        x_BTD = x_BTD + np.einsum("bhts,bshk->bthk", weights_BHTS, v_BTHK).reshape(B, T, -1) @ p["output"]
        h_BTD = normed(x_BTD, p["mlp_norm"])
        gate_BTF = h_BTD @ p["gate"]
        x_BTD = x_BTD + (gate_BTF / (1 + np.exp(-gate_BTF)) * (h_BTD @ p["up"])) @ p["down"]
    return normed(x_BTD, params["norm"]) @ params["embedding"].T


def _nats(logits_BTV: np.ndarray, targets_BT: np.ndarray) -> float:
    chosen_BT = np.take_along_axis(logits_BTV, targets_BT[..., None], -1)[..., 0]
    return float((np.log(np.exp(logits_BTV).sum(-1)) - chosen_BT).sum())


class _Reasons(logging.Handler):
    """Keeps what jax only logs: the exceptions of plugins that do not initialize."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1]:
            self.found.append(record.exc_info[1])


def _answer(module: str) -> tuple[str, str]:
    """jax's name for the platform of a plugin, and what is wrong with it."""
    plugins.leave_out(plugin for plugin in plugins.installed() if plugin.module != module)
    reasons = _Reasons()
    logging.getLogger("jax").addHandler(reasons)
    try:
        names = [name for name in backends() if name not in ("cpu", "tpu")]  # which jax has without a plugin
        if reasons.found:
            raise reasons.found[0]
        return (names[0], check(jax.devices(names[0])[0])) if names else ("", "finds no device")
    except Exception as error:  # whatever a plugin raises
        return "", f"raises {type(error).__name__}: {' '.join(str(error).split())[:300]}"


if __name__ == "__main__":
    name, failure = _answer(sys.argv[1])
    print("\n" + json.dumps({"name": name, "failure": failure}), flush=True)
    os._exit(0)  # taking a plugin apart is no part of the trial
