"""Measures the memory and the processor's time that saves of the 60M preset take, beside its training state.

    python -m experiments.save_memory [--saves 5]

Saves a state of random numbers several times in one process, each time after the last has ended. It prints the resident
set before the first save and at the peak of each, and each save's bytes and seconds of the processor. Linux only.
"""

import argparse
import resource
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.cleanup import temporary_folder
from jaxlm.config import Config, to_dict
from jaxlm.core.train_step import init_state
from jaxlm.device import backend
from jaxlm.run.checkpoint import Checkpoints
from jaxlm.run.workdir import CHECKPOINTS


def random_like(rng: np.random.Generator, leaf: jax.Array) -> jax.Array:
    """Incompressible numbers in place of large float32 arrays."""
    is_large = leaf.dtype == np.float32 and leaf.size > 1000
    return jnp.asarray(rng.standard_normal(leaf.shape, np.float32)) if is_large else leaf


def resident(name: str) -> float:
    """GB of the resident set (VmRSS) or of its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--saves", type=int, default=5)
    args = parser.parse_args()
    backend.start("cpu")
    config = Config()
    state = jax.tree.map(partial(random_like, np.random.default_rng(0)), init_state(config))
    meta = {"config": to_dict(config), "tokens": {}, "seconds": 0}
    with temporary_folder("save-memory") as folder:
        checkpoints, before = Checkpoints(folder, 1), resident("VmRSS")
        print(f"{before:.2f} GB before\n\n| save | peak, GB | more than before | MB | seconds |\n|---|---|---|---|---|")
        for number in range(1, args.saves + 1):
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
            start = resource.getrusage(resource.RUSAGE_SELF)
            checkpoints.save(config.save_interval * number, state, meta)
            checkpoints.wait()
            end, peak = resource.getrusage(resource.RUSAGE_SELF), resident("VmHWM")
            seconds = end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime
            path = folder / CHECKPOINTS / str(config.save_interval * number)
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            print(f"| {number} | {peak:.2f} | {peak - before:.2f} | {size / 1e6:.0f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
