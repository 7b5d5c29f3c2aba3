"""Encodes text into token files: python -m jaxlm.prepare --corpus NAME-OR-PATHS --out DIR"""

import time
from collections.abc import Sequence
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from jaxlm.cli import ArgumentParser, expand_homes, path, run
from jaxlm.config import TOKENIZERS, join_paths
from jaxlm.data.corpus import open_corpus
from jaxlm.data.encode import PREPARE_FLAGS, Flags, find_prepared, write_token_files
from jaxlm.data.text_files import describe_skipped, names_of, some_names
from jaxlm.data.token_files import FileMeta, Meta
from jaxlm.data.tokenizer import GPT2_VOCAB_SIZE, Tokenizer
from jaxlm.terminal import console, printable


def prepare(
    source: str,
    directory: Path,
    vocab_size: int,
    validation_fraction: float,
    flags: Flags = PREPARE_FLAGS,
    tokenizer: str = "gpt2",
    exclude: Sequence[str] = (),
    vocabulary: Tokenizer | None = None,
    context: int = 0,
) -> Meta:
    """Prepares the token files of a corpus and shows progress; does nothing if `directory` already holds them.

    It also shows which files are skipped, and which are not UTF-8. `exclude`, `vocabulary` and `context` are those of
    `find_files` and `write_token_files`.

    Raises UsageError, which names `flags`, if the corpus or the contents of `directory` do not fit, RunError if the
    disk fails.
    """
    if meta := find_prepared(source, directory, vocab_size, validation_fraction, flags, tokenizer, exclude, vocabulary):
        return meta
    terminal = console()

    def say(line: str) -> None:
        terminal.out(printable(line), highlight=False)

    say(f"Preparing {some_names(names_of(source))} in {directory}")
    corpus = open_corpus(source, exclude)  # a download shows its own progress bar
    if corpus.skipped:
        say(f"Skipped {describe_skipped(corpus.skipped)}")
    started = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=terminal, transient=True, disable=not terminal.is_terminal
    ) as bar:
        task = bar.add_task("Reading", total=None)

        def show(stage: str, done: int, total: int) -> None:
            bar.update(task, description=stage, completed=done, total=total or None)

        meta = write_token_files(
            corpus, directory, vocab_size, validation_fraction, show, flags, tokenizer, vocabulary, context
        )
    if corpus.windows:
        words = ", ".join([*dict.fromkeys(corpus.windows.values())][:3])
        files = some_names(corpus.windows)
        say(f"Not UTF-8, so read as Windows-1252: {files}; if words such as {words} look wrong, convert the files")
    seconds, size = time.monotonic() - started, (meta.train.bytes + meta.val.bytes) / 1e6
    say(f"Prepared {size:.1f} MB in {seconds:.1f} s ({size / seconds:.1f} MB/s)")
    return meta


def main(argv: list[str]) -> None:
    """Runs the command with the arguments `argv`. Raises UsageError and RunError."""
    parser = ArgumentParser(prog="python -m jaxlm.prepare", description="Encodes text into token files.")
    parser.add_argument(
        "--corpus",
        nargs="+",
        action="extend",
        type=expand_homes,
        required=True,
        help="novels, tinystories, or files, folders and patterns",
    )
    parser.add_argument(
        "--exclude", nargs="+", action="extend", default=[], help="patterns of files and folders to leave out"
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
    meta = prepare(
        join_paths(args.corpus),
        args.out,
        args.vocab_size,
        args.val_fraction,
        tokenizer=args.tokenizer,
        exclude=args.exclude,
    )
    print(printable(f"{args.out}: {_describe(meta.train)} for training, {_describe(meta.val)} for validation"))


def _describe(file: FileMeta) -> str:
    rate = file.bytes / file.tokens
    return f"{file.tokens:,} tokens ({file.bytes:,} bytes, {rate:.2f} bytes/token, {file.documents:,} documents)"


if __name__ == "__main__":
    run(main)
