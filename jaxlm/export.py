"""The command that hands a model on: python -m jaxlm.export --workdir DIR --out DIR --format hf|gguf [--step N]

`hf` is a Hugging Face folder, for transformers, mlx-lm and whatever reads these; `gguf` a file for llama.cpp.
"""

import os
from pathlib import Path

from jaxlm.cli import ArgumentParser, run
from jaxlm.errors import UsageError
from jaxlm.interop.gguf import DTYPES, require_gguf, write_gguf
from jaxlm.interop.huggingface import write_model
from jaxlm.interop.model_card import model_card
from jaxlm.run.quiet import quiet_libraries


def main(argv: list[str]) -> None:
    """Runs the command with `argv`, the words after its name. Raises UsageError and RunError."""
    parser = ArgumentParser(prog="python -m jaxlm.export", description="Writes a run's model for other programs.")
    parser.add_argument("--workdir", type=Path, required=True, help="the run's work directory")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write, or a file named *.gguf")
    parser.add_argument("--format", choices=("hf", "gguf"), default="hf", help="for which programs (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the matrices in a GGUF file (f16)")
    parser.add_argument("--step", type=int, help="which checkpoint (the newest)")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier export wrote")
    args = parser.parse_args(argv)
    out, dtype = Path(os.path.abspath(args.out)), args.dtype or "f16"
    if args.format == "gguf":
        require_gguf()
        out = out if out.suffix == ".gguf" else out / f"model-{dtype}.gguf"
    elif args.dtype:
        raise UsageError("--dtype is of GGUF files: a Hugging Face folder is float32")
    _check_place(out, args.overwrite)

    from jaxlm.core.model import parameter_count  # only now: what came before answers in a moment
    from jaxlm.run.load import restore

    step, config, tokens, _, params = restore(args.workdir, args.step, "cpu")
    if args.format == "gguf":
        write_gguf(out, config.model, params, dtype)
    else:
        write_model(out, config, params, model_card(args.workdir, config, step, tokens, parameter_count(params)))
    print(f"{out} holds the model of step {step:,}")


def _check_place(out: Path, overwrite: bool) -> None:
    """Raises UsageError where something is that this command has not written, or has not been told to replace."""
    if not os.path.lexists(out) or (out.is_dir() and out.suffix != ".gguf" and not any(out.iterdir())):
        return
    exported = out.is_file() if out.suffix == ".gguf" else (out / "model.safetensors").is_file()
    if not exported:
        raise UsageError(f"{out} is there already, and no exported model: choose another --out")
    if not overwrite:
        raise UsageError(f"{out} is there already: choose another --out, or add --overwrite")


if __name__ == "__main__":
    quiet_libraries()
    run(main)
