"""Measures what the page of a long run costs: time, memory and size.

    python -m experiments.report_cost --steps 50000

The run is made up: rows and samples as those of configs/m2_60m.py, in two sessions.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from experiments.cleanup import temporary_folder
from jaxlm.config import Config, to_dict

WORDS = "the a king old dog ran said and went home little girl happy tree sun bird big very once day play"


def write_run(workdir: Path, steps: int) -> None:
    """Writes the records of a run of so many steps."""
    config, rng, seconds = Config(max_steps=steps), np.random.default_rng(0), 0.0
    (workdir / "config.json").write_text(json.dumps(to_dict(config)))
    (workdir / "sessions.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in (0, steps // 2)))
    with (workdir / "metrics.jsonl").open("w") as metrics, (workdir / "samples.jsonl").open("w") as samples:
        for step in range(1, steps + 1):
            speed, loss = 3000 + 100 * rng.normal(), 2 + 8 / math.sqrt(step) + 0.05 * rng.normal()
            seconds += config.tokens_per_step / speed + 5 * (step % 100 == 1)
            row = {"step": step, "loss": loss, "lr": 3e-4 * rng.random(), "grad_norm": rng.random()}
            row |= {"tokens": step * config.tokens_per_step, "tokens_per_second": speed, "seconds": round(seconds, 3)}
            row |= {f"update_ratio_{kind}": rng.random() for kind in ("matrix", "embedding", "norm_scale")}
            if step % config.eval_interval == 0:
                row |= {"val_loss": loss + 0.1, "val_bits_per_byte": loss / 3}
            metrics.write(json.dumps(row) + "\n")
            if step % config.generation_interval == 0:
                for prompt in rng.choice(config.sample.prompts, config.sample.texts, replace=False):
                    text = f"{prompt} {' '.join(rng.choice(WORDS.split(), config.sample.tokens))}"
                    samples.write(json.dumps({"step": step, "prompt": prompt, "text": text}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures what the page of a long run costs.")
    parser.add_argument("--steps", type=int, default=50_000, help="of the run (%(default)s)")
    args = parser.parse_args()
    with temporary_folder("report-cost") as folder:
        write_run(folder, args.steps)
        start = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "jaxlm.report", "--workdir", str(folder)], check=True, stdout=subprocess.DEVNULL
        )
        seconds, size = time.monotonic() - start, (folder / "report.html").stat().st_size
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    memory = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(
        f"{args.steps:,} steps: {seconds:.1f} s, of which {usage.ru_utime + usage.ru_stime:.1f} s of a core,"
        f" {memory / 1e6:.0f} MB of memory, a page of {size / 1e6:.2f} MB"
    )


if __name__ == "__main__":
    main()
