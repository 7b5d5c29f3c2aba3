"""The study of learning: what is held out, equal arithmetic, and the table of results."""

import hashlib
import json
from types import SimpleNamespace

import pytest

from experiments.learning.data import held_out_corpus
from experiments.learning.show import by_name, table
from experiments.learning.study import finished
from experiments.learning.tables import TABLES, equal_arithmetic, flops_per_step, muon
from jaxlm.core.parameters import parameter_table

CPU = SimpleNamespace(platform="cpu")


def test_the_novels_of_the_smallest_hashes_are_held_out(tmp_path):
    novels = [f"The novel of {i * i} words" for i in range(9)]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(novels[:5]))
    (tmp_path / "b.txt").write_text("<|endoftext|>".join(novels[5:]))
    corpus = held_out_corpus([tmp_path / "a.txt", tmp_path / "b.txt"], 3)
    by_hash = sorted(novels, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    assert documents(corpus.validation()) == sorted(by_hash[:3])
    assert documents(corpus.train()) == sorted(by_hash[3:])


def documents(chunks):
    return sorted("".join(("|" * chunk.starts_document) + chunk.text for chunk in chunks).split("|")[1:])


@pytest.mark.parametrize("name", TABLES)
def test_every_trial_has_its_name_and_settings_of_a_run(name):
    trials = TABLES[name]
    assert len({trial.key for trial in trials}) == len(trials)
    for trial in trials:
        config = trial.config(CPU)
        assert (config.seed, config.max_steps) == (trial.seed, trial.settings["max_steps"])


@pytest.mark.parametrize("changes", [{"model.vocab_size": 8192}, {"model.vocab_size": 8192, "model.layers": 11}])
def test_equal_arithmetic_is_that_of_the_preset_within_a_step(changes):
    budget = muon(2**24)
    settings = equal_arithmetic(budget | changes)
    total, step = flops_per_step(budget) * budget["max_steps"], flops_per_step(settings)
    assert abs(settings["max_steps"] * step - total) <= step / 2


def test_the_arithmetic_of_a_token_is_six_operations_a_matrix_entry_and_attention():
    (trial,) = (trial for trial in TABLES["adamw"] if trial.key == "as written, seed 0")
    matrices = sum(p.size for p in parameter_table(trial.config(CPU).model) if p.kind != "norm_scale")
    attention = 8 * 2 * 2 * 512 * 512  # two matmuls of 512 positions on average by 512, a layer; 2 operations each
    assert flops_per_step(trial.settings) / 65_536 == 6 * matrices + 3 * attention


def test_the_table_has_means_and_spreads_and_the_best_first(tmp_path):
    file = tmp_path / "results.jsonl"
    rest = {"tokens": 2_000_000, "steps": 1000, "step_ms": 5.0}
    rows = [("a", 1, 3.0), ("b", 0, 2.0), ("a", 0, 3.5)]
    lines = [
        {"trial": f"{name}, seed {seed}", "name": name, "seed": seed, "val_loss": loss, "val_bits_per_byte": loss / 2}
        for name, seed, loss in rows
    ]
    file.write_text("".join(json.dumps(line | rest) + "\n" for line in lines))
    assert table(by_name([file])).splitlines()[2:] == [
        "| b | 1 | 2.0 | 1,000 | 2.000 |  | 1.000 | 5.0 |",
        "| a | 2 | 2.0 | 1,000 | 3.250 | 0.500 | 1.625 | 5.0 |",
    ]
    assert finished(file) == {"a, seed 0", "a, seed 1", "b, seed 0"}
    assert finished(tmp_path / "none") == set()
