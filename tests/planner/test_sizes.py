"""The choice of sizes: its properties, and what it does with flags, with a run that began, and with wrong requests."""

import dataclasses
import json
import runpy
from itertools import pairwise, product
from pathlib import Path

import pytest

from jaxlm.cli import PRESETS
from jaxlm.config import Config, from_config_dict, to_dict
from jaxlm.core.parameters import parameter_table
from jaxlm.errors import UsageError
from jaxlm.planner import sizes
from jaxlm.planner.measure import BenchmarkResult
from jaxlm.planner.sizes import LADDER, choose_sizes, choose_vocabulary, resolve, with_sizes
from jaxlm.run.memory import min_memory
from tests.tiny_run import is_one_line, resolved, write_text

TEXTS = [10**3, 10**5, 560_000, 3 * 10**6, 4 * 10**7, 2 * 10**9]
FLOPS = [10.0**power for power in (9, 12, 13, 14, 15, 16, 17, 18, 20)]
MEMORY = [10**8, 2 * 10**9, 16 * 10**9, 10**12]
SECONDS = {"start": 5.0, "first": 1.0, "step": 0.05, "step_fast": 0.05, "step_slow": 0.05, "update": 0.0}
PAUSES = {"evaluation": 0.02, "samples": 0.5, "save": 0.1, "saving": 1.0, "end": 1.0}


def preset(**changes) -> Config:
    settings = runpy.run_path(str(PRESETS / "own_text.py"))["get_config"]()
    settings.data.corpus = "text.txt"
    settings.update(changes)
    return from_config_dict(settings)


def test_more_text_time_or_memory_never_gives_a_smaller_model():
    ranks = {at: LADDER.index(choose_sizes(*at)) for at in product(TEXTS, FLOPS, MEMORY)}
    for (text, flops, memory), rank in ranks.items():
        for more in [(t, flops, memory) for t in TEXTS if t > text] + [(text, f, memory) for f in FLOPS if f > flops]:
            assert ranks[more] >= rank
        assert all(ranks[text, flops, more] >= rank for more in MEMORY if more > memory)
    assert set(ranks.values()) == set(range(len(LADDER)))
    assert sorted(map(choose_vocabulary, TEXTS)) == list(map(choose_vocabulary, TEXTS))


def test_the_ladder_rises_and_its_parameters_are_those_of_the_table():
    for small, large in pairwise(LADDER):
        assert small.parameters < large.parameters and small.memory < large.memory
    for row in LADDER:
        model = with_sizes(preset(), 10**6, row, 100).model
        blocks = [p for p in parameter_table(model) if p.kind == "matrix" and p.part not in ("embedding", "head")]
        assert sum(p.size for p in blocks) == row.parameters


def test_what_is_chosen_fits_the_memory_by_the_plan():
    for row in LADDER:
        largest = resolved(with_sizes(preset(), 2 * 10**9, row, 100))
        assert min_memory(largest).total < row.memory
        assert choose_sizes(2 * 10**9, 1e30, row.memory) == row
        assert row is LADDER[0] or choose_sizes(2 * 10**9, 1e30, row.memory - 1) != row


def test_100_kilobytes_give_a_run_that_reads_its_text_and_evaluates():
    config = with_sizes(preset(), 100_000, choose_sizes(100_000, 1e12, 16 * 10**9), 100)
    tokens = 100_000 / sizes.BYTES_PER_TOKEN
    assert config.model.vocab_size == 512
    assert tokens * config.data.val_fraction > 2 * config.model.context
    assert tokens * (1 - config.data.val_fraction) > 2 * config.batch_size * config.model.context


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A text, and a machine of which every part is known: the configs whose speed was asked for."""
    write_text(tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    asked = []

    def run_benchmark(config, *rest):
        asked.append(config)
        counts = config.batch_size, config.grad_accum_steps, config.microbatch_chunks
        numbers = dict(flops_per_second=1e11, peak_bytes=0, checkpoint_bytes=0, model_bytes=0)
        return BenchmarkResult(*counts, **SECONDS, **PAUSES, **numbers), "", ""

    monkeypatch.setattr(sizes, "run_benchmark", run_benchmark)
    monkeypatch.setattr(sizes, "cached_benchmark", lambda config, device: None)
    monkeypatch.setattr(sizes, "store_benchmark", lambda *arguments: None)
    monkeypatch.setattr(sizes.measure, "matmul_speed", lambda dtype, device: 1e11)
    return asked


def choose(config, named=(), workdir="run"):
    lines = []
    return resolve(config, Path(workdir), named, lines.append), lines


def test_the_steps_take_the_hours_and_read_the_text_a_few_times_at_most(measured):
    steps = {}
    for hours in (0.005, 0.01, 0.02, 100.0):
        config, lines = choose(preset(hours=hours))
        steps[hours] = config.max_steps
        text = Path("text.txt").stat().st_size
        assert config.max_steps * config.tokens_per_step <= 1.1 * sizes.EPOCHS * text or config.max_steps == 40
        assert f"{config.max_steps:,} steps" in lines[-1]
    assert sorted(steps.values()) == list(steps.values())
    assert len(measured) == 4


def test_named_settings_stay_and_a_run_that_began_keeps_its_sizes(measured):
    config, _ = choose(preset(model=dict(width=256, heads=2)), named=["model.width", "model.heads"])
    assert (config.model.width, config.model.heads) == (256, 2)
    Path("run").mkdir()
    Path("run/config.json").write_text(json.dumps(to_dict(config)))
    write_text(Path("text.txt"), "a longer text")
    del measured[:]
    again, lines = choose(preset())
    assert (again, lines, measured) == (config, [], [])
    longer, _ = choose(preset(max_steps=10**6), named=["max_steps"])
    assert "50 steps, as the flag says" in choose(preset(max_steps=50), ["max_steps"], "new")[1][-1]
    assert longer == dataclasses.replace(config, max_steps=10**6)


def test_other_hours_than_the_runs_are_one_line_that_says_how_to_train_longer(measured):
    config, _ = choose(preset())
    Path("run").mkdir()
    Path("run/config.json").write_text(json.dumps(to_dict(config)))
    with pytest.raises(UsageError) as error:
        choose(preset(hours=9.0))
    assert is_one_line(error.value)
    for part in ("hours is 9", "began with 8", f"lr_restart_step={config.max_steps}"):
        assert part in str(error.value)
    with pytest.raises(UsageError, match=r"data\.corpus, not data\.dir"):
        choose(preset(data=dict(dir="tokens")), workdir="other")


def test_without_hours_nothing_is_chosen(measured):
    assert choose(preset(hours=0.0)) == (preset(hours=0.0), [])
    assert measured == []
