"""What the tables of the benchmarks say of their rounds."""

import sys

from experiments import throughput
from experiments.rounds import median_and_range


def test_the_median_stands_with_the_least_and_the_greatest():
    assert median_and_range([3.0, 1.0, 10.0]) == "3.00 [1.00, 10.00]"
    assert median_and_range([1.001, 1.002]) == "1.00"


def test_throughput_compares_the_runs_of_one_round(monkeypatch, capsys):
    rates = {"throughput": iter([100, 400, 90]), "torch_llama": iter([50, 500, 100])}

    def run(module, flags):
        rate = next(rates[module])
        return {"name": module, "device": "CPU", "rate": rate, "ms": 1000 / rate, "mb": rate, "utilisation": 0.5}

    monkeypatch.setattr(throughput, "run", run)
    monkeypatch.setattr(sys, "argv", ["throughput", "--device", "cpu"])
    throughput.main()
    lines = capsys.readouterr().out.splitlines()
    assert "| throughput | 10.00 [2.50, 11.11] | 100 [90, 400] | 100 [90, 400] |" in lines
    # of the rounds: 100 / 50, 400 / 500 and 90 / 100
    assert "| ratio | 1.111 [0.500, 1.250] | 0.900 [0.800, 2.000] | 0.900 [0.800, 2.000] |" in lines
    assert "utilisation 50% of the speed of one large matmul" in lines
