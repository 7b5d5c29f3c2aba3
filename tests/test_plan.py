"""The planning command, on a tiny run."""

import contextlib
import dataclasses
import json
import os
import re
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import m2_60m
from jaxlm import main, plan
from jaxlm.cli import read_config
from jaxlm.config import from_config_dict
from jaxlm.device import backend, numerics
from jaxlm.device.numerics import Part
from jaxlm.errors import RunError, UsageError
from jaxlm.planner import measure, memory, report, tables
from jaxlm.planner.measure import BenchmarkResult
from jaxlm.run.memory import Memory, compile_step, step_memory
from jaxlm.run.records import record_bytes
from tests import tiny_run
from tests.tiny_run import is_one_line

TINY = ["--config", "tiny.py"]
PRESET = from_config_dict(m2_60m.get_config())
BENCHMARK = BenchmarkResult(
    batch_size=2,
    grad_accum_steps=2,
    microbatch_chunks=1,
    start=5.0,
    first=1.0,
    step=2.0,
    step_fast=1.9,
    step_slow=2.2,
    update=0.0,
    evaluation=0.5,
    samples=0.25,
    save=0.125,
    saving=1.0,
    end=0.5,
    flops_per_second=1e9,
    peak_bytes=600_000_000,
    checkpoint_bytes=170_000,
    model_bytes=3_000_000,
)
MEMORY = Memory(weights=1000, moments=2000, accumulated=1000, gradients=1000, temporaries=500, checkpoint_copy=3000)


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    with tiny_run.workplace(tmp_path_factory) as place:
        yield place


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def replace_memory(monkeypatch, memory_of):
    """Replaces the compiler's analysis, which takes seconds."""
    for module in (memory, report):
        monkeypatch.setattr(module, "memory_of", lambda config, device, show: memory_of(config))


@pytest.fixture
def fixed_memory(monkeypatch):
    replace_memory(monkeypatch, lambda config: MEMORY)


@pytest.fixture
def benchmark_calls(monkeypatch, fixed_memory):
    """No benchmark runs: it returns BENCHMARK. Gives the list of its calls."""
    calls = []
    monkeypatch.setattr(measure, "measure", lambda *arguments: calls.append(arguments) or BENCHMARK)
    return calls


def planned(capsys, *flags):
    plan.main([*TINY, "--json", *flags])
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_the_memory_is_that_of_the_compiled_step(capsys):
    flags = ("--no-measure", "--config.model.remat=false")
    config = tiny_run.resolved(read_config([*TINY, flags[1]])[0])
    expected = step_memory(config, compile_step(config))
    assert planned(capsys, *flags)["memory"]["temporaries_bytes"] == expected.temporaries > 0


def test_without_a_benchmark_memory_disk_and_schedule_are_known(capsys, monkeypatch):
    program = jax.jit(lambda: jnp.zeros(10**6)).lower().compile()  # larger than the state
    monkeypatch.setattr(memory, "compile_step", lambda config, mesh: program)
    flags = ("--no-measure", "--config.model.remat=false")
    report = planned(capsys, *flags)
    monkeypatch.setattr(memory, "compile_step", None)
    again = planned(capsys, *flags)["memory"]  # from the cache
    assert again["temporaries_bytes"] == report["memory"]["temporaries_bytes"]
    assert report["speed"] is None
    assert report["model"]["parameters"] == 300 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 24 + 2 * 16) + 16
    assert report["memory"]["temporaries_bytes"] > 0
    assert report["memory"]["fits"]
    assert report["disk"]["fits"]
    assert report["schedule"]["first_step_of"] == {"samples": 6, "evaluation": 4, "checkpoint": 3}
    assert report["schedule"]["kept_at_the_end_steps"] == [3, 6, 9, 12]
    assert "total_seconds" not in report["schedule"]
    assert not Path("runs").exists()


def test_a_mesh_of_devices_that_are_not_here_is_planned_and_not_measured(capsys, monkeypatch, benchmark_calls):
    flags = ("--config.batch_size=4", "--config.mesh.data=2", "--config.mesh.fsdp=2")
    monkeypatch.setattr(backend, "available_memory", lambda device: MEMORY.total)
    assert planned(capsys, *flags)["memory"]["fits"]
    plan.main([*TINY, *flags])
    shown = capsys.readouterr().out
    assert "float32 on 4 x CPU" in shown
    assert "Memory of each (data 2, fsdp 2)" in shown
    assert "Speed: not measured (it needs more devices than are here)" in shown
    assert benchmark_calls == []
    with pytest.raises(UsageError, match="batch_size 4 is not divisible among 8 devices"):
        plan.main([*TINY, *flags, "--config.mesh.data=4"])


def test_keys_of_numbers_name_the_unit(capsys, benchmark_calls):
    def check(tree, above=""):
        for key, value in tree.items():
            name = key if not above.endswith("_seconds") else f"{key}_seconds"
            if isinstance(value, dict):
                check(value, key)
            elif isinstance(value, int | float) and not isinstance(value, bool):
                assert re.search(
                    r"_bytes|_seconds|tokens|parameters|flops|steps?\b|epochs|utilisation|chunks|second\b"
                    r"|embedding|share|attention|feed-forward|norms|samples|evaluation|checkpoint|devices",
                    name,
                ), name

    check(planned(capsys))


def test_the_benchmark_gives_times_and_sizes(capsys, benchmark_calls):
    report = planned(capsys)
    # 12 steps, 3 evaluations of two batches (also the last, as the validation data is unknown), 2 samples, 4 saves
    evaluations = 3 * 2 * 0.5
    assert report["schedule"]["total_seconds"] == pytest.approx(6 + 12 * 2 + evaluations + 2 * 0.25 + 4 * 0.125 + 1.5)
    assert report["speed"]["tokens_per_second"] == 64 / 2
    assert report["memory"]["total_bytes"] == 600_000_000
    others = 3_000_000 + record_bytes(read_config(TINY)[0], 12)
    assert report["disk"]["left_bytes"] == 4 * 170_000 + others
    assert report["disk"]["most_bytes"] == 5 * 170_000 + others  # the fourth save begins beside a rolling checkpoint
    fewer = planned(capsys, "--config.max_checkpoints=2")["disk"]
    assert (fewer["left_bytes"], fewer["most_bytes"]) == (2 * 170_000 + others, 4 * 170_000 + others)
    assert report["schedule"]["timeline"][-1]["step"] == 12


def test_the_last_evaluation_reads_all_validation_data(capsys, benchmark_calls):
    Path("tokens").mkdir()
    np.zeros(1000, "<u2").tofile("tokens/train.bin")
    np.zeros(16 * 20 + 1, "<u2").tofile("tokens/val.bin")  # 20 sequences, two at a time
    report = planned(capsys)
    assert report["speed"]["last_evaluation_seconds"] == 10 * 0.5
    assert report["model"]["epochs"] == 12 * 64 / 1000
    assert report["disk"]["tokens_bytes"] == 2 * (1000 + 321)


def test_a_benchmark_is_cached_by_shape(capsys, benchmark_calls):
    first = planned(capsys)
    assert planned(capsys)["speed"] == first["speed"]
    assert planned(capsys, "--no-measure", "--config.max_checkpoints=2")["speed"] == first["speed"]
    assert len(benchmark_calls) == 1
    planned(capsys, "--config.batch_size=4")
    assert len(benchmark_calls) == 2
    planned(capsys, "--measure")
    assert len(benchmark_calls) == 3


def test_the_rest_of_the_plan_survives_a_failed_benchmark(capsys, monkeypatch, fixed_memory):
    def fail(*arguments):
        raise RunError("no room")

    monkeypatch.setattr(measure, "measure", fail)
    report = planned(capsys)
    assert report["speed"] is None
    assert report["not_measured_because"] == "no room"
    plan.main(TINY)
    assert "not measured (no room)" in capsys.readouterr().out


def test_the_benchmark_of_an_unsound_device_is_shown_but_not_cached(monkeypatch, tmp_path, benchmark_calls):
    def refuse(*arguments):
        raise RunError("an M2 computes wrong numbers")

    device = SimpleNamespace(platform="mps", device_kind="an M2", client=SimpleNamespace(platform_version="1"))
    monkeypatch.setattr(backend, "start", lambda *arguments: device)
    monkeypatch.setattr(numerics, "require", refuse)
    for _ in range(2):
        planned_run = report.make_plan(PRESET, tmp_path, None, lambda *_: None)
        assert planned_run["speed"]["measured_tokens_per_step"] == 4 * 1024
        assert "A run would be refused: an M2 computes wrong numbers" in tables.tables(planned_run, datetime.now())
    assert len(benchmark_calls) == 2


def test_the_process_counts_in_what_fits(capsys, monkeypatch, benchmark_calls):
    """The benchmark's peak is that of arrays and process; one byte less does not fit, though the arrays do."""
    for available, fits in ((BENCHMARK.peak_bytes, True), (BENCHMARK.peak_bytes - 1, False)):
        monkeypatch.setattr(backend, "available_memory", lambda device, available=available: available)
        report = planned(capsys, "--config.model.remat=true")
        assert report["memory"]["process_bytes"] == BENCHMARK.peak_bytes - MEMORY.total
        assert report["memory"]["total_bytes"] == BENCHMARK.peak_bytes
        assert report["memory"]["fits"] is fits
        assert report["setting"]["fits"] is fits


def test_a_run_starts_where_the_plan_says_that_it_fits(capsys, monkeypatch, benchmark_calls):
    """To the byte, with what the plan measured of the process and of a save."""
    monkeypatch.setattr(tiny_run.trainer.Trainer, "train", lambda self: self._ready(None, 0))
    monkeypatch.setattr(memory, "_cached", lambda config, device: MEMORY)
    planned(capsys)
    for available, fits in ((BENCHMARK.peak_bytes, True), (BENCHMARK.peak_bytes - 1, False)):
        monkeypatch.setattr(memory.measure, "key", lambda *_: "key")
        monkeypatch.setattr(backend, "available_memory", lambda device, available=available: available)
        assert planned(capsys)["memory"]["fits"] is fits
        with contextlib.nullcontext() if fits else pytest.raises(UsageError, match="this run needs"):
            main.main([*TINY, "--config.data.dir=", "--workdir", "started"])
        capsys.readouterr()


def test_a_run_that_does_not_fit_is_not_measured_and_gets_advice(capsys, monkeypatch, benchmark_calls):
    def by_chunk_and_remat(config):
        return Memory(10, 10, 10, 10, 400 * config.chunk_size * (1 if config.model.remat else 2), 10)

    process = 70
    replace_memory(monkeypatch, lambda config: dataclasses.replace(by_chunk_and_remat(config), process=process))

    def setting(room, *more):
        monkeypatch.setattr(backend, "available_memory", lambda device: room + process)
        return planned(capsys, "--no-measure", "--config.batch_size=8", "--config.microbatch_chunks=1", *more)[
            "setting"
        ]

    for room, expected in ((850, (8, False)), (2000, (4, False)), (849, (8, True)), (450, (8, True))):
        advice = setting(room)
        assert (advice["microbatch_chunks"], advice["remat"]) == expected
        assert advice["arrays_bytes"] <= room
    assert setting(400) == {"fits": False}
    plan.main([*TINY])
    shown = capsys.readouterr().out
    assert "No microbatch_chunks and remat make it fit" in shown
    assert "not measured (it does not fit)" in shown
    assert benchmark_calls == []
    advice = setting(10_000)
    assert (advice["microbatch_chunks"], advice["remat"]) == (1, False)  # recomputation only where memory is short
    assert setting(10_000, "--config.model.remat=false") is None


@pytest.mark.parametrize("step", [0.01, 2.0, 3000.0])
def test_tables_fit_80_columns_without_control_characters(capsys, monkeypatch, fixed_memory, step):
    slow = dataclasses.replace(BENCHMARK, step=step, step_fast=step, step_slow=step * 1.1)
    monkeypatch.setattr(measure, "measure", lambda *arguments: slow)
    monkeypatch.setenv("COLUMNS", "200")
    plan.main([*TINY, "--config.max_steps=50000"])
    shown = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 80
    assert re.search(r"[\x00-\x09\x0b-\x1f\x7f]", shown) is None
    for title in ("Model", "Memory", "Speed", "Disk", "Schedule", "Timeline"):
        assert re.search(rf"(?m)^{title} *$", shown)
    assert "Checkpoint 3 is deleted when 18 is complete." in shown


def test_the_end_of_the_preset_is_dated(monkeypatch, tmp_path, fixed_memory):
    """50,000 steps of 26 s and 500 evaluations of 64 sequences, half a second for each micro-batch, take 15.2 days."""
    slow = dataclasses.replace(BENCHMARK, step=26.0, step_fast=25.0, step_slow=27.0)
    monkeypatch.setattr(measure, "measure", lambda *arguments: slow)
    planned_run = report.make_plan(PRESET, tmp_path, True, lambda *_: None)
    lines = [part for part in tables.tables(planned_run, datetime(2026, 1, 1)) if isinstance(part, str)]
    assert any("50,000 steps take 15.2d: started now, until 2026-01-16" in line for line in lines)


@pytest.mark.parametrize("flag", ["--config.batch_sise=4", "--jsn", "stray"])
def test_a_wrong_flag_is_an_error_of_one_line(flag):
    with pytest.raises(UsageError) as caught:
        plan.main([*TINY, flag])
    assert is_one_line(caught.value)


def test_only_the_cache_is_written(capsys, tmp_path, benchmark_calls):
    before = tiny_run.listing(Path())
    planned(capsys, "--workdir", "not/there")
    assert tiny_run.listing(Path()) == before
    assert os.listdir(tmp_path) == ["jaxlm"]


def test_check_prints_all_parts_and_fails_if_one_is_wrong(monkeypatch, capsys):
    parts = (Part("sort", 0.0, 0.0), Part("gradient of norm", 0.5, 0.25))
    monkeypatch.setattr(numerics, "check", lambda config, device: parts[: config.grad_accum_steps])
    plan.main([*TINY, "--check", "--config.grad_accum_steps=1"])
    assert re.search(r"sort +0.0e\+00 +0.0e\+00  ok", capsys.readouterr().out)
    with pytest.raises(RunError, match=r"gradient of norm differs by 0\.5"):
        plan.main([*TINY, "--check", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert [(part["name"], part["allowed"], part["ok"]) for part in shown] == [(*p[::2], p.ok) for p in parts]
