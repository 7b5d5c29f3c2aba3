"""Measures how much sooner a config reaches the loss of a tuned AdamW in PyTorch: on one GPU, alternating.

    python -m experiments.time_to_loss --config configs/m2_60m_fast.py --steps 1067 1200 1371

The peer is `experiments/torch_llama.py`: the model of `configs/m2_60m.py` and its batch, with the tuned AdamW of
`experiments/learning/tables.py`, for `--peer-steps`. jaxlm trains the config, which `--config.NAME=VALUE` changes, for
each of `--steps`. Every run is a whole schedule. Both programs read the same token files in the same order, and the
whole validation file at the end. If jaxlm's vocabulary is its own, the peer reads GPT-2's tokens of the same text.

All runs are loaded and compiled first, each in its own process. Then they alternate: in each of `--rounds` rounds every
run trains the same part of its steps, while the others wait. The table shows seconds of training; compilation (with one
micro-batch) and evaluation (for jaxlm with its compilation) are measured apart. Compilation is faster where jax or
PyTorch have cached a program.

Each run is a JSON line in `--results`. A seed whose runs are all in that file is not run again.
"""

import argparse
import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np

from configs import m2_60m
from experiments.cleanup import no_child_left
from experiments.learning.tables import ADAMW_TUNED, adamw
from experiments.learning.trial import validation_loss
from experiments.rounds import median_and_range
from jaxlm.cli import read_config
from jaxlm.config import Config, DataConfig, from_config_dict
from jaxlm.data.token_files import TokenFiles, train_batch_stream
from jaxlm.errors import UsageError
from jaxlm.main import open_data

Row = dict[str, Any]


class Run(Protocol):
    """One training run. Each method returns when the device has finished."""

    name: str  # of the program, with its version
    device: str

    def compile(self) -> None:
        """Compiles the training step, and runs it once without an effect."""

    def train(self, steps: int) -> None:
        """Trains for so many optimizer steps."""

    def loss_sum(self, inputs: np.ndarray, targets: np.ndarray) -> float:
        """The loss of a validation batch, in nats."""


class JaxlmRun:
    """jaxlm's training step in a loop."""

    def __init__(self, config: Config, tokens: TokenFiles):
        import jax

        from jaxlm.core.train_step import init_state, make_eval_step
        from jaxlm.device import backend

        device = backend.start(config.platform, config.deterministic)
        self.name, self.device = f"jaxlm, jax {jax.__version__}", backend.describe(device)
        self.config = c = backend.resolve_run(config, device)
        self.state = init_state(c)
        self._batches = train_batch_stream(tokens.train, c.model.context, c.batch_size, c.seed)
        self._eval_step = make_eval_step(c)

    def compile(self) -> None:
        import jax
        import jax.numpy as jnp

        from jaxlm.core.train_step import make_train_step

        ids = jnp.zeros((self.config.batch_size, self.config.model.context + 1), jnp.int32)
        self._step = make_train_step(self.config).lower(self.state, ids).compile()
        jax.block_until_ready(self._step(jax.tree.map(jnp.copy, self.state), ids))

    def train(self, steps: int) -> None:
        import jax

        for _ in range(steps * self.config.grad_accum_steps):
            self.state, _ = self._step(self.state, jax.device_put(next(self._batches)))
        jax.block_until_ready(self.state)

    def loss_sum(self, inputs: np.ndarray, targets: np.ndarray) -> float:
        if self.state.step != self.config.max_steps:
            raise RuntimeError(f"{self.state.step} of {self.config.max_steps} steps: some gradients were not finite")
        return float(self._eval_step(self._weights, inputs, targets))

    @functools.cached_property
    def _weights(self) -> Any:
        """What is evaluated, after the last step."""
        return self.state.weights


class TorchRun:
    """The peer."""

    def __init__(self, config: Config, tokens: TokenFiles):
        import torch

        from experiments.torch_llama import Peer

        on_gpu = torch.cuda.is_available()
        self.name = f"PyTorch {torch.__version__}"
        self.device = torch.cuda.get_device_name() if on_gpu else f"CPU ({os.cpu_count()} cores)"
        self.peer = Peer(config, "cuda" if on_gpu else "cpu")
        stream = train_batch_stream(tokens.train, config.model.context, config.batch_size, config.seed)
        self._batches = map(self.peer.to_device, stream)
        self.compile, self.loss_sum = self.peer.compile, self.peer.loss_sum

    def train(self, steps: int) -> None:
        self.peer.train(self._batches, steps)


def parts(steps: int, rounds: int) -> list[int]:
    """The steps of each round; they differ by one at most."""
    return [after - before for before, after in pairwise(steps * part // rounds for part in range(rounds + 1))]


def measure(make_run: Callable[[Config, TokenFiles], Run], config: Config, rounds: int) -> Iterator[Row]:
    """Trains a whole schedule. Yields a row when the run is loaded, compiled, after each round and evaluated."""
    tokens, c = open_data(config), config
    run = make_run(c, tokens)
    yield {"program": run.name, "device": run.device, "steps": c.max_steps, "seed": c.seed}
    start = time.perf_counter()
    run.compile()
    yield {"compile_seconds": time.perf_counter() - start}
    for steps in parts(c.max_steps, rounds):
        start = time.perf_counter()
        run.train(steps)
        yield {"part_seconds": [time.perf_counter() - start]}
    start = time.perf_counter()
    loss, bits = validation_loss(run.loss_sum, c, tokens)
    yield {"eval_seconds": time.perf_counter() - start, "val_loss": loss, "val_bits_per_byte": bits}


def in_process(function: Callable[..., Iterable[Any]], *arguments: Any) -> Iterator[Any]:
    """Iterates over `function(*arguments)` in a new process, which works only while an item is awaited.

    Raises RuntimeError if the process fails.
    """
    context = get_context("spawn")
    connection, other_end = context.Pipe()
    process = context.Process(target=_serve, args=(other_end, function, arguments), daemon=True)
    process.start()
    other_end.close()
    try:
        while True:
            connection.send("next")
            yield connection.recv()
    except (EOFError, OSError):
        process.join()
    if process.exitcode:
        raise RuntimeError(f"{function.__name__} failed in its process")


def _serve(connection: Any, function: Callable[..., Iterable[Any]], arguments: tuple[Any, ...]) -> None:
    items = iter(function(*arguments))
    while connection.recv():
        try:
            connection.send(next(items))
        except StopIteration:
            return


def alternate(runs: list[Iterator[Row]]) -> list[Row]:
    """Takes the rows of each run in turn and merges those of each; lists are joined."""
    merged: list[Row] = [{} for _ in runs]
    for rows in zip(*runs, strict=True):
        for run, row in zip(merged, rows, strict=True):
            run |= {
                name: run.get(name, []) + value if isinstance(value, list) else value for name, value in row.items()
            }
        print(json.dumps(rows), file=sys.stderr, flush=True)
    return merged


def compare(peer: Config, ours: list[Config], rounds: int, results: Path) -> list[Row]:
    """The rows of the peer and of each of ours, from `results` if they are all there; otherwise measured and added."""
    tokens = [list(open_data(config).sha256) for config in (peer, ours[0])]  # prepared before anything is timed
    configs = [peer, *ours]
    key = json.dumps([rounds, tokens, [asdict(config) for config in configs]])
    comparison = hashlib.sha256(key.encode()).hexdigest()[:16]
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    rows = [row for row in map(json.loads, lines) if row["comparison"] == comparison]
    if len(rows) == len(configs):
        return rows
    programs = [TorchRun, *[JaxlmRun] * len(ours)]
    runs = [in_process(measure, program, c, rounds) for program, c in zip(programs, configs, strict=True)]
    rows = [
        {"comparison": comparison, **row, "config": asdict(config)}
        for row, config in zip(alternate(runs), configs, strict=True)
    ]
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a", encoding="utf-8") as file:
        file.write("".join(f"{json.dumps(row)}\n" for row in rows))
    return rows


def seconds(run: Row) -> float:
    """Seconds of training."""
    return sum(run["part_seconds"])


def step_seconds(run: Row) -> list[float]:
    """Seconds of a step in each round."""
    taken = run["part_seconds"]
    return [part / steps for part, steps in zip(taken, parts(run["steps"], len(taken)), strict=True)]


def token_count(run: Row) -> int:
    """Tokens of a whole schedule."""
    c = run["config"]
    return c["max_steps"] * c["batch_size"] * c["grad_accum_steps"] * c["model"]["context"]


def time_ratios(run: Row, peer: Row) -> list[float]:
    """For each round, the time of the peer's schedule at the speed of that round by the time of the run's."""
    pairs = zip(step_seconds(peer), step_seconds(run), strict=True)
    return [theirs * peer["steps"] / (ours * run["steps"]) for theirs, ours in pairs]


def compiled_ratio(run: Row, peer: Row) -> list[float]:
    """The time of the peer's training and compilation by that of the run's."""
    theirs, ours = (seconds(row) + row["compile_seconds"] for row in (peer, run))
    return [theirs / ours]


COLUMNS: dict[str, tuple[str, Callable[[Row, Row], list[float]]]] = {  # of a run beside its peer; values for a median
    "steps": ("{:,.0f}", lambda run, peer: [run["steps"]]),
    "val loss": ("{:.4f}", lambda run, peer: [run["val_loss"]]),
    "bits per byte": ("{:.4f}", lambda run, peer: [run["val_bits_per_byte"]]),
    "ms per step": ("{:.2f}", lambda run, peer: [1e3 * step for step in step_seconds(run)]),
    "training, s": ("{:.1f}", lambda run, peer: [seconds(run)]),
    "compilation, s": ("{:.1f}", lambda run, peer: [run["compile_seconds"]]),
    "evaluation, s": ("{:.1f}", lambda run, peer: [run["eval_seconds"]]),
    "tokens, ratio": ("{:.2f}", lambda run, peer: [token_count(peer) / token_count(run)]),
    "time, ratio": ("{:.2f}", time_ratios),
    "time with compilation, ratio": ("{:.2f}", compiled_ratio),
}


def report(comparisons: list[list[Row]]) -> str:
    """The table, and the shortest of jaxlm's schedules whose bits per byte are at most the peer's.

    Args:
        comparisons: for each seed the rows of the peer and of jaxlm's schedules, from the shortest on.
    """
    peers = [comparison[0] for comparison in comparisons]
    lines = [
        f"{peers[0]['device']}; medians of seeds {', '.join(str(peer['seed']) for peer in peers)} and of"
        f" {len(peers[0]['part_seconds'])} rounds [the least and the greatest]",
        f"| | {' | '.join(COLUMNS)} |",
        f"|---|{'---|' * len(COLUMNS)}",
    ]
    reached = "No schedule of jaxlm reached the loss of the peer."
    for schedule in reversed(list(zip(*comparisons, strict=True))):
        pairs = list(zip(schedule, peers, strict=True))
        cells = {
            head: median_and_range([value for pair in pairs for value in values(*pair)], form)
            for head, (form, values) in COLUMNS.items()
        }
        lines.insert(3, f"| {schedule[0]['program']} | {' | '.join(cells.values())} |")
        if schedule[0] is not peers[0] and _bits_per_byte(schedule) <= _bits_per_byte(peers):
            reached = (
                f"jaxlm reached the loss of the peer in {cells['steps']} steps. Ratio of tokens:"
                f" {cells['tokens, ratio']}, of time: {cells['time, ratio']}, of time with compilation:"
                f" {cells['time with compilation, ratio']}."
            )
    return "\n".join([*lines, reached])


def _bits_per_byte(runs: Iterable[Row]) -> float:
    return median(run["val_bits_per_byte"] for run in runs)


def peer_data(config: Config) -> DataConfig:
    """The text of `config` in GPT-2's tokens, which the peer reads."""
    data = config.data
    return data if data.tokenizer == "gpt2" else replace(data, tokenizer="gpt2", dir="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", default="configs/m2_60m_fast.py", help="what jaxlm trains")
    parser.add_argument("--steps", type=int, nargs="+", default=[1371], help="schedules of jaxlm")
    parser.add_argument("--peer-steps", type=int, default=1200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--results", type=Path, default=Path("runs/time_to_loss.jsonl"))
    args, overrides = parser.parse_known_args()
    if not 1 <= args.rounds <= min(*args.steps, args.peer_steps):
        parser.error("--rounds must be at least 1 and at most the steps of each run")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share the GPU
    try:
        config, _ = read_config([f"--config={args.config}", *overrides])
        settings = m2_60m.get_config()
        settings.update_from_flattened_dict(adamw(args.peer_steps, **ADAMW_TUNED))
        peer = replace(from_config_dict(settings), data=peer_data(config))
        comparisons = [
            compare(
                replace(peer, seed=seed),
                [replace(config, seed=seed, max_steps=steps) for steps in sorted(args.steps)],
                args.rounds,
                args.results,
            )
            for seed in args.seeds
        ]
    except UsageError as error:
        sys.exit(f"error: {error}")
    print(report(comparisons))


if __name__ == "__main__":
    with no_child_left():
        main()
