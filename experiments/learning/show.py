"""Shows results of the study: a table in Markdown, and a plot of validation losses.

    python -m experiments.learning.show experiments/learning/results/adamw.jsonl
    python -m experiments.learning.show RESULTS... --plot docs/learning.svg --names "AdamW tuned" "recipe, N/3.5"

A row has the mean over the seeds of a recipe; the spread is the largest value less the smallest. The plot (which needs
matplotlib) draws the loss of the named recipes, or of all, against tokens, steps and seconds: of the first seed each.
A row that was recorded without a curve is not drawn.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

Rows = list[dict[str, Any]]


def by_name(files: Sequence[Path]) -> dict[str, Rows]:
    """The rows of each recipe, by seed, in the order of the files."""
    recipes: dict[str, Rows] = defaultdict(list)
    for file in files:
        for line in file.read_text().splitlines():
            row = json.loads(line)
            recipes[row["name"]].append(row)
    return {name: sorted(rows, key=lambda row: row["seed"]) for name, rows in recipes.items()}


def table(recipes: dict[str, Rows]) -> str:
    """A line for each recipe, the lowest loss in bits a byte first."""
    lines = [
        "| recipe | seeds | tokens (M) | steps | nats a token | spread | bits a byte | ms a step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in sorted(recipes.items(), key=lambda item: mean(row["val_bits_per_byte"] for row in item[1])):
        losses = [row["val_loss"] for row in rows]
        spread = f"{max(losses) - min(losses):.3f}" if len(losses) > 1 else ""
        bits, ms = mean(row["val_bits_per_byte"] for row in rows), median(row["step_ms"] for row in rows)
        lines.append(
            f"| {name} | {len(rows)} | {rows[0]['tokens'] / 1e6:.1f} | {rows[0]['steps']:,} | {mean(losses):.3f} |"
            f" {spread} | {bits:.3f} | {ms:.1f} |"
        )
    return "\n".join(lines)


def plot(recipes: dict[str, Rows], out: Path) -> None:
    """Draws the loss against tokens, steps and seconds of training."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "jaxlm"  # the same file from the same results
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 4), sharey=True, layout="constrained")
    for name, rows in recipes.items():
        curve, step_seconds = rows[0]["curve"], rows[0]["step_ms"] / 1e3
        losses = [point["val_loss"] for point in curve]
        steps = [point["step"] for point in curve]
        for axis, values in zip(
            axes,
            ([point["tokens"] / 1e6 for point in curve], steps, [step * step_seconds for step in steps]),
            strict=True,
        ):
            axis.plot(values, losses, label=name)
    for axis, label in zip(axes, ("tokens (millions)", "steps", f"seconds ({rows[0]['device']})"), strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    lowest = min(point["val_loss"] for rows in recipes.values() for point in rows[0]["curve"])
    axes[0].set_ylim(lowest - 0.05, lowest + 1.5)
    axes[0].set_ylabel("validation loss (nats a token)")
    axes[0].legend()
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, nargs="+", help="files of results")
    parser.add_argument("--names", nargs="+", help="recipes to show; default: all")
    parser.add_argument("--plot", type=Path, help="SVG file to draw")
    args = parser.parse_args()
    recipes = by_name(args.results)
    if unknown := set(args.names or ()).difference(recipes):
        parser.error(f"the results have no {', '.join(sorted(unknown))}")
    recipes = {name: recipes[name] for name in args.names or recipes}
    print(table(recipes))
    if args.plot:
        plot({name: rows for name, rows in recipes.items() if rows[0]["curve"]}, args.plot)


if __name__ == "__main__":
    main()
