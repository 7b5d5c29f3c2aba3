"""Draws the loss curve of a run as an SVG file, from its metrics.jsonl.

    python -m experiments.plot_loss runs/quickstart --out docs/quickstart_loss.svg

The line is the training loss of each step, the dots are the validation losses, both in nats per token.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

WIDTH, HEIGHT = 720, 320  # pixels
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 16, 44  # margins
TRAINING, VALIDATION = "#4c78a8", "#e45756"


def loss_curve(rows: Sequence[dict[str, float]]) -> str:
    """The SVG text for rows of metrics.jsonl, of which at least one has a `val_loss`."""
    last = int(rows[-1]["step"])
    evaluations = [row for row in rows if "val_loss" in row]
    losses = [row["loss"] for row in rows] + [row["val_loss"] for row in evaluations]
    low, high = math.floor(min(losses)), math.ceil(max(losses))

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(loss: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / (high - low)

    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for loss in range(low, high + 1):
        parts.append(f'<path d="M{LEFT} {y(loss):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 8, y(loss) + 4, str(loss), "end"))
    for step in _ticks(last):
        parts.append(_text(x(step), HEIGHT - BOTTOM + 18, f"{step:,}", "middle"))
    parts.append(_text(LEFT + (WIDTH - LEFT - RIGHT) / 2, HEIGHT - 8, "step", "middle"))
    parts.append(_text(LEFT + 6, TOP + 12, "loss, nats per token", "start"))

    points = " ".join(f"{x(row['step']):.1f},{y(row['loss']):.1f}" for row in rows)
    parts.append(f'<polyline points="{points}" fill="none" stroke="{TRAINING}"/>')
    for row in evaluations:
        parts.append(f'<circle cx="{x(row["step"]):.1f}" cy="{y(row["val_loss"]):.1f}" r="3.5" fill="{VALIDATION}"/>')

    final = evaluations[-1]
    parts.append(_text(WIDTH - RIGHT - 8, TOP + 20, "training", "end", TRAINING))
    label = f"validation, at the end {final['val_loss']:.3f} ({final['val_bits_per_byte']:.3f} bits per byte)"
    parts.append(_text(WIDTH - RIGHT - 8, TOP + 38, label, "end", VALIDATION))
    attributes = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif"'
    return "\n".join([f'<svg {attributes} font-size="12">', *parts, "</svg>\n"])


def _ticks(last: int) -> range:
    """About seven round step numbers from 0 to `last`."""
    power = 10 ** max(0, math.floor(math.log10(last / 7)))
    size = next(size for size in (power, 2 * power, 5 * power, 10 * power) if last / size <= 8)
    return range(0, last + 1, size)


def _text(x: float, y: float, text: str, anchor: str, color: str = "#333") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{text}</text>'


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws the loss curve of a run.")
    parser.add_argument("workdir", type=Path, help="the run's work directory")
    parser.add_argument("--out", type=Path, required=True, help="the SVG file")
    args = parser.parse_args()
    rows = [json.loads(line) for line in (args.workdir / "metrics.jsonl").read_text().splitlines()]
    args.out.write_text(loss_curve(rows))
    print(f"{args.out} shows {len(rows):,} steps")


if __name__ == "__main__":
    main()
