"""Exports a model: python -m jaxlm.export --workdir DIR --out DIR|FILE.gguf|FILE.html [--format FORMAT] [--step N]

`hf` is a Hugging Face folder, for transformers, mlx-lm and others; `gguf` is a file for llama.cpp, with a Modelfile
for ollama beside it; `html` is a page in which the model writes. The end of --out chooses the format.
"""

import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.cli import ArgumentParser, path, run
from jaxlm.errors import UsageError
from jaxlm.interop import gguf, html, huggingface
from jaxlm.interop.gguf import DTYPES, require_gguf, write_gguf
from jaxlm.interop.html import write_page
from jaxlm.interop.huggingface import write_model
from jaxlm.interop.mark import Mark
from jaxlm.interop.model_card import model_card
from jaxlm.interop.ollama import modelfile_of, write_modelfile
from jaxlm.run.quiet import quiet_libraries
from jaxlm.storage.atomic import leftover_of


def main(argv: list[str]) -> None:
    """Runs the command with the arguments `argv`. Raises UsageError and RunError."""
    parser = ArgumentParser(prog="python -m jaxlm.export", description="Exports a run's model to other programs.")
    parser.add_argument("--workdir", type=path, required=True, help="the run's work directory")
    parser.add_argument("--out", type=path, required=True, help="the folder to write, or a file named *.gguf or *.html")
    parser.add_argument("--format", choices=FORMATS, help="of the export (by the end of --out; of a folder, hf)")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the matrices in a file (f16)")
    parser.add_argument("--step", type=int, help="which checkpoint of the run (the best, or the newest)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    args = parser.parse_args(argv)
    by_suffix = {form.suffix: name for name, form in FORMATS.items()}
    suffix = args.out.suffix.lower()
    name = args.format or by_suffix.get(suffix, "hf")
    form, out = FORMATS[name], Path(os.path.abspath(args.out))
    if not args.format and suffix not in by_suffix and suffix[1:].isalpha() and not out.is_dir():
        raise UsageError(f"{args.out} is no *.gguf or *.html: name one, or add --format hf for a folder of that name")
    if args.dtype and not form.suffix:
        raise UsageError("--dtype applies to files only: omit it, or name a file *.gguf or *.html")
    form.require()
    if form.suffix and suffix != form.suffix:
        out = out / form.file.format(dtype=args.dtype or "f16")
    _check_output(out, form, args.overwrite)

    from jaxlm.run.load import restore  # jax: imported after the quick checks

    checkpoint = restore(args.workdir, args.step, "cpu")
    form.write(out, checkpoint, args)
    print(f"{out} holds the model of step {checkpoint.step:,}")


def _write_hf(out: Path, checkpoint: Any, args: Namespace) -> None:
    from jaxlm.core.model import parameter_count

    step, config, meta, params = checkpoint
    card = model_card(args.workdir, config, step, meta, parameter_count(params))
    write_model(out, config, params, checkpoint.tokenizer, card)
    for name in huggingface.edited_texts(out):
        print(f"{out / name} stays as it was edited")


def _write_gguf(out: Path, checkpoint: Any, args: Namespace) -> None:
    write_gguf(out, checkpoint.config.model, checkpoint.params, checkpoint.tokenizer, args.dtype or "f16")
    written = write_modelfile(out, checkpoint.config, args.overwrite)
    print(f"{modelfile_of(out)} {'is for ollama' if written else 'stays as it was'}")


def _write_html(out: Path, checkpoint: Any, args: Namespace) -> None:
    step, config, meta, params = checkpoint
    write_page(out, config, step, meta, params, checkpoint.tokenizer, args.dtype or "f16")


class Format(NamedTuple):
    """A format of the export."""

    suffix: str  # of the file; empty: a folder
    file: str  # in --out, if that is no such file
    require: Callable[[], None]  # raises UsageError if a package is missing
    read_mark: Callable[[Path], Mark]
    write: Callable[[Path, Any, Namespace], None]  # (out, Checkpoint, arguments)


FORMATS = {
    "hf": Format("", "", lambda: None, huggingface.read_mark, _write_hf),
    "gguf": Format(".gguf", "model-{dtype}.gguf", require_gguf, gguf.read_mark, _write_gguf),
    "html": Format(".html", "model-{dtype}.html", lambda: None, html.read_mark, _write_html),
}


def _check_output(out: Path, form: Format, overwrite: bool) -> None:
    """Raises UsageError if `out` exists and is not an earlier export, or is one and `overwrite` is not set."""
    is_folder = not form.suffix
    if not os.path.lexists(out) or (is_folder and out.is_dir() and all(map(leftover_of, os.listdir(out)))):
        return
    if not form.read_mark(out).sound:
        raise UsageError(
            f"{out} exists and is not a model as this version of jaxlm exports it: move it away or choose another --out"
        )
    unfinished = is_folder and not os.path.lexists(out / huggingface.CONFIG)  # by a kill
    if not (overwrite or unfinished):
        raise UsageError(f"{out} exists: choose another --out, or add --overwrite")


if __name__ == "__main__":
    quiet_libraries()
    run(main)
