"""Compares training speed and memory of the 60M preset with PyTorch (`experiments/torch_llama.py`).

    python -m experiments.throughput --device cuda
    python -m experiments.throughput --device cuda --microbatch-chunks 8
    python -m experiments.throughput --device cpu
    python -m experiments.throughput --device cpu --dtype bfloat16
    python -m experiments.throughput --device cpu --remat

Both train the same model on random tokens, jaxlm without the preset's `model.remat` unless `--remat` asks for it. They
alternate for `--rounds` rounds, each run in a process of its own. The table shows medians, with the least and the
greatest of the rounds in brackets; ratios are of runs of one round. bfloat16 means autocast in PyTorch and `bf16` in
jaxlm, on a CPU `bf16_matmul`. Memory is the peak of the allocator on a GPU and of the resident set on a CPU.

Utilisation is relative to the speed of one large matmul, which is measured too. Forward and backward, a token takes
6 P + 6 L T D floating-point operations. P counts the numbers in matrices, with the tied embedding once, for the head;
each is multiplied and added three times. Attention has two matmuls of T / 2 positions by D in each of L layers.
Recomputation is not counted.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from experiments.cleanup import no_child_left
from experiments.rounds import median_and_range, ratios

ROOT = Path(__file__).parent.parent


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Trains jaxlm in this process."""
    import jax
    import numpy as np

    from configs import m2_60m
    from jaxlm.config import from_config_dict
    from jaxlm.core.model import parameter_count
    from jaxlm.core.train_step import init_state, make_train_step
    from jaxlm.device import backend

    device = backend.start(args.device)
    config = from_config_dict(m2_60m.get_config())
    on_cpu = args.device == "cpu"
    precision = {"float32": "float32", "bfloat16": "bf16_matmul" if on_cpu else "bf16"}[args.dtype]
    model = replace(config.model, precision=precision, remat=args.remat)
    config = replace(
        config,
        batch_size=args.batch,
        grad_accum_steps=args.accum,
        microbatch_chunks=args.microbatch_chunks,
        model=model,
    )
    config = backend.resolve_run(config, device)
    model = config.model
    rng = np.random.default_rng(0)
    batches = jax.device_put(rng.integers(model.vocab_size, size=(4, args.batch, model.context + 1), dtype=np.int32))
    batches = [batches[i] for i in range(4)]
    shapes = jax.eval_shape(lambda: init_state(config)), batches[0]
    step = make_train_step(config).lower(*shapes).compile()
    state = init_state(config)
    backend.keep_freed_memory(device, step.memory_analysis().temp_size_in_bytes)

    def train(state, steps):
        for micro_step in range(steps * args.accum):
            state, metrics = step(state, batches[micro_step % 4])
        metrics.loss.block_until_ready()
        return state

    state = train(state, 2)
    timings = []
    for _ in range(3):
        began = time.perf_counter()
        state = train(state, args.steps)
        timings.append((time.perf_counter() - began) / (args.steps * args.accum))
    if on_cpu:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    else:
        peak = device.memory_stats()["peak_bytes_in_use"]
    seconds = median(timings)
    matrix_size = parameter_count(state.params) - (2 * model.layers + 1) * model.width  # all but the norms
    flops = 6 * matrix_size + 6 * model.layers * model.context * model.width
    rate = args.batch * model.context / seconds
    return {
        "name": f"jaxlm, jax {jax.__version__}",
        "device": backend.describe(device),
        "rate": rate,
        "ms": seconds * 1e3,
        "mb": peak / 1e6,
        "utilisation": rate * flops / _matmul_speed(args.dtype, 2048 if on_cpu else 8192),
    }


def _matmul_speed(dtype: str, size: int) -> float:
    """Floating-point operations per second of a matmul of two square matrices."""
    import jax
    import jax.numpy as jnp

    a = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    output_dtype = "float32" if jax.default_backend() == "cpu" else dtype  # the faster one on each
    matmul = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=output_dtype))
    matmul(a, a).block_until_ready()
    timings = []
    for _ in range(10):
        start = time.perf_counter()
        matmul(a, a).block_until_ready()
        timings.append(time.perf_counter() - start)
    return 2 * size**3 / median(timings)


def run(module: str, flags: list[str]) -> dict[str, Any]:
    """Runs a program of this folder; returns the JSON object on the last line that it prints."""
    command = [sys.executable, "-m", f"experiments.{module}", *flags]
    process = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on cuda, float32 on cpu")
    parser.add_argument("--batch", type=int, help="sequences of a micro-batch; default: 32 on cuda, 2 on cpu")
    parser.add_argument("--accum", type=int, help="micro-batches of an optimizer step; default: 2 on cuda, 1 on cpu")
    parser.add_argument(
        "--microbatch-chunks", type=int, default=0, help="of jaxlm: chunks of a micro-batch; 0: as memory allows"
    )
    parser.add_argument(
        "--remat",
        action=argparse.BooleanOptionalAction,
        help="of jaxlm: recompute each block (on a GPU only with --microbatch-chunks); default: if memory is short",
    )
    parser.add_argument("--steps", type=int, help="optimizer steps of a measurement; default: 20 on cuda, 3 on cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only-ours", action="store_true", help="one run of jaxlm, in this process")
    args = parser.parse_args()
    defaults = {"cuda": ("bfloat16", 32, 2, 20), "cpu": ("float32", 2, 1, 3)}[args.device]
    for name, default in zip(("dtype", "batch", "accum", "steps"), defaults, strict=True):
        setattr(args, name, getattr(args, name) or default)
    if args.only_ours:
        print(json.dumps(measure(args)))
        return

    shared = [f"--{name}={getattr(args, name)}" for name in ("device", "dtype", "batch", "accum", "steps")]
    own = ["--only-ours", f"--microbatch-chunks={args.microbatch_chunks}"]
    own += {None: [], True: ["--remat"], False: ["--no-remat"]}[args.remat]
    ours, peers = [], []
    for _ in range(args.rounds):
        ours.append(run("throughput", shared + own))
        peers.append(run("torch_llama", shared))
    print(f"{ours[0]['device']}, {args.dtype}, {args.batch} x 1024 tokens per micro-batch, {args.accum} per step")
    print("| | ms per micro-batch | tokens/s | peak MB |\n|---|---|---|---|")
    forms = {"ms": "{:.2f}", "rate": "{:,.0f}", "mb": "{:,.0f}"}
    for runs in (ours, peers):
        cells = [median_and_range([run[key] for run in runs], form) for key, form in forms.items()]
        print(f"| {runs[0]['name']} | {' | '.join(cells)} |")
    columns = [ratios([run[key] for run in ours], [run[key] for run in peers]) for key in forms]
    print(f"| ratio | {' | '.join(median_and_range(column, '{:.3f}') for column in columns)} |")
    utilisation = median_and_range([run["utilisation"] for run in ours], "{:.0%}")
    print(f"utilisation {utilisation} of the speed of one large matmul")


if __name__ == "__main__":
    with no_child_left():
        main()
