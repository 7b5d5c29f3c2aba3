"""The comparison by time to a loss: its runs are whole and real, alternate, and are measured once."""

import json
import os
import time
from dataclasses import asdict, replace

import pytest

from experiments import time_to_loss
from experiments.time_to_loss import JaxlmRun, alternate, compare, in_process, measure, parts, report
from jaxlm.config import Config
from jaxlm.core.average import averaged
from jaxlm.core.decoder import Decoder
from jaxlm.data.token_files import val_batches
from jaxlm.main import open_data
from tests import tiny_run

ROUNDS = 5


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with tiny_run.workplace(tmp_path_factory, trained=True) as place:
        yield place


def row(program, steps, seed=0, bits=1.0, part_seconds=(1.0, 1.0)):
    config = asdict(Config()) | {"max_steps": steps}
    values = {"val_loss": 2.5 * bits, "val_bits_per_byte": bits, "compile_seconds": 10.0, "eval_seconds": 1.0}
    values |= {"device": "a GPU", "program": program, "steps": steps, "seed": seed, "config": config}
    return values | {"part_seconds": list(part_seconds)}


@pytest.mark.slow
def test_a_run_of_jaxlm_ends_with_the_loss_of_the_training_command(place):
    (merged,) = alternate([measure(JaxlmRun, tiny_run.config_of("run"), ROUNDS)])
    last = tiny_run.rows("run/metrics.jsonl")[-1]
    assert merged["steps"] == last["step"] == 12
    assert merged["val_loss"] == pytest.approx(last["val_loss"], rel=1e-5)
    assert merged["val_bits_per_byte"] == pytest.approx(last["val_bits_per_byte"], rel=1e-5)
    assert len(merged["part_seconds"]) == ROUNDS
    assert min(merged["compile_seconds"], merged["eval_seconds"], *merged["part_seconds"]) > 0


@pytest.mark.slow
def test_a_run_that_lost_steps_has_no_loss(place):
    config = tiny_run.config_of("run")
    run = JaxlmRun(config, open_data(config))
    run.compile()
    run.train(11)
    with pytest.raises(RuntimeError, match="11 of 12 steps"):
        run.loss_sum(*next(val_batches(open_data(config).val, 16, 2)))


@pytest.mark.slow
def test_the_average_of_weights_is_evaluated(place):
    config = tiny_run.config_of("run")
    config = replace(config, max_steps=3, optimizer=replace(config.optimizer, average=0.9))
    run, batch = JaxlmRun(config, open_data(config)), next(val_batches(open_data(config).val, 16, 2))
    run.compile()
    run.train(3)
    of_average, of_last = (
        Decoder(run.config.model).apply({"params": params}, *batch, method="loss")
        for params in (averaged(run.state.params, run.state.average), run.state.params)
    )
    assert run.loss_sum(*batch) == pytest.approx(float(of_average), rel=1e-6)
    assert of_last != pytest.approx(float(of_average), rel=1e-4)


@pytest.mark.parametrize(("steps", "rounds"), [(12, 5), (400, 10), (7, 7)])
def test_the_parts_are_all_of_the_steps(steps, rounds):
    sizes = parts(steps, rounds)
    assert sum(sizes) == steps
    assert len(sizes) == rounds
    assert max(sizes) - min(sizes) <= 1


def test_runs_take_turns_and_rows_are_merged():
    order = []

    def run(name):
        for turn in range(3):
            order.append((turn, name))
            yield {"name": name, "part_seconds": [turn]}

    merged = alternate([run("peer"), run("ours")])
    assert order == [(turn, name) for turn in range(3) for name in ("peer", "ours")]
    assert merged == [{"name": name, "part_seconds": [0, 1, 2]} for name in ("peer", "ours")]


@pytest.mark.slow
def test_a_process_works_only_while_an_item_is_awaited(tmp_path):
    folders = [str(tmp_path / name) for name in "abc"]
    items = in_process(map, os.mkdir, folders)
    for made in range(1, 4):
        assert next(items) is None
        time.sleep(0.05)
        assert len(list(tmp_path.iterdir())) == made
    assert list(items) == []


@pytest.mark.slow
def test_a_process_that_fails_raises(capfd):
    with pytest.raises(RuntimeError, match="range failed"):
        next(in_process(range, "not a number"))
    assert "TypeError" in capfd.readouterr().err


def test_a_seed_that_was_measured_is_not_measured_again(place, monkeypatch, tmp_path):
    measured = []

    def rows(function, program, config, rounds):
        measured.append((program.__name__, config.max_steps, config.seed))
        return iter([row(program.__name__, config.max_steps, config.seed)])

    monkeypatch.setattr(time_to_loss, "in_process", rows)
    config, results = tiny_run.config_of("run"), tmp_path / "results" / "runs.jsonl"
    peer, ours = replace(config, max_steps=9), [replace(config, max_steps=steps) for steps in (5, 7)]
    first = compare(peer, ours, ROUNDS, results)
    assert measured == [("TorchRun", 9, 0), ("JaxlmRun", 5, 0), ("JaxlmRun", 7, 0)]
    assert [json.loads(line) for line in results.read_text().splitlines()] == json.loads(json.dumps(first))
    assert compare(peer, ours, ROUNDS, results) == json.loads(json.dumps(first))
    assert len(measured) == 3
    compare(replace(peer, seed=1), [replace(c, seed=1) for c in ours], ROUNDS, results)
    assert measured[3:] == [("TorchRun", 9, 1), ("JaxlmRun", 5, 1), ("JaxlmRun", 7, 1)]
    assert len(results.read_text().splitlines()) == 6


def test_the_report_names_the_shortest_schedule_that_reached_the_peer():
    def comparison(seed, shift):
        peer = row("PyTorch", 1200, seed, 1.4 + shift, (50.0, 70.0))
        bits = {300: 1.45, 400: 1.39, 600: 1.30}
        ours = [row("jaxlm", steps, seed, value, (steps / 40, steps / 40)) for steps, value in bits.items()]
        return [peer, *ours]

    text = report([comparison(0, 0.0), comparison(1, 0.02), comparison(2, 0.0)])
    lines = text.splitlines()
    assert len({line.count("|") for line in lines[1:-1]}) == 1
    assert "| jaxlm | 400 | 3.4750 | 1.3900 | 50.00 | 20.0 | 10.0 | 1.0 | 3.00 | 6.00 [5.00, 7.00] | 4.33 |" in lines
    assert "| PyTorch | 1,200 | 3.5000 [3.5000, 3.5500] | 1.4000 [1.4000, 1.4200] | 100.00 [83.33, 116.67] |" in text
    assert lines[-1].startswith("jaxlm reached the loss of the peer in 400 steps. Ratio of tokens: 3.00, of time: 6.00")
    assert report([[row("PyTorch", 12, bits=1.0), row("jaxlm", 4, bits=1.1)]]).endswith(
        "No schedule of jaxlm reached the loss of the peer."
    )
