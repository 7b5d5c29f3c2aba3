"""The planning command, on a run so small that nothing in it takes long."""

import dataclasses
import json
import os
import re
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from configs import m2_60m
from jaxlm import plan
from jaxlm.config import from_config_dict
from jaxlm.device import backend, numerics
from jaxlm.device.numerics import Part
from jaxlm.errors import RunError, UsageError
from jaxlm.planner import measure, memory, report, tables
from jaxlm.planner.measure import BenchmarkResult
from jaxlm.run.memory import Memory
from tests import tiny_run
from tests.tiny_run import is_one_line

TINY = ["--config", "tiny.py"]
FOUND = BenchmarkResult(
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


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    with tiny_run.workplace(tmp_path_factory) as place:
        yield place


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def found(monkeypatch):
    """The short run is not made, and finds this; gives the list of its calls."""
    calls = []
    monkeypatch.setattr(measure, "measure", lambda *arguments: calls.append(arguments) or FOUND)
    return calls


def planned(capsys, *flags):
    plan.main([*TINY, "--json", *flags])
    return json.loads(capsys.readouterr().out)


def test_without_measuring_it_knows_memory_disk_and_schedule(capsys):
    report = planned(capsys, "--no-measure")
    assert report["speed"] is None
    assert report["model"]["parameters"] == 300 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 24 + 2 * 16) + 16
    assert report["memory"]["fits"]
    assert report["disk"]["fits"]
    assert report["schedule"]["first_step_of"] == {"samples": 6, "evaluation": 4, "checkpoint": 3}
    assert report["schedule"]["kept_at_the_end_steps"] == [3, 6, 9, 12]
    assert "total_seconds" not in report["schedule"]
    assert not Path("runs").exists()


def test_every_number_has_its_unit_in_its_key(capsys, found):
    def check(tree, above=""):
        for key, value in tree.items():
            name = key if not above.endswith("_seconds") else f"{key}_seconds"
            if isinstance(value, dict):
                check(value, key)
            elif isinstance(value, int | float) and not isinstance(value, bool):
                assert re.search(
                    r"_bytes|_seconds|tokens|parameters|flops|steps?\b|epochs|utilisation|chunks|second\b"
                    r"|embedding|share|attention|feed-forward|norms|samples|evaluation|checkpoint",
                    name,
                ), name

    check(planned(capsys))


def test_what_the_short_run_finds_gives_the_times_and_the_sizes(capsys, found):
    report = planned(capsys)
    # 12 steps; 3 evaluations, the last of unknown length counted as the others; 2 blocks of samples; 4 saves
    windows = 3 * 2 * 0.5
    assert report["schedule"]["total_seconds"] == pytest.approx(6 + 12 * 2 + windows + 2 * 0.25 + 4 * 0.125 + 1.5)
    assert report["speed"]["tokens_per_second"] == 64 / 2
    assert report["memory"]["total_bytes"] == 600_000_000
    assert report["disk"]["left_bytes"] == 4 * 170_000 + 3_000_000 + 12 * 1000
    assert report["schedule"]["timeline"][-1]["step"] == 12


def test_the_whole_validation_text_is_read_at_the_end(capsys, found):
    Path("tokens").mkdir()
    np.zeros(1000, "<u2").tofile("tokens/train.bin")
    np.zeros(16 * 20 + 1, "<u2").tofile("tokens/val.bin")  # 20 windows, two at a time
    report = planned(capsys)
    assert report["speed"]["last_evaluation_seconds"] == 10 * 0.5
    assert report["model"]["epochs"] == 12 * 64 / 1000
    assert report["disk"]["tokens_bytes"] == 2 * (1000 + 321)


def test_what_was_found_is_remembered(capsys, found):
    first = planned(capsys)
    assert planned(capsys)["speed"] == first["speed"]
    assert planned(capsys, "--no-measure", "--config.max_checkpoints=2")["speed"] == first["speed"]
    assert len(found) == 1
    planned(capsys, "--config.batch_size=4")
    assert len(found) == 2
    planned(capsys, "--measure")
    assert len(found) == 3


def test_a_short_run_that_fails_leaves_the_rest_of_the_plan(capsys, monkeypatch):
    def fail(*arguments):
        raise RunError("no room")

    monkeypatch.setattr(measure, "measure", fail)
    report = planned(capsys)
    assert report["speed"] is None
    assert report["not_measured_because"] == "no room"
    plan.main(TINY)
    assert "not measured (no room)" in capsys.readouterr().out


def test_the_speed_of_a_device_that_computes_wrong_is_measured_and_not_remembered(monkeypatch, tmp_path, found):
    def refuse(*arguments):
        raise RunError("an M2 computes wrong numbers")

    device = SimpleNamespace(platform="mps", device_kind="an M2", client=SimpleNamespace(platform_version="1"))
    monkeypatch.setattr(backend, "start", lambda *arguments: device)
    monkeypatch.setattr(report, "known_memory", lambda *arguments: Memory(1, 2, 3, 4, 5, 6))
    monkeypatch.setattr(report, "better_setting", lambda *arguments: None)
    monkeypatch.setattr(numerics, "require", refuse)
    config = from_config_dict(m2_60m.get_config())
    for _ in range(2):
        planned_run = report.make_plan(config, tmp_path, True, lambda *_: None)
        assert planned_run["speed"]["measured_tokens_per_step"] == 4 * 1024
        assert "A run would be refused: an M2 computes wrong numbers" in tables.tables(planned_run, datetime.now())
    assert len(found) == 2


def test_what_does_not_fit_is_not_run_and_the_setting_that_fits_is_named(capsys, monkeypatch, found):
    def take(config, device, show):
        return Memory(10, 10, 10, 10, 400 * config.chunk_size * (1 if config.model.remat else 2), 10)

    monkeypatch.setattr(memory, "known_memory", take)
    monkeypatch.setattr(report, "known_memory", take)
    monkeypatch.setattr(report, "process_bytes", lambda *arguments: 0)
    flags = ("--config.batch_size=8", "--config.microbatch_chunks=1")
    for room, expected in ((900, (8, False)), (3000, (4, False)), (860, (8, False)), (500, (8, True))):
        monkeypatch.setattr(backend, "available_memory", lambda device, room=room: room)
        setting = planned(capsys, *flags)["setting"]
        assert (setting["microbatch_chunks"], setting["remat"]) == expected
        assert setting["arrays_bytes"] <= room
    assert found == []
    monkeypatch.setattr(backend, "available_memory", lambda device: 400)
    assert planned(capsys, *flags)["setting"] == {"fits": False}
    plan.main([*TINY, *flags])
    assert "No slices and no remat make it fit" in capsys.readouterr().out
    monkeypatch.setattr(backend, "available_memory", lambda device: 10_000)
    setting = planned(capsys, *flags)["setting"]
    assert (setting["microbatch_chunks"], setting["remat"]) == (1, False)  # with room for it, nothing is computed twice
    assert planned(capsys, *flags, "--config.model.remat=false")["setting"] is None


def test_on_a_gpu_with_room_to_be_faster_the_setting_is_named(monkeypatch):
    gpu = type("Device", (), {"platform": "gpu"})()
    monkeypatch.setattr(
        memory, "known_memory", lambda c, d, s: Memory(0, 0, 0, 0, 100 * c.chunk_size + c.model.remat, 0)
    )
    config = dataclasses.replace(from_config_dict(m2_60m.get_config()), microbatch_chunks=8)
    recomputing = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=True))
    now = Memory(0, 0, 0, 0, 401, 0)
    faster = memory.better_setting(recomputing, gpu, 1700, now, lambda *_: None)
    assert faster == {"microbatch_chunks": 2, "remat": False, "arrays_bytes": 1600, "fits": True}
    fastest = dataclasses.replace(config, microbatch_chunks=1, model=dataclasses.replace(config.model, remat=False))
    assert memory.better_setting(fastest, gpu, 3300, Memory(0, 0, 0, 0, 3200, 0), lambda *_: None) is None


@pytest.mark.parametrize("step", [0.01, 2.0, 3000.0])
def test_the_tables_fit_80_columns_and_hold_no_control_characters(capsys, monkeypatch, step):
    slow = dataclasses.replace(FOUND, step=step, step_fast=step, step_slow=step * 1.1)
    monkeypatch.setattr(measure, "measure", lambda *arguments: slow)
    monkeypatch.setenv("COLUMNS", "200")
    plan.main([*TINY, "--config.max_steps=50000"])
    shown = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 80
    assert re.search(r"[\x00-\x09\x0b-\x1f\x7f]", shown) is None
    for title in ("Model", "Memory", "Speed", "Disk", "Schedule", "Timeline"):
        assert re.search(rf"(?m)^{title} *$", shown)
    assert "Checkpoint 3 is deleted when 18 is whole." in shown


def test_the_promises_stand_beside_what_is_here_and_their_contradictions_are_named(monkeypatch, found, tmp_path):
    slow = dataclasses.replace(FOUND, step=26.0, step_fast=25.0, step_slow=27.0)
    monkeypatch.setattr(measure, "measure", lambda *arguments: slow)
    for module in (memory, report):
        monkeypatch.setattr(module, "known_memory", lambda *arguments: Memory(1, 2, 3, 4, 5, 6))
    config = from_config_dict(m2_60m.get_config())
    planned_run = report.make_plan(config, tmp_path, True, lambda *_: None)
    rows = {row["what"].strip(): (row["promised"], row["here"]) for row in planned_run["promised"] if "what" in row}
    assert rows["a step"] == ("26 s", "26 s")
    assert rows["50,000 steps"] == (
        "8 to 9 days",
        "15.2 days",
    )  # with 500 evaluations of 64 windows, half a second each
    assert rows["checkpoints"] == ("every 300, 5 kept", "every 300, 5 kept")
    text = " ".join(row["contradiction"] for row in planned_run["promised"] if "contradiction" in row)
    assert "15.0 days, not 8 to 9" in text
    assert "6.6 GB" in text
    assert "22 to 26 s a step" in text
    lines = [part for part in tables.tables(planned_run, datetime(2026, 1, 1)) if isinstance(part, str)]
    assert any("2026-01-16" in line for line in lines)


@pytest.mark.parametrize("flag", ["--config.batch_sise=4", "--jsn", "stray"])
def test_a_wrong_flag_is_refused_in_one_line(flag):
    with pytest.raises(UsageError) as caught:
        plan.main([*TINY, flag])
    assert is_one_line(caught.value)


def test_nothing_is_written_but_what_is_remembered(capsys, tmp_path, found):
    before = tiny_run.listing(Path())
    planned(capsys, "--workdir", "not/there")
    assert tiny_run.listing(Path()) == before
    assert os.listdir(tmp_path) == ["jaxlm"]


def test_check_shows_each_part_and_ends_well_only_if_all_are_right(monkeypatch, capsys):
    parts = (Part("sort", 0.0, 0.0), Part("gradient of norm", 0.5, 0.25))
    monkeypatch.setattr(numerics, "check", lambda config, device: parts[: config.grad_accum_steps])
    plan.main([*TINY, "--check", "--config.grad_accum_steps=1"])
    assert re.search(r"sort +0.0e\+00 +0.0e\+00  ok", capsys.readouterr().out)
    with pytest.raises(RunError, match=r"gradient of norm differs by 0\.5"):
        plan.main([*TINY, "--check", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert [(part["name"], part["allowed"], part["ok"]) for part in shown] == [(*p[::2], p.ok) for p in parts]
