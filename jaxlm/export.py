"""Exports a model: python -m jaxlm.export --workdir DIR --out DIR --format hf|gguf [--step N]

`hf` is a Hugging Face folder, for transformers, mlx-lm and others; `gguf` is a file for llama.cpp.
"""

import os
from pathlib import Path

from jaxlm.cli import ArgumentParser, path, run
from jaxlm.errors import UsageError
from jaxlm.interop import gguf, huggingface
from jaxlm.interop.gguf import DTYPES, require_gguf, write_gguf
from jaxlm.interop.huggingface import write_model
from jaxlm.interop.model_card import model_card
from jaxlm.run.quiet import quiet_libraries
from jaxlm.storage.atomic import leftover_of


def main(argv: list[str]) -> None:
    """Runs the command with the arguments `argv`. Raises UsageError and RunError."""
    parser = ArgumentParser(prog="python -m jaxlm.export", description="Exports a run's model to other programs.")
    parser.add_argument("--workdir", type=path, required=True, help="the run's work directory")
    parser.add_argument("--out", type=path, required=True, help="the folder to write, or a file named *.gguf")
    parser.add_argument("--format", choices=("hf", "gguf"), default="hf", help="of the export (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the matrices in a GGUF file (f16)")
    parser.add_argument("--step", type=int, help="step of the checkpoint (the newest)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    args = parser.parse_args(argv)
    out, dtype = Path(os.path.abspath(args.out)), args.dtype or "f16"
    if args.format == "gguf":
        require_gguf()
        out = out if out.suffix == ".gguf" else out / f"model-{dtype}.gguf"
    elif args.dtype:
        raise UsageError("--dtype applies to GGUF files only: a Hugging Face folder is float32")
    _check_output(out, args.format == "gguf", args.overwrite)

    from jaxlm.core.model import parameter_count  # jax: imported after the quick checks
    from jaxlm.run.load import restore

    checkpoint = restore(args.workdir, args.step, "cpu")
    step, config, meta, _, params = checkpoint
    if args.format == "gguf":
        write_gguf(out, config.model, params, checkpoint.tokenizer, dtype)
    else:
        card = model_card(args.workdir, config, step, meta, parameter_count(params))
        write_model(out, config, params, checkpoint.tokenizer, card)
        for name in huggingface.edited_texts(out):
            print(f"{out / name} stays as it was edited")
    print(f"{out} holds the model of step {step:,}")


def _check_output(out: Path, is_gguf: bool, overwrite: bool) -> None:
    """Raises UsageError if `out` exists and is not an earlier export, or is one and `overwrite` is not set."""
    if not os.path.lexists(out) or (not is_gguf and out.is_dir() and all(map(leftover_of, os.listdir(out)))):
        return
    if not (gguf.read_mark(out) if is_gguf else huggingface.read_mark(out)).sound:
        raise UsageError(
            f"{out} exists and is not a model as this version of jaxlm exports it: move it away or choose another --out"
        )
    unfinished = not is_gguf and not os.path.lexists(out / huggingface.CONFIG)  # by a kill
    if not (overwrite or unfinished):
        raise UsageError(f"{out} exists: choose another --out, or add --overwrite")


if __name__ == "__main__":
    quiet_libraries()
    run(main)
