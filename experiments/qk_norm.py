"""What the norms of queries and keys (`model.qk_norm`) add to a training micro-step of the preset, on a Hopper GPU.

    python -m experiments.qk_norm
    python -m experiments.qk_norm --forms plain kernel kernel-64-8-8 --rounds 20

Forms: `plain` is XLA's, `saved-inverse` the same with the norms' inverses saved, `kernel` what jaxlm runs. In
`kernel-R-G-W` a program of the kernel computes R tokens of G heads with W warps. The forms alternate with the step
without the norms in one process, in an order that turns each round. A ratio is of two times of the same round; the
table has its median, and its quartiles over the rounds.

First each form's queries, keys, values and gradients at one layer's sizes are compared with the plain form in float32.
"""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from statistics import median, quantiles
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from configs import m2_60m
from jaxlm.config import Config, ModelConfig, from_config_dict
from jaxlm.core import layers, ops
from jaxlm.core.ops import hopper, hopper_rope, xla
from jaxlm.core.train_step import init_state, make_train_step
from jaxlm.device import backend

FORMS = ("plain", "saved-inverse", "kernel", "kernel-16-8-4", "kernel-64-8-8", "kernel-32-4-4", "kernel-64-2-4")


@contextlib.contextmanager
def form(name: str) -> Iterator[Callable[..., Any]]:
    """Makes the record for Hopper GPUs compute `query_key_value` in this form, and yields the function."""
    names, run = ("BLOCK_ROWS", "MAX_GROUP", "WARPS"), hopper_rope.query_key_value
    sizes = {size: getattr(hopper_rope, size) for size in names}
    if name == "plain":
        run = xla.query_key_value
    elif name == "saved-inverse":
        run = with_saved_inverse
    elif name != "kernel":
        sizes = dict(zip(names, map(int, name.split("-")[1:]), strict=True))
    record = replace(hopper.HOPPER, query_key_value=run)
    with mock.patch.dict(ops.IMPLEMENTATIONS, hopper=record), mock.patch.multiple(hopper_rope, **sizes):
        jax.clear_caches()
        yield partial(run, record)


def with_saved_inverse(device_ops, x_BTD, weights, scales, rope_cos_sin, eps, matmul_dtype):
    """`xla.query_key_value` that rotates before it norms, so that the sums of rows are apart from the element-wise."""
    K = len(scales[0])
    parts = device_ops.fused_linear(device_ops, x_BTD, weights, matmul_dtype)
    q_BTHK, k_BTHK, v_BTHK = (array.reshape(*x_BTD.shape[:2], -1, K) for array in parts)
    return *(_rotate_then_norm(x, s, rope_cos_sin, eps) for x, s in zip((q_BTHK, k_BTHK), scales, strict=True)), v_BTHK


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rotate_then_norm(x_BTHK, scale_K, cos_sin, eps):
    return _rotate_then_norm_forward(x_BTHK, scale_K, cos_sin, eps)[0]


def _rotate_then_norm_forward(x_BTHK, scale_K, cos_sin, eps):
    x32_BTHK = x_BTHK.astype(jnp.float32)
    inverse_BTH1 = jax.lax.rsqrt(jnp.mean(jnp.square(x32_BTHK), axis=-1, keepdims=True) + eps)
    out_BTHK = layers.rope(x32_BTHK * scale_K, cos_sin) * inverse_BTH1
    return out_BTHK.astype(x_BTHK.dtype), (x_BTHK, scale_K, cos_sin, inverse_BTH1)


def _rotate_then_norm_backward(eps, residuals, d_out_BTHK):
    x_BTHK, scale_K, (cos, sin), inverse_BTH1 = residuals
    d_BTHK = layers.rope(d_out_BTHK.astype(jnp.float32), (cos, -sin))
    normed_BTHK = x_BTHK.astype(jnp.float32) * inverse_BTH1
    projection_BTH1 = jnp.mean(d_BTHK * scale_K * normed_BTHK, axis=-1, keepdims=True)
    d_x_BTHK = inverse_BTH1 * (d_BTHK * scale_K - normed_BTHK * projection_BTH1)
    return d_x_BTHK.astype(x_BTHK.dtype), jnp.sum(d_BTHK * normed_BTHK, axis=(0, 1, 2)), None


_rotate_then_norm.defvjp(_rotate_then_norm_forward, _rotate_then_norm_backward)


def outputs_and_gradients(run: Callable[..., Any], c: ModelConfig, dtype: str, batch: int = 4) -> list[np.ndarray]:
    """q, k, v and the gradients of x, the matrices and the scales, of random inputs that do not depend on the dtype."""
    D, K, T = c.width, c.width // c.heads, c.context
    keys = iter(jax.random.split(jax.random.key(0), 9))
    x_BTD = jax.random.normal(next(keys), (batch, T, D)).astype(jnp.bfloat16).astype(dtype)
    weights = [jax.random.normal(next(keys), (D, D)).astype(jnp.bfloat16).astype(jnp.float32) * 0.02 for _ in "qkv"]
    scales = [1 + 0.3 * jax.random.normal(next(keys), (K,)) for _ in "qk"]
    d_qkv = [jax.random.normal(next(keys), (batch, T, c.heads, K)).astype(jnp.bfloat16).astype(dtype) for _ in "qkv"]
    cos_sin = layers.rope_cos_sin(jnp.arange(T)[None], K, c.rope_theta)

    @jax.jit
    def compute(x_BTD, weights, scales, d_qkv):
        qkv, vjp_fn = jax.vjp(lambda *a: tuple(run(*a, cos_sin, c.norm_eps, dtype)), x_BTD, weights, scales)
        return *qkv, *jax.tree.leaves(vjp_fn(tuple(d_qkv)))

    with jax.default_matmul_precision("highest"):
        return [np.float64(array) for array in compute(x_BTD, weights, scales, d_qkv)]


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def prepare(config: Config, ids: jax.Array, name: str | None) -> Any:
    """The compiled micro-step, in a form or without norms, and how many seconds compiling took."""
    began = time.perf_counter()
    config = replace(config, model=replace(config.model, qk_norm=name is not None))
    with form(name or "plain"):
        step = make_train_step(config).lower(jax.eval_shape(lambda: init_state(config)), ids).compile()
    print(f"{name or 'without norms'}: compiled in {time.perf_counter() - began:.0f} s,", end=" ", flush=True)
    print(f"{step.memory_analysis().temp_size_in_bytes / 1e6:,.0f} MB of temporaries", flush=True)
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--forms", nargs="+", default=FORMS)
    parser.add_argument("--batch", type=int, default=32, help="sequences of a micro-batch")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=16, help="micro-steps of a measurement")
    args = parser.parse_args()
    device = backend.start("cuda")
    config = replace(from_config_dict(m2_60m.get_config()), batch_size=args.batch)
    config = backend.resolve_run(config, device)
    print(f"{backend.describe(device)}, jax {jax.__version__}, {config.model.implementation}, {args.batch} sequences")

    exact = outputs_and_gradients(partial(xla.query_key_value, xla.XLA), config.model, "float32")
    print("relative errors of q k v | gradients of x | of the matrices | of the scales")
    for name in args.forms:
        with form(name) as run:
            found = outputs_and_gradients(run, config.model, "bfloat16")
        errors = [f"{relative_error(a, b):.5f}" for a, b in zip(found, exact, strict=True)]
        print(f"{name}: {' '.join(errors[:3])} | {errors[3]} | {' '.join(errors[4:7])} | {' '.join(errors[7:])}")

    rng = np.random.default_rng(0)
    shape = args.batch, config.model.context + 1
    ids = jax.device_put(rng.integers(config.model.vocab_size, size=shape, dtype=np.int32))
    names = [None, *args.forms]
    steps = {name: prepare(config, ids, name) for name in names}
    models = {is_normed: replace(config.model, qk_norm=is_normed) for is_normed in (False, True)}
    states = {is_normed: init_state(replace(config, model=model)) for is_normed, model in models.items()}

    def measure(name: str | None, count: int) -> tuple[float, float]:
        """Milliseconds of a micro-step, and the last loss."""
        state = states[name is not None]
        began = time.perf_counter()
        for _ in range(count):
            state, metrics = steps[name](state, ids)
        loss = float(metrics.loss)
        states[name is not None] = state
        return (time.perf_counter() - began) / count * 1e3, loss

    for name in names:
        print(f"{name or 'without norms'}: loss {measure(name, 2)[1]:.4f}")
    times: dict[str | None, list[float]] = {name: [] for name in names}
    for turn in range(args.rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(measure(name, args.steps)[0])
    print("| form | ms | ratio | quartiles |\n|---|---|---|---|")
    for name in names:
        ratios = [a / b for a, b in zip(times[name], times[None], strict=True)]
        low, _, high = quantiles(ratios, n=4)
        print(
            f"| {name or 'without norms'} | {median(times[name]):.2f} | {median(ratios):.4f} | {low:.4f} {high:.4f} |"
        )


if __name__ == "__main__":
    main()
