"""What the norms of queries and keys (`model.qk_norm`) add to a training micro-step of the preset, on a Hopper GPU.

    python -m experiments.qk_norm
    python -m experiments.qk_norm --forms plain kernel kernel-64-8-8 --rounds 20

Forms: `kernel` is that of `core/ops/hopper_qk_norm.py`, and `kernel-R-G-W` the same with R tokens of G heads and W
warps in a program. `plain` is XLA's.

First the queries, keys and values of one layer and their gradients are timed in each of `--layer-forms`, and compared
with the plain form in float32. Then the whole micro-steps of `--forms` alternate with the step without the norms in one
process, in an order that turns each round. A ratio is of two times of the same round; the table has its median, and its
quartiles over the rounds. A form that fails is named and left out.
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
from jaxlm.core.ops import hopper, hopper_qk_norm, xla
from jaxlm.core.train_step import init_state, make_train_step
from jaxlm.device import backend

FORMS = ("plain", "kernel", "kernel-64-8-8", "kernel-32-2-4")
SIZES = ("BLOCK_ROWS", "MAX_GROUP", "WARPS")


@contextlib.contextmanager
def form(name: str | None) -> Iterator[Callable[..., Any]]:
    """Makes the record for Hopper GPUs compute `query_key_value` in this form, and yields the function."""
    kind, *sizes = (name or "without norms").split("-")
    with contextlib.ExitStack() as stack:
        run = {"kernel": hopper_qk_norm.query_key_value, "plain": xla.query_key_value}.get(kind, without_norms)
        for size, value in zip(SIZES, sizes if name else (), strict=False):
            stack.enter_context(mock.patch.object(hopper_qk_norm, size, int(value)))
        record = replace(hopper.HOPPER, query_key_value=run)
        stack.enter_context(mock.patch.dict(ops.IMPLEMENTATIONS, hopper=record))
        jax.clear_caches()
        yield partial(run, record)


@contextlib.contextmanager
def reported(name: str | None) -> Iterator[None]:
    """Prints that a form fails, so that the others go on."""
    try:
        yield
    except Exception as error:
        print(f"{name} FAILS: {type(error).__name__}: {str(error)[:600]}", flush=True)


def without_norms(device_ops, x_BTD, weights, scales, rope_cos_sin, eps, matmul_dtype):
    """RoPE alone."""
    parts = device_ops.fused_linear(device_ops, x_BTD, weights, matmul_dtype)
    q_BTHK, k_BTHK, v_BTHK = (array.reshape(*x_BTD.shape[:2], -1, len(scales[0])) for array in parts)
    return layers.rope(q_BTHK, rope_cos_sin), layers.rope(k_BTHK, rope_cos_sin), v_BTHK


def layer(run: Callable[..., Any], c: ModelConfig, dtype: str, batch: int) -> tuple[list[jax.Array], float]:
    """q, k, v and the gradients of x, the matrices and the scales; and how many microseconds they took.

    The inputs are random, and rounded to bfloat16 for each dtype.
    """
    D, K, T = c.width, c.width // c.heads, c.context
    keys = iter(jax.random.split(jax.random.key(0), 9))

    def draw(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape).astype(jnp.bfloat16).astype(dtype)

    x_BTD, d_qkv = draw(batch, T, D), tuple(draw(batch, T, c.heads, K) for _ in "qkv")
    weights = [draw(D, D).astype(jnp.float32) / 32 for _ in "qkv"]
    scales = [1 + draw(K).astype(jnp.float32) / 4 for _ in "qk"]
    with jax.default_device(jax.devices("cpu")[0]):  # as in the model
        cos_sin = [np.asarray(array) for array in layers.rope_cos_sin(jnp.arange(T)[None], K, c.rope_theta)]

    @jax.jit
    def compute(x_BTD, weights, scales, d_qkv):
        qkv, vjp_fn = jax.vjp(
            lambda *a: tuple(run(*a, tuple(map(jnp.asarray, cos_sin)), c.norm_eps, dtype)), x_BTD, weights, scales
        )
        return *qkv, *jax.tree.leaves(vjp_fn(d_qkv))

    with jax.default_matmul_precision("highest"):
        outputs = jax.block_until_ready(compute(x_BTD, weights, scales, d_qkv))
        times = []
        for _ in range(5):
            began = time.perf_counter()
            for _ in range(20):
                last = compute(x_BTD, weights, scales, d_qkv)
            jax.block_until_ready(last)
            times.append((time.perf_counter() - began) / 20 * 1e6)
    return list(outputs), median(times)


def relative_error(found: jax.Array, expected: jax.Array) -> float:
    return float(jnp.linalg.norm((found.astype(jnp.float32) - expected).ravel()) / jnp.linalg.norm(expected.ravel()))


def compare_layers(names: list[str], c: ModelConfig, batch: int) -> None:
    """Prints each form's time and errors."""
    exact, _ = layer(partial(xla.query_key_value, xla.XLA), c, "float32", batch)
    print("relative errors of q k v | gradients of x | of the matrices | of the scales")
    for name in (None, *names):
        with reported(name), form(name) as run:
            found, microseconds = layer(run, c, "bfloat16", batch)
            errors = [f"{relative_error(a, b):.5f}" for a, b in zip(found, exact, strict=True) if name]
            shown = " | ".join(" ".join(errors[a:b]) for a, b in ((0, 3), (3, 4), (4, 7), (7, 9)) if name)
            print(f"{name or 'without norms'}: {microseconds:.0f} us {shown}", flush=True)


def prepare(config: Config, ids: jax.Array, name: str | None) -> Any:
    """The compiled micro-step, in a form or without norms, and how many seconds compiling took."""
    began = time.perf_counter()
    config = replace(config, model=replace(config.model, qk_norm=name is not None))
    with form(name):
        step = make_train_step(config).lower(jax.eval_shape(lambda: init_state(config)), ids).compile()
    print(f"{name or 'without norms'}: compiled in {time.perf_counter() - began:.0f} s,", end=" ", flush=True)
    print(f"{step.memory_analysis().temp_size_in_bytes / 1e6:,.0f} MB of temporaries", flush=True)
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layer-forms", nargs="*", default=FORMS)
    parser.add_argument("--forms", nargs="*", default=FORMS)
    parser.add_argument("--batch", type=int, default=32, help="sequences of a micro-batch")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=16, help="micro-steps of a measurement")
    args = parser.parse_args()
    device = backend.start("cuda")
    config = replace(from_config_dict(m2_60m.get_config()), batch_size=args.batch)
    config = backend.resolve_run(config, device)
    print(f"{backend.describe(device)}, jax {jax.__version__}, {config.model.implementation}, {args.batch} sequences")
    compare_layers(args.layer_forms, config.model, args.batch)

    rng = np.random.default_rng(0)
    shape = args.batch, config.model.context + 1
    ids = jax.device_put(rng.integers(config.model.vocab_size, size=shape, dtype=np.int32))
    models = {is_normed: replace(config.model, qk_norm=is_normed) for is_normed in (False, True)}
    states = {is_normed: init_state(replace(config, model=model)) for is_normed, model in models.items()}
    steps: dict[str | None, Any] = {}

    def measure(name: str | None, count: int) -> tuple[float, float]:
        """Milliseconds of a micro-step, and the last loss."""
        state = states[name is not None]
        began = time.perf_counter()
        for _ in range(count):
            state, metrics = steps[name](state, ids)
        loss = float(metrics.loss)
        states[name is not None] = state
        return (time.perf_counter() - began) / count * 1e3, loss

    for name in (None, *args.forms):
        with reported(name):
            steps[name] = prepare(config, ids, name)
            print(f"{name or 'without norms'}: loss {measure(name, 2)[1]:.4f} while warming up", flush=True)
    names = list(steps)
    times: dict[str | None, list[float]] = {name: [] for name in names}
    for turn in range(args.rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(measure(name, args.steps)[0])
        print("ms:", *(f"{times[name][-1]:.2f}" for name in names), flush=True)
    print("| form | ms | ratio | quartiles |\n|---|---|---|---|")
    for name in names:
        ratios = [a / b for a, b in zip(times[name], times[None], strict=True)]
        low, _, high = quantiles(ratios, n=4)
        label = name or "without norms"
        print(f"| {label} | {median(times[name]):.2f} | {median(ratios):.4f} | {low:.4f} {high:.4f} |")


if __name__ == "__main__":
    main()
