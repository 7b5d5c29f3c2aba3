"""Settings of jax in the environment do not change what is computed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxlm.device import backend
from tests import tiny_run

# each setting of jax with a value that changes or stops what is computed
ODD = {
    "JAX_ENABLE_X64": "1",
    "JAX_THREEFRY_PARTITIONABLE": "0",
    "JAX_DEFAULT_PRNG_IMPL": "rbg",
    "JAX_ENABLE_CUSTOM_PRNG": "1",
    "JAX_LEGACY_PRNG_KEY": "error",
    "JAX_RANDOM_SEED_OFFSET": "7",
    "JAX_HIGH_DYNAMIC_RANGE_GUMBEL": "1",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_EXPLICIT_X64_DTYPES": "error",
    "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16",
    "JAX_ALLOW_F16_REDUCTIONS": "0",
    "JAX_DISABLE_JIT": "1",
    "JAX_DEBUG_NANS": "1",
    "JAX_DEBUG_INFS": "1",
    "JAX_TRANSFER_GUARD": "disallow",
    "JAX_PLATFORM_NAME": "cuda",
}
PROGRAM = """
import contextlib, sys
from jaxlm import export, main, plan, sample

flags = ["--config", "tiny.py", "--config.data.dir=", "--config.max_steps=3", "--config.generation_interval=3"]
with contextlib.redirect_stdout(sys.stderr):
    main.main([*flags, "--workdir", "run"])
    export.main(["--workdir", "run", "--out", "exported"])
sample.main(["--workdir", "run", "--prompt", "A king", "--tokens", "5"])
plan.main([*flags, "--json", "--no-measure"])
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with tiny_run.workplace(tmp_path_factory) as place:
        yield place


def run_commands(folder: Path, place: Path, **settings: str) -> tuple[list, bytes, str]:
    """What the commands print and write in a process of their own."""
    folder.mkdir()
    for name in ("tiny.py", "text.txt"):
        (folder / name).symlink_to(place / name)
    environment = {k: v for k, v in os.environ.items() if k not in ODD} | settings
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    samples = [json.loads(line)["text"] for line in (folder / "run/samples.jsonl").read_text().splitlines()]
    text, _ = done.stdout.split('"memory"')  # of the sample, then what the plan says of the model
    numbers = [[row["loss"], row["grad_norm"]] for row in rows] + samples + [text]
    return numbers, (folder / "exported/model.safetensors").read_bytes(), done.stderr


@pytest.mark.slow
def test_every_command_computes_the_same_whatever_the_environment_says(tmp_path, place):
    expected, expected_model, silent = run_commands(tmp_path / "plain", place)
    numbers, model, said = run_commands(tmp_path / "odd", place, **ODD)
    assert numbers == expected
    assert model == expected_model
    here = {name for name in ODD if hasattr(jax.config, name.lower())} | {"JAX_PLATFORM_NAME"}
    assert {line.split()[0] for line in said.splitlines() if "is ignored" in line} == here
    assert "ignored" not in silent


def test_every_setting_is_tried():
    assert {name.lower() for name in ODD} == {*backend._SETTINGS, "jax_platform_name"}
