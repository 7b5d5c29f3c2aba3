"""Measures what it costs to watch a run: the update-to-weight ratios in a step, and the listeners on the host.

    python -m experiments.watching [--config m2_60m] [--rounds 8] [--steps 10] [--platform auto]

Two versions of the training step, with and without the ratios, train on random tokens, turn about. The share is the
difference of their median times. On a CPU a micro-batch has one sequence, because the cost does not depend on the
batch; the share is that of a step of the whole batch.

The console (on a pseudo-terminal), the records and TensorBoard each receive 2,000 steps.
"""

import argparse
import contextlib
import dataclasses
import os
import pty
import threading
import time
from collections.abc import Iterator
from statistics import median
from typing import Any
from unittest import mock

import jax
import numpy as np

from experiments.cleanup import temporary_folder
from jaxlm.cli import read_config
from jaxlm.config import Config
from jaxlm.core import optimizer
from jaxlm.core.train_step import init_state, make_train_step
from jaxlm.device import backend
from jaxlm.run.console import Console
from jaxlm.run.events import StepEvent
from jaxlm.run.memory import batch_shape, state_shapes
from jaxlm.run.records import Records, TensorBoard

EVENTS = 2000


class Variant:
    """A training step with a state of its own, and the seconds of its optimizer steps."""

    def __init__(self, config: Config, ratios: bool):
        without = mock.patch.object(optimizer, "update_ratios", lambda model, updates, params: {})
        with contextlib.nullcontext() if ratios else without:
            self.step = make_train_step(config).lower(state_shapes(config), batch_shape(config)).compile()
        self.state = init_state(config)
        self.seconds: list[float] = []

    def train(self, batches: list[jax.Array], steps: int) -> None:
        jax.block_until_ready(self.state)
        start = time.perf_counter()
        for ids in batches * steps:
            self.state, _ = self.step(self.state, ids)
        jax.block_until_ready(self.state)
        self.seconds.append((time.perf_counter() - start) / steps)


def step_cost(config: Config, device: jax.Device, rounds: int, steps: int) -> None:
    """Prints the seconds of a step with and without ratios, and whether both end with the same bits."""
    full_tokens = config.tokens_per_step
    if device.platform == "cpu":
        config = dataclasses.replace(config, batch_size=1, microbatch_chunks=1)
    scale = full_tokens / config.tokens_per_step
    shape = (config.grad_accum_steps, *batch_shape(config).shape)
    ids = np.random.default_rng(0).integers(config.model.vocab_size, size=shape, dtype=np.int32)
    batches = [jax.device_put(micro_batch, device) for micro_batch in ids]
    variants = {name: Variant(config, name == "with") for name in ("without", "with")}
    for turn in range(rounds + 1):
        for variant in list(variants.values())[:: (-1) ** turn]:
            variant.train(batches, steps)
    without, with_ratios = (median(variants[name].seconds[1:]) for name in ("without", "with"))
    for name, variant in variants.items():
        memory = variant.step.memory_analysis()
        text = " ".join(f"{1e3 * seconds:.2f}" for seconds in variant.seconds[1:])
        print(f"{name} ratios: {text} ms a step, {memory.temp_size_in_bytes / 1e6:.1f} MB of temporaries")
    share = (with_ratios - without) / (without * scale)
    same = all(
        np.array_equal(a, b)
        for a, b in zip(*(jax.tree.leaves(jax.device_get(v.state)) for v in variants.values()), strict=True)
    )
    print(f"the ratios take {100 * share:+.3f}% of a step; the states are {'the same' if same else 'different'}")


@contextlib.contextmanager
def pseudo_terminal() -> Iterator[None]:
    """Makes stdout a terminal of 120 columns, which a thread reads."""
    master, slave = pty.openpty()
    stdout = os.dup(1)
    os.dup2(slave, 1)
    reader = threading.Thread(target=lambda: _drain(master), daemon=True)
    reader.start()
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(slave)
        reader.join()


def _drain(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        while os.read(descriptor, 65536):
            pass


def listener_cost(config: Config) -> None:
    """Prints the seconds that each listener takes for a step."""
    ratios = dict.fromkeys(("matrix", "embedding", "norm_scale"), 1e-3)
    events = [
        StepEvent(step, 3.0, 3e-4, 0.5, step * 65536, 3000.0, 20.0 * step, 20.0, 1e5, None, ratios)
        for step in range(1, EVENTS + 1)
    ]
    makers: dict[str, Any] = {
        "records": lambda place: Records(place, 0),
        "TensorBoard": lambda place: TensorBoard(place, config, 0),
        "console": lambda place: Console(config, 0),
    }
    for name, make in makers.items():
        terminal = pseudo_terminal() if name == "console" else contextlib.nullcontext()
        with temporary_folder("watching") as place, terminal:
            listener = make(place)
            start = time.perf_counter()
            for event in events:
                listener(event)
            seconds = time.perf_counter() - start
            listener.close()
        print(f"{name}: {1e6 * seconds / EVENTS:.0f} microseconds a step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="m2_60m")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of a turn")
    parser.add_argument("--platform", default="auto")
    args = parser.parse_args()
    config, _ = read_config(["--config", args.config, f"--config.platform={args.platform}"])
    device = backend.start(args.platform)
    config = backend.resolve_run(config, device)
    print(f"{args.config}, jax {jax.__version__} on {backend.describe(device)}, {config.model.precision}")
    step_cost(config, device, args.rounds, args.steps)
    listener_cost(config)


if __name__ == "__main__":
    main()
