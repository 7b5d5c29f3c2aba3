"""Work directories made by hand, for the tests of the page."""

import json
import math
from pathlib import Path

from jaxlm.config import Config, OptimizerConfig, SampleConfig, to_dict

HOSTILE = (
    "</script><script>alert(1)</script><!--",
    "a\0b\x1b[31m red\x07",
    "\u202eright\u202c \u200f \u0645\u0631\u062d\u0628\u0627",
    "x" * 10_000,
    "\u2028line\u2029",
    "\ud800 alone",
    "{{data}} {{title}} &amp; <img src=x onerror=alert(1)>",
)


def metrics(steps: int, every: int = 10) -> list[dict]:
    """Rows of metrics.jsonl: a step takes 2 s, an evaluation 5 s."""
    rows = []
    for step in range(1, steps + 1):
        seconds = 2.0 * step + 5.0 * ((step - 1) // every)
        row = {"step": step, "loss": 2 + 8 / math.sqrt(step), "lr": 1e-3, "grad_norm": 1.0 + step % 7}
        row |= {"tokens": step * 65_536, "tokens_per_second": 32_768.0, "seconds": seconds}
        if step % every == 0:
            row |= {"val_loss": row["loss"] + 0.1, "val_bits_per_byte": row["loss"] / 3}
        rows.append(row)
    return rows


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(workdir: Path, steps: int = 40, max_steps: int = 40, prompts: tuple = ("Once", "The king")) -> Path:
    """A run with samples at every tenth step, which one session trained."""
    workdir.mkdir(parents=True, exist_ok=True)
    optimizer = OptimizerConfig(warmup_steps=min(4, max_steps - 1))
    config = Config(max_steps=max_steps, optimizer=optimizer, sample=SampleConfig(prompts=prompts))
    (workdir / "config.json").write_text(json.dumps(to_dict(config)))
    write_rows(workdir / "metrics.jsonl", metrics(steps))
    samples = [
        {"step": step, "prompt": prompt, "text": f"{prompt} went home at {step} again"}
        for step in range(10, steps + 1, 10)
        for prompt in prompts
    ]
    write_rows(workdir / "samples.jsonl", samples)
    write_rows(workdir / "sessions.jsonl", [session(0)])
    return workdir


def session(step: int) -> dict:
    plan = {"step_seconds": 2.5, "total_seconds": 120.0}
    return {"step": step, "time": "2026-01-02T03:04:05+00:00", "device": "A device", "precision": "bf16", "plan": plan}


def write_hostile(workdir: Path) -> Path:
    """A crashed run: thousands of restarts, values that are not finite, damaged lines, and texts that attack a page."""
    write_run(workdir, steps=60, max_steps=100, prompts=tuple(text[:300] for text in HOSTILE))
    rows = metrics(60)
    for row in rows:
        row |= {"__proto__": row["step"], "constructor": 1, HOSTILE[0]: row["step"], "note": "text", "huge": 10**400}
    for row in rows[20:24]:
        row["loss"] = math.nan
    rows[29]["grad_norm"] = math.inf
    write_rows(workdir / "metrics.jsonl", rows)
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('garbage\n[1]\n{"step": "61"}\n{"step": 61, "lo')
    samples = [
        {"step": step, "prompt": text[:300], "text": f"{text} {step}"} for step in (10, 20, 30) for text in HOSTILE
    ]
    write_rows(workdir / "samples.jsonl", [*samples, {"step": 31, "prompt": 1}])
    odd = {"time": HOSTILE[0], "device": [HOSTILE[1]], "versions": {"a": HOSTILE[0]}, "plan": {"step_seconds": "2"}}
    write_rows(workdir / "sessions.jsonl", [odd | {"step": step % 60} for step in range(3000)])
    return workdir


def with_settings(workdir: Path, **changes) -> Path:
    settings = json.loads((workdir / "config.json").read_text()) | changes
    (workdir / "config.json").write_text(json.dumps(settings))
    return workdir
