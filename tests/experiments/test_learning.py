"""The study of learning: what is held out, equal arithmetic, other losses, and the table of results."""

import hashlib
import json
import re
from contextlib import ExitStack
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.learning import losses, orders
from experiments.learning.data import held_out_corpus, prepare_tokens
from experiments.learning.show import by_name, table
from experiments.learning.study import _lock, finished
from experiments.learning.tables import TABLES, equal_arithmetic, flops_per_step, muon
from experiments.learning.trial import Trial, phases
from jaxlm.config import Config, ModelConfig, OptimizerConfig
from jaxlm.core import ops
from jaxlm.core.parameters import parameter_table
from jaxlm.errors import UsageError

ROOT = Path(__file__).parents[2]
CPU = SimpleNamespace(platform="cpu")


def test_the_novels_of_the_smallest_hashes_are_held_out(tmp_path):
    novels = [f"The novel of {i * i} words" for i in range(9)]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(novels[:5]))
    (tmp_path / "b.txt").write_text("<|endoftext|>".join(novels[5:]))
    corpus = held_out_corpus([tmp_path / "a.txt", tmp_path / "b.txt"], 3)
    by_hash = sorted(novels, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    assert documents(corpus.validation()) == sorted(by_hash[:3])
    assert documents(corpus.train()) == sorted(by_hash[3:])


def test_tokens_of_other_texts_are_refused(tmp_path):
    config = Config(model=ModelConfig(vocab_size=300, context=8))
    files = []
    for name in "ab":
        files.append(tmp_path / f"{name}.txt")
        files[-1].write_text("<|endoftext|>".join(f"{name} novel of {i} words" for i in range(20)))
    tokens = prepare_tokens(config, files[:1], tmp_path)
    assert prepare_tokens(config, files[:1], tmp_path).sha256 == tokens.sha256
    with pytest.raises(UsageError, match="other texts"):
        prepare_tokens(config, files[1:], tmp_path)


def test_one_process_at_a_time_runs_a_trial(tmp_path):
    """Until it ends, in whatever way."""
    with ExitStack() as second:
        with ExitStack() as first:
            assert _lock(first, tmp_path / "locks" / "a")
            assert not _lock(second, tmp_path / "locks" / "a")
            assert _lock(second, tmp_path / "locks" / "b")
        assert _lock(second, tmp_path / "locks" / "a")


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


def float64_loss(name, x_ND, embedding_VD, targets_N):
    """The training loss, and without the z-loss that of the validation, one row at a time."""
    kind, value = name.split()
    rows = []
    for row, target in zip(x_ND, targets_N, strict=True):
        logits = embedding_VD @ row
        if kind == "soft-cap":
            logits = float(value) * np.tanh(logits / float(value))
        logsumexp = np.log(np.sum(np.exp(logits)))
        rows.append((target >= 0) * np.array([logsumexp - logits[target], logsumexp**2]))
    cross_entropy, squares = np.sum(rows, axis=0)
    return cross_entropy + (float(value) * squares if kind == "z-loss" else 0.0), cross_entropy


@pytest.mark.parametrize("name", ["soft-cap 2.5", "z-loss 0.3"])
def test_another_loss_and_its_gradient_are_those_of_float64(name, monkeypatch):
    monkeypatch.setattr(ops, "IMPLEMENTATIONS", dict(ops.IMPLEMENTATIONS))
    losses.install(name)
    record, rng = ops.get("cpu"), np.random.default_rng(0)
    x_ND, embedding_VD, accumulator_VD = (rng.normal(0, 1, shape) for shape in ((7, 5), (11, 5), (11, 5)))
    targets_N = np.array([3, 0, -1, 10, 5, -1, 3])
    expected, validation = float64_loss(name, x_ND, embedding_VD, targets_N)
    arrays = [jnp.asarray(array, jnp.float32) for array in (x_ND, embedding_VD)]
    result = record.cross_entropy(record, *arrays, targets_N, "float32")
    assert float(result) == pytest.approx(validation, rel=1e-6)
    loss_sum, d_x_ND, d_embedding_VD = record.cross_entropy_and_grad(
        record, *arrays, targets_N, 0.25, jnp.asarray(accumulator_VD, jnp.float32), "float32"
    )
    assert float(loss_sum) == pytest.approx(expected, rel=1e-6)
    for given, d_given, before in ((x_ND, d_x_ND, 0.0), (embedding_VD, d_embedding_VD, accumulator_VD)):
        slopes = np.zeros_like(given)
        for index in np.ndindex(given.shape):
            given[index] += 1e-6
            above, _ = float64_loss(name, x_ND, embedding_VD, targets_N)
            given[index] -= 2e-6
            below, _ = float64_loss(name, x_ND, embedding_VD, targets_N)
            given[index] += 1e-6
            slopes[index] = (above - below) / 2e-6
        np.testing.assert_allclose(d_given, before + 0.25 * slopes, atol=1e-5)


def test_windows_of_documents_end_with_them_and_those_of_the_text_follow_each_other():
    documents = [list(range(1, 8)), list(range(20, 29)), list(range(40, 42))]
    ids = np.array([token for document in documents for token in (*document, 0)], np.uint16)
    for row in (row for batch in islice(orders.batches("documents", ids, 0, 3, 2, seed=1), 6) for row in batch):
        document = next(document for document in documents if row[0] in document)
        begin = document.index(row[0])
        assert begin % 3 == 0
        assert row.tolist() == [*document, 0][begin : begin + 4]
    text = [row for batch in islice(orders.batches("text", ids, 0, 3, 2, seed=1), 3) for row in batch]
    assert len({tuple(row) for row in text}) == 6  # all windows
    assert sum(row[-1] == after[0] for row, after in pairwise(text)) >= 4  # the last one is followed by the first


def test_the_page_has_the_tables_that_its_commands_print():
    page = (ROOT / "docs" / "learning.md").read_text()
    found = re.findall(r"`python -m\s+experiments\.learning\.show\s+([^`]*)`\s+prints:\n\n((?:\|.*\n)+)", page)
    assert len(found) == 8
    for files, shown in found:
        assert shown.strip() == table(by_name([ROOT / file for file in files.split()]))


@pytest.mark.parametrize("accum", [1, 2])
def test_a_batch_that_grows_continues_where_the_smaller_one_ended(accum):
    config = Config(batch_size=8, grad_accum_steps=accum, max_steps=12, optimizer=OptimizerConfig(warmup_steps=2))
    first, second = phases(Trial("grows", {}, grows=True), config)
    read = first.steps * first.config.batch_size * accum
    assert (first.config.batch_size, second.config.batch_size) == (4, 8)
    assert (first.first_batch, second.first_batch * second.config.batch_size) == (0, read)
    assert first.steps + second.steps == 12
    assert phases(Trial("as usual", {}), config) == [(config, 12, 0)]
