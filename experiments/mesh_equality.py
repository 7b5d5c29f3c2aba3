"""Trains a small model on one device and on meshes of up to eight, and prints how far the losses are apart.

    python -m experiments.mesh_equality [--steps 20]

The devices are virtual ones of this CPU. All layouts read the same batches of random tokens, in float32: 32 sequences
of 64 tokens a step, in two micro-batches of two chunks each. They may differ by the order of their sums only.
"""

import argparse
import os
from dataclasses import replace

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax
import numpy as np

from jaxlm.config import Config, MeshConfig, ModelConfig, OptimizerConfig
from jaxlm.core.train_step import init_state, make_train_step
from jaxlm.device.backend import resolve_run
from jaxlm.device.mesh import batch_sharding, make_mesh, place_rows

SIZES = {"vocab_size": 1024, "context": 64, "layers": 2, "heads": 2, "width": 64, "mlp_width": 192}
CONFIG = Config(
    batch_size=16,
    grad_accum_steps=2,
    microbatch_chunks=2,
    model=ModelConfig(**SIZES, precision="float32", remat=True),
    optimizer=OptimizerConfig(warmup_steps=2, learning_rate=1e-2, average=0.9),
)
LAYOUTS = [(data, fsdp) for devices in (1, 2, 4, 8) for fsdp in (1, 2, 4, 8) if (data := devices // fsdp)]


def train(layout: tuple[int, int], steps: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """The loss and the gradient norm of each step [steps, 2], and the weights after the last."""
    device = jax.devices()[0]
    config = resolve_run(replace(CONFIG, max_steps=steps, mesh=MeshConfig(*layout)), device)
    mesh, rng, reports = make_mesh(config, device), np.random.default_rng(0), []
    state, step = init_state(config, mesh), make_train_step(config, mesh)
    for _ in range(steps * config.grad_accum_steps):
        ids_BT = rng.integers(SIZES["vocab_size"], size=(config.batch_size, SIZES["context"] + 1), dtype=np.int32)
        state, metrics = step(state, place_rows(ids_BT, batch_sharding(mesh, device)))
        if metrics.updated:
            reports.append((float(metrics.loss), float(metrics.grad_norm)))
    return np.array(reports), jax.device_get(jax.tree.leaves(state.weights))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {args.steps} steps")
    print("| devices | data | fsdp | last loss | losses | gradient norms | weights |\n|---|---|---|---|---|---|---|")
    for data, fsdp in LAYOUTS:
        reports, weights = train((data, fsdp), args.steps)
        if (data, fsdp) == (1, 1):
            expected, expected_weights = reports, weights
        losses, norms = np.abs(reports / expected - 1).max(axis=0)
        apart = max(np.abs(a - b).max() for a, b in zip(weights, expected_weights, strict=True))
        last = reports[-1, 0]
        print(
            f"| {data * fsdp} | {data} | {fsdp} | {last:.6f} | {losses:.1e} | {norms:.1e} | {apart:.1e} |", flush=True
        )


if __name__ == "__main__":
    main()
