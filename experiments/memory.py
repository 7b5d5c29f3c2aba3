"""Memory of a micro-step of the 60M preset, by XLA's own analysis of the compiled step, beside plain JAX.

    python -m experiments.memory

Nothing is allocated. The total counts the arguments (weights, moments, accumulated gradients, one micro-batch), the
results that do not reuse the arguments' buffers, and the temporaries. No setting can go below the arguments and one set
of gradients: clipping needs the norm of all gradients before the first weight may change. Plain JAX has the same model,
parameters and optax chain, with whole logits, whole attention scores and `optax.MultiSteps`.

On an Apple GPU a step is several programs and none of them reuses a buffer. Its row is for the program with the highest
total, as compiled for the CPU, and counts the arrays that exist beside that program.
"""

import argparse
import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import m2_60m
from jaxlm.config import Config, from_config_dict
from jaxlm.core import layers, ops
from jaxlm.core.decoder import Decoder, init_params
from jaxlm.core.model import parameter_count
from jaxlm.core.optimizer import make_transformation
from jaxlm.core.train_step import init_state, make_train_step
from jaxlm.device import backend
from jaxlm.run.checkpoint import checkpoint_bytes
from jaxlm.run.memory import compile_step

TARGET = 1.4  # GB


def on_apple(config: Config) -> float:
    """Prints the row of a step on an Apple GPU, and returns its total in GB."""
    device: Any = SimpleNamespace(platform=backend.APPLE[0])
    config = backend.resolve_run(config, device)
    state = jax.eval_shape(lambda: init_state(config))
    step: Any = make_train_step(config)
    accumulator = jax.eval_shape(step.start, state.params)
    compiled = compile_step(config)
    programs = {}
    for name in ("start", "accumulate_chunk", "update"):
        m: Any = getattr(compiled, name).memory_analysis()
        arguments = size((state, batch(config))) + (size(accumulator) if name != "start" else 0)
        programs[name] = arguments + m.output_size_in_bytes - m.alias_size_in_bytes, m.temp_size_in_bytes
    worst = max(programs, key=lambda name: sum(programs[name]))
    arguments, temporaries = (part / 1e9 for part in programs[worst])
    name = f"Apple GPU, chunks {config.microbatch_chunks}, remat {config.model.remat}: {worst}"
    print(f"| {name} | {arguments:.2f} | {temporaries:.2f} | **{arguments + temporaries:.2f}** |", flush=True)
    return arguments + temporaries


def size(tree: Any) -> int:
    """Bytes of the arrays in a tree of shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def plain(config: Config) -> jax.stages.Compiled:
    """The compiled step in plain JAX."""
    optimizer = optax.MultiSteps(make_transformation(config), config.grad_accum_steps)
    params = jax.eval_shape(lambda: init_params(config.model, jax.random.key(0)))
    model = Decoder(dataclasses.replace(config.model, remat=False, implementation="xla"))

    def loss(params: Any, ids_BT: jax.Array) -> jax.Array:
        logits_BTV = model.apply({"params": params}, ids_BT[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, ids_BT[:, 1:]).mean()

    def step(params: Any, state: optax.MultiStepsState, ids_BT: jax.Array) -> tuple[Any, ...]:
        value, grads = jax.value_and_grad(loss)(params, ids_BT)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    def attend(q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array, **_: Any) -> tuple[jax.Array, None]:
        mask_BTS = jnp.tri(q_BTHK.shape[1], dtype=bool)[None]
        return layers.attention(q_BTHK, layers.split_heads(k_BTHK), layers.split_heads(v_BTHK), mask_BTS), None

    ops.IMPLEMENTATIONS["xla"] = dataclasses.replace(ops.get("xla"), attention=attend)
    state = jax.eval_shape(optimizer.init, params)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch(config)).compile()


def batch(config: Config) -> jax.ShapeDtypeStruct:
    """The shape of a micro-batch."""
    return jax.ShapeDtypeStruct((config.batch_size, config.model.context + 1), np.int32)


def row(name: str, compiled: jax.stages.Compiled) -> float:
    """Prints a row in GB and returns its total."""
    m: Any = compiled.memory_analysis()
    arguments, temporaries = m.argument_size_in_bytes / 1e9, m.temp_size_in_bytes / 1e9
    total = arguments + temporaries + (m.output_size_in_bytes - m.alias_size_in_bytes) / 1e9
    print(f"| {name} | {arguments:.2f} | {temporaries:.2f} | **{total:.2f}** |", flush=True)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--platform", default="auto")
    device = backend.start(parser.parse_args().platform)
    config = backend.resolve_run(from_config_dict(m2_60m.get_config()), device)
    print(f"{config.batch_size} x {config.model.context} tokens, {config.grad_accum_steps} accumulated, ", end="")
    print(f"{config.model.precision} on {backend.describe(device)}, jax {jax.__version__}\n")
    print("| setting | arguments, GB | temporaries | total |\n|---|---|---|---|")
    smallest = 1e9
    for chunks in (32, 16, 8, 1):
        for remat in (True, False):
            model = dataclasses.replace(config.model, remat=remat)
            name = f"chunks {chunks}, remat {remat}"
            total = row(name, compile_step(dataclasses.replace(config, microbatch_chunks=chunks, model=model)))
            smallest = min(smallest, total)
    apple = on_apple(from_config_dict(m2_60m.get_config()))
    plain_total = row("plain JAX", plain(config))
    params = jax.eval_shape(lambda: init_params(config.model, jax.random.key(0)))
    floor = 5 * 4 * parameter_count(params) / 1e9
    print(f"\nThe floor (weights, two moments, accumulated and new gradients) is {floor:.2f} GB, the target {TARGET}.")
    copy = checkpoint_bytes(jax.eval_shape(lambda: init_state(config))) / 1e9
    print(f"While a checkpoint is saved, its copy adds {copy:.2f}: {apple + copy:.2f} on an Apple GPU.")
    print(f"Smallest to plain JAX: {smallest / plain_total:.3f}")


if __name__ == "__main__":
    main()
