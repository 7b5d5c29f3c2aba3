"""Measures training of the 60M preset on several GPUs of one machine, beside PyTorch's DistributedDataParallel.

    python -m experiments.many_devices

Layouts: `data`, each device has the whole model; `fsdp`, each holds its part. The batch is 32 x 1024 tokens a device,
two of them a step. `fixed` is `data` with 65,536 tokens a step in all: two micro-batches on one device, one on several.
The layouts of jaxlm alternate in one process, on random tokens. PyTorch follows, a process for each device.

The ratio is to the same program on one device: of tokens/s, a median over the rounds. MB are of a device: its part of
the training state, and what the compiled step allocates beside it. The loss is after ten steps on the same batch of
65,536 tokens, so it should be the same in all rows but for rounding.

After the rounds, the kernels of a few steps are traced. `sends` is how many milliseconds of a step the first device's
collective kernels ran, and `hidden` the part of them in which another of its kernels ran too.
"""

import argparse
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import numpy as np

from configs import m2_60m
from experiments.cleanup import no_child_left
from experiments.rounds import ratios
from experiments.throughput import run
from jaxlm.config import Config, MeshConfig, from_config_dict
from jaxlm.core.train_step import init_state
from jaxlm.device import backend
from jaxlm.device.mesh import batch_sharding, make_mesh, place_rows
from jaxlm.run.memory import batch_shape, compile_step

USERS_TOKENS = 65_536  # a step
LOSS_STEPS = 10


class Layout(NamedTuple):
    """How the preset is spread over devices."""

    name: str
    devices: int
    config: Config


def layouts(counts: list[int]) -> list[Layout]:
    """One device, then each layout for each number of devices."""
    config = from_config_dict(m2_60m.get_config())
    made = []
    for n in counts:
        same = replace(config, batch_size=config.batch_size * n)
        made.append(Layout("data", n, replace(same, mesh=MeshConfig(n, 1))))
        if n > 1:
            made.append(Layout("fsdp", n, replace(same, mesh=MeshConfig(1, n))))
            whole = replace(config, batch_size=USERS_TOKENS // config.model.context, grad_accum_steps=1)
            made.append(Layout("fixed", n, replace(whole, mesh=MeshConfig(n, 1))))
    return made


class Program:
    """A layout's compiled step, with a state and a batch."""

    def __init__(self, layout: Layout, device: jax.Device):
        self.layout = layout
        self.config = config = backend.resolve_run(layout.config, device)
        self.mesh = make_mesh(config, device)
        self.step = compile_step(config, self.mesh)
        self.place = batch_sharding(self.mesh, device)
        self.loss = self._loss_of_one_batch()
        self.ids = self._batch(batch_shape(config).shape)
        self.state = init_state(config, self.mesh)
        self.rates: list[float] = []

    def _batch(self, shape: tuple[int, ...]) -> jax.Array:
        rng = np.random.default_rng(0)
        return place_rows(rng.integers(self.config.model.vocab_size, size=shape, dtype=np.int32), self.place)

    def _loss_of_one_batch(self) -> float | None:
        """After LOSS_STEPS on the same USERS_TOKENS tokens; None if the layout has more tokens a step."""
        c = self.config
        if c.tokens_per_step != USERS_TOKENS:
            return None
        rng = np.random.default_rng(0)
        rows = rng.integers(c.model.vocab_size, size=(USERS_TOKENS // c.model.context, c.model.context + 1))
        batches = [place_rows(part, self.place) for part in np.split(rows.astype(np.int32), c.grad_accum_steps)]
        state = init_state(c, self.mesh)
        for _ in range(LOSS_STEPS):
            for ids in batches:
                state, metrics = self.step(state, ids)
        return float(metrics.loss)

    def train(self, steps: int) -> float:
        """Trains for so many optimizer steps; returns tokens/s."""
        jax.block_until_ready(self.state)
        start = time.perf_counter()
        for _ in range(steps * self.config.grad_accum_steps):
            self.state, _ = self.step(self.state, self.ids)
        jax.block_until_ready(self.state)
        return steps * self.config.tokens_per_step / (time.perf_counter() - start)

    def megabytes(self) -> tuple[float, float]:
        """Of one device: the state, and what a step allocates beside it."""
        state = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(self.state))
        return state / 1e6, self.step.memory_analysis().temp_size_in_bytes / 1e6


def sends(program: Program, steps: int = 4) -> tuple[float, float]:
    """Milliseconds a step of the first device's collective kernels, and the part of them beside other kernels."""
    program.train(2)
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            program.train(steps)
        file = next(Path(directory).rglob("*.xplane.pb"))
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        device = next(plane for plane in planes if plane.name.startswith("/device:GPU:0"))
        events = [event for line in device.lines if line.name.startswith("Stream") for event in line.events]
        spans = {True: [], False: []}
        for event in events:
            spans["nccl" in event.name.lower()].append((event.start_ns, event.start_ns + event.duration_ns))
    sent, hidden = sum(end - start for start, end in spans[True]), 0.0
    for start, end in spans[True]:
        hidden += sum(max(0, min(end, other[1]) - max(start, other[0])) for other in union(spans[False]))
    return sent / steps / 1e6, hidden / max(sent, 1)


def union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same times in spans that do not overlap."""
    joined: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return joined


def peers(counts: list[int], steps: int) -> list[tuple[str, int, dict[str, Any]]]:
    """PyTorch's results for the batches of `layouts`; the rates are of all devices."""
    found = []
    for n in counts:
        for name, batch, accum in [("data", 32, 2)] + [("fixed", 64 // n, 1)] * (n > 1):
            flags = f"--device=cuda --batch={batch} --accum={accum} --dtype=bfloat16 --steps={steps} --devices={n}"
            result = run("torch_llama", flags.split())
            found.append((name, n, result | {"rate": n * result["rate"]}))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of a measurement")
    args = parser.parse_args()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # leaves memory for PyTorch
    device = backend.start("auto")
    here = len(jax.devices())
    counts = [n for n in (1, 2, 4, 8) if n <= here]
    programs = [Program(layout, device) for layout in layouts(counts)]
    print(f"{here} x {backend.describe(device)}, jax {jax.__version__}, tokens/s of all devices")
    for program in programs:
        program.train(3)
    for _ in range(args.rounds):
        for program in programs:
            program.rates.append(program.train(args.steps))
    print(
        "| program | layout | devices | tokens/s | ratio | quartiles | state, MB | step, MB | sends | hidden | loss |"
    )
    print("|---" * 11 + "|")
    for program in programs:
        to_one = sorted(ratios(program.rates, programs[0].rates))
        state, temporaries = program.megabytes()
        sent, hidden = sends(program) if program.mesh else (0.0, 0.0)
        loss = "" if program.loss is None else f"{program.loss:.4f}"
        print(
            f"| jaxlm | {program.layout.name} | {program.layout.devices} | {median(program.rates):,.0f} |"
            f" **{median(to_one):.2f}** | {to_one[len(to_one) // 4]:.2f} to {to_one[-1 - len(to_one) // 4]:.2f} |"
            f" {state:,.0f} | {temporaries:,.0f} | {sent:.2f} | {hidden:.0%} | {loss} |",
            flush=True,
        )
    results = peers(counts, args.steps)
    for name, n, result in results:
        ratio = result["rate"] / results[0][2]["rate"]
        print(f"| {result['name']} | {name} | {n} | {result['rate']:,.0f} | **{ratio:.2f}** | | | | | | |", flush=True)


if __name__ == "__main__":
    with no_child_left():
        main()
