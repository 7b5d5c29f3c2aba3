"""Measures the memory of a run of the 60M preset on a CPU, while it trains and while it also saves. Linux only.

    python -m experiments.save_memory [--saves 5]

Trains on the novels with one sequence in a micro-batch, as each of the preset's chunks has, and saves every third step.
It prints the peak of the resident set over the steps before the first save, then over each save and the steps beside
it, and what the plan of this run says.
"""

import argparse
import contextlib
import sys
from pathlib import Path

import jax

from experiments.cleanup import temporary_folder
from jaxlm.cli import read_config
from jaxlm.device import backend
from jaxlm.main import open_data
from jaxlm.planner.memory import known_memory
from jaxlm.prepare import prepare
from jaxlm.run.events import Event, PauseStartEvent, SavedEvent, StepEvent
from jaxlm.run.memory import Memory
from jaxlm.run.trainer import Trainer

SETTINGS = ("batch_size=1", "microbatch_chunks=1", "save_interval=3", "eval_interval=1000", "generation_interval=1000")


class MeasuredTrainer(Trainer):
    """A trainer that keeps the peaks of the resident set, in GB: of its steps before a save, and of each save."""

    steps_peak = 0.0
    save_peaks: tuple[float, ...] = ()

    def _emit(self, event: Event) -> None:
        match event:
            case StepEvent(step=1):  # compilation has ended
                forget_peak()
            case PauseStartEvent("checkpoint"):
                self.steps_peak = self.steps_peak or peak()
                forget_peak()
            case SavedEvent():
                self.save_peaks += (peak(),)
        super()._emit(event)


def peak() -> float:
    """GB of the peak of the resident set."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e9


def forget_peak() -> None:
    """Starts a new peak."""
    Path("/proc/self/clear_refs").write_text("5")


def train(folder: Path, saves: int) -> tuple[MeasuredTrainer, Memory]:
    """A run of so many saves, and its plan."""
    flags = [f"--config.{setting}" for setting in SETTINGS]
    flags += ["--config.data.corpus=novels", f"--config.data.dir={folder / 'tokens'}", "--config.platform=cpu"]
    config, _ = read_config(["--config=configs/m2_60m.py", *flags])
    prepare(config.data.corpus, Path(config.data.dir), config.model.vocab_size, config.data.val_fraction)
    tokens, device = open_data(config), backend.start(config.platform)
    config = backend.resolve_run(config, device)
    plans: list[Memory] = []

    def plan(compiled: jax.stages.Compiled, step: int) -> str:
        plans.append(known_memory(config, device, None, compiled))
        return ""

    with contextlib.closing(MeasuredTrainer(config, folder, tokens, device, plan)) as run:
        run.run_steps(saves * config.save_interval + 2)
    return run, plans[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--saves", type=int, default=5)
    saves = parser.parse_args().saves
    with temporary_folder("save-memory") as folder, contextlib.redirect_stdout(sys.stderr):
        run, plan = train(folder, saves)
    print("| | peak, GB | beside the step |\n|---|---|---|")
    print(f"| steps | {run.steps_peak:.2f} | |")
    for number, save_peak in enumerate(run.save_peaks, 1):
        print(f"| save {number} | {save_peak:.2f} | +{save_peak - run.steps_peak:.2f} |")
    print(f"| the plan | {plan.total / 1e9:.2f} | +{plan.checkpoint_copy / 1e9:.2f} |")


if __name__ == "__main__":
    main()
