"""How the time of a step grows with the devices, on paper: python -m experiments.scaling [--config m2_60m] [--fsdp 1]

The time of a step is that of its arithmetic and, after it, of its communication: nothing overlaps. The optimizer's
part of the arithmetic, a few percent, is divided too, though each device of the data axis computes all of it. The
assumptions are flags: tokens/s of one device (which a run prints), bytes/s in one direction of a device's link within
a machine and of its share of the network, and the delay of one message.

Each device computes its rows of a micro-batch. Once a step, the float32 gradients are summed over the data axis in
rings: within a machine, then between machines, each device for its part. Over the fsdp axis, each micro-batch gathers
the parameters twice in the dtype of the matmuls, and sums and splits their gradients in float32. Two tables go to
stdout: the same batch on each device, and the same batch in all.
"""

import argparse
from dataclasses import dataclass

from jaxlm.cli import find_config, read_config
from jaxlm.config import Config
from jaxlm.planner.estimate import parameters_by_part

DEVICES = tuple(2**n for n in range(11))


@dataclass(frozen=True)
class Machine:
    """What one device can do, and how the devices are connected."""

    tokens_per_second: float
    link: float  # bytes/s within a machine
    network: float  # bytes/s between machines, a device
    delay: float  # seconds of a message
    devices: int  # in a machine


def ring_seconds(devices: int, bytes_each: float, bandwidth: float, delay: float) -> float:
    """Of a sum over a ring that every device gets: each sends (devices - 1) / devices of its bytes twice."""
    return 2 * (devices - 1) * (bytes_each / devices / bandwidth + delay)


def communication_seconds(config: Config, machine: Machine, devices: int, fsdp: int) -> float:
    """Of one optimizer step."""
    parameters = sum(parameters_by_part(config.model).values())
    width = 2 if config.model.precision in ("auto", "bf16", "bf16_matmul") else 4  # bytes of a gathered parameter
    micro_batch = (fsdp - 1) * ((2 * width + 4) * parameters / fsdp / machine.link + 3 * machine.delay)
    part, replicas = 4 * parameters / fsdp, devices // fsdp  # bytes of a device's gradients, copies of the model
    inside = max(min(replicas, machine.devices // fsdp), 1)
    outside = replicas // inside
    data = ring_seconds(inside, part, machine.link, machine.delay)
    data += ring_seconds(outside, part / inside, machine.network, machine.delay)
    return config.grad_accum_steps * micro_batch + data


def table(config: Config, machine: Machine, fsdp: int, same_batch: bool) -> list[str]:
    """Rows for 1 to 1,024 devices; with `same_batch` all of them share the batch of the config."""
    lines = [
        "| devices | machines | tokens a step | arithmetic, ms | communication, ms | tokens/s | speed-up | of N |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for devices in (each for each in DEVICES if each >= fsdp):
        if same_batch and devices > config.batch_size:
            lines.append(f"| {devices:,} and more | the batch has {config.batch_size} sequences | | | | | | |")
            break
        tokens = config.tokens_per_step * (1 if same_batch else devices)
        arithmetic = tokens / devices / machine.tokens_per_second
        communication = communication_seconds(config, machine, devices, fsdp)
        speed = tokens / (arithmetic + communication)
        times = speed / machine.tokens_per_second
        lines.append(
            f"| {devices:,} | {-(-devices // machine.devices)} | {tokens:,} | {1e3 * arithmetic:.2f} |"
            f" {1e3 * communication:.2f} | {speed:,.0f} | {times:.2f} | {times / devices:.0%} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="m2_60m")
    parser.add_argument("--fsdp", type=int, default=1, help="devices that share a copy of the model, in one machine")
    parser.add_argument("--tokens-per-second", type=float, default=1_111_599, help="of one device (an H100)")
    parser.add_argument("--link", type=float, default=300, help="GB/s within a machine (of NVLink's 450)")
    parser.add_argument("--network", type=float, default=40, help="GB/s a device between machines (of 400 Gbit/s)")
    parser.add_argument("--delay", type=float, default=10, help="microseconds of a message")
    parser.add_argument("--machine", type=int, default=8, help="devices in a machine")
    args = parser.parse_args()
    config, _ = read_config([f"--config={find_config(args.config)}"])
    machine = Machine(args.tokens_per_second, args.link * 1e9, args.network * 1e9, args.delay * 1e-6, args.machine)
    print("The same batch on each device:\n", *table(config, machine, args.fsdp, False), sep="\n")
    print("\nThe same batch in all:\n", *table(config, machine, args.fsdp, True), sep="\n")


if __name__ == "__main__":
    main()
