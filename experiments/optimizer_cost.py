"""Measures what an optimizer takes of a training step: milliseconds and memory, beside AdamW's.

    python -m experiments.optimizer_cost [--config m2_60m_fast] [--rounds 8] [--steps 20] [--platform auto]

The config's step, and the same with AdamW, train on random tokens; a third program computes only the gradient. They
alternate. The optimizer's part is a step's time less the gradient's, both medians. Memory is what the compiled programs
hold besides their arguments.
"""

import argparse
import time
from dataclasses import replace
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.cli import read_config
from jaxlm.config import Config, OptimizerConfig
from jaxlm.core.model import loss_and_gradient
from jaxlm.core.train_step import init_state
from jaxlm.device import backend
from jaxlm.run.memory import batch_shape, compile_step


class Program:
    """A compiled program that carries a state."""

    def __init__(self, compiled: Any, state: Any):
        self.run, self.state = compiled, state
        self.milliseconds: list[float] = []

    def train(self, ids: jax.Array, steps: int) -> None:
        jax.block_until_ready(self.state)
        start = time.perf_counter()
        for _ in range(steps):
            self.state, _ = self.run(self.state, ids)
        jax.block_until_ready(self.state)
        self.milliseconds.append((time.perf_counter() - start) / steps * 1e3)


def gradient(config: Config) -> Program:
    """Adds the gradient of a batch to an accumulator, again and again."""

    def add(state: Any, ids_BT: jax.Array) -> tuple[Any, jax.Array]:
        params, grads = state
        scale = 1 / (ids_BT.size - len(ids_BT))
        loss, grads = loss_and_gradient(config.model, params, ids_BT[:, :-1], ids_BT[:, 1:], scale, grads)
        return (params, grads), loss

    state = (params := init_state(config).params, jax.tree.map(jnp.zeros_like, params))
    return Program(jax.jit(add, donate_argnums=0).lower(state, batch_shape(config)).compile(), state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="m2_60m_fast")
    parser.add_argument("--platform", default="auto")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="of a measurement")
    args, settings = parser.parse_known_args()
    config, _ = read_config(["--config", args.config, *settings, "--config.grad_accum_steps=1"])
    device = backend.start(args.platform)
    config = backend.resolve_run(config, device)
    adamw = replace(config, optimizer=OptimizerConfig(warmup_steps=config.optimizer.warmup_steps))
    programs = {"gradient": gradient(config)} | {
        name: Program(compile_step(c), init_state(c)) for name, c in (("AdamW", adamw), (args.config, config))
    }
    rng = np.random.default_rng(0)
    shape = batch_shape(config)
    ids = jax.device_put(rng.integers(config.model.vocab_size, size=shape.shape, dtype=np.int32), device)
    for program in programs.values():
        program.train(ids, 3)
        program.milliseconds.clear()
    for _ in range(args.rounds):
        for program in programs.values():
            program.train(ids, args.steps)
    print(
        f"{backend.describe(device)}, jax {jax.__version__}, {config.batch_size * config.model.context:,} tokens a step"
    )
    print("| program | ms | the optimizer | part | MB of temporaries | MB of state |\n|---|---|---|---|---|---|")
    base = median(programs["gradient"].milliseconds)
    for name, program in programs.items():
        ms, memory = median(program.milliseconds), program.run.memory_analysis()
        state = sum(leaf.nbytes for leaf in jax.tree.leaves(program.state)) / 1e6
        print(
            f"| {name} | {ms:.2f} | {ms - base:.2f} | {(ms - base) / ms:.1%} | {memory.temp_size_in_bytes / 1e6:,.0f} |"
            f" {state:,.0f} |"
        )


if __name__ == "__main__":
    main()
