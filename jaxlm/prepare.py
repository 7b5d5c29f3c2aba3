"""Encodes text into token files: python -m jaxlm.prepare --corpus NAME-OR-PATHS --out DIR"""

import time
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from jaxlm.cli import ArgumentParser, expand_homes, path, run
from jaxlm.config import TOKENIZERS
from jaxlm.data.corpus import joined, open_corpus
from jaxlm.data.encode import PREPARE_FLAGS, Flags, find_prepared, write_token_files
from jaxlm.data.token_files import FileMeta, Meta
from jaxlm.data.tokenizer import GPT2_VOCAB_SIZE
from jaxlm.terminal import console, printable


def prepare(
    source: str,
    directory: Path,
    vocab_size: int,
    validation_fraction: float,
    flags: Flags = PREPARE_FLAGS,
    tokenizer: str = "gpt2",
) -> Meta:
    """Prepares the token files of a corpus and shows progress; does nothing if `directory` already holds them.

    Raises UsageError, which names `flags`, if the corpus or the contents of `directory` do not fit, RunError if the
    disk fails.
    """
    if meta := find_prepared(source, directory, vocab_size, validation_fraction, flags, tokenizer):
        return meta
    terminal = console()
    terminal.out(printable(f"Preparing {source} in {directory}"), highlight=False)
    corpus = open_corpus(source)  # a download shows its own progress bar
    started = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=terminal, transient=True, disable=not terminal.is_terminal
    ) as bar:
        task = bar.add_task("Reading", total=None)

        def show(stage: str, done: int, total: int) -> None:
            bar.update(task, description=stage, completed=done, total=total or None)

        meta = write_token_files(corpus, directory, vocab_size, validation_fraction, show, flags, tokenizer)
    seconds, size = time.monotonic() - started, (meta.train.bytes + meta.val.bytes) / 1e6
    terminal.out(f"Prepared {size:.1f} MB in {seconds:.1f} s ({size / seconds:.1f} MB/s)", highlight=False)
    return meta


def main(argv: list[str]) -> None:
    """Runs the command with the arguments `argv`. Raises UsageError and RunError."""
    parser = ArgumentParser(prog="python -m jaxlm.prepare", description="Encodes text into token files.")
    parser.add_argument(
        "--corpus",
        nargs="+",
        type=expand_homes,
        required=True,
        help="novels, tinystories, or paths or patterns of text files",
    )
    parser.add_argument("--out", type=path, required=True, help="directory for train.bin, val.bin and meta.json")
    parser.add_argument(
        "--vocab_size", type=int, default=GPT2_VOCAB_SIZE, help="tokens in the vocabulary (%(default)s)"
    )
    parser.add_argument(
        "--val_fraction",
        "--validation",
        type=float,
        default=0.01,
        help="fraction held out for validation (%(default)s)",
    )
    parser.add_argument(
        "--tokenizer", choices=TOKENIZERS, default="gpt2", help="gpt2, or own: learnt from the text (%(default)s)"
    )
    args = parser.parse_args(argv)
    meta = prepare(joined(args.corpus), args.out, args.vocab_size, args.val_fraction, tokenizer=args.tokenizer)
    print(printable(f"{args.out}: {_describe(meta.train)} for training, {_describe(meta.val)} for validation"))


def _describe(file: FileMeta) -> str:
    rate = file.bytes / file.tokens
    return f"{file.tokens:,} tokens ({file.bytes:,} bytes, {rate:.2f} bytes/token, {file.documents:,} documents)"


if __name__ == "__main__":
    run(main)
