"""The command that trains: python -m jaxlm.main --config configs/m2_60m.py [--workdir DIR] [--config.batch_size=16]

Goes on from the newest checkpoint in the work directory; prepares the text its config names when that is missing.
"""

import dataclasses
import difflib
import json
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from jaxlm.command import ArgumentParser, run
from jaxlm.config import Config, differences, from_config_dict, to_dict
from jaxlm.errors import RequestError, RunError
from jaxlm.prepare import prepare_if_missing
from jaxlm.tokens import TokenFiles, open_tokens

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.py"

FLAGS = flags.FlagValues()
config_flags.DEFINE_config_file("config", str(QUICKSTART), "Config file; --config.NAME=VALUE changes a setting.", FLAGS)
flags.DEFINE_string("workdir", "", "Work directory. Default: runs/NAME-OF-THE-CONFIG", flag_values=FLAGS)


def read_config(argv: list[str]) -> tuple[Config, Path]:
    """The settings that the flags ask for, and the work directory.

    Raises:
        RequestError: an unknown flag, a config file that is missing or fails, a setting that is wrong.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default=str(QUICKSTART))
    file = Path(parser.parse_known_args(argv)[0].config)
    if not file.is_file():
        raise RequestError(f"there is no config file {file}{_nearest_file(file)}")
    try:
        rest = FLAGS(["jaxlm.main", *argv])
        settings = FLAGS.config
    except Exception as error:  # the config file is a program: it can raise anything
        reason = " ".join(str(error.args[0] if error.args else type(error).__name__).split())
        raise RequestError(f"{reason} (python -m jaxlm.main --help shows the flags)") from error
    if rest[1:]:
        raise RequestError(f"unexpected argument {rest[1]!r}: flags begin with --")
    return from_config_dict(settings), Path(FLAGS.workdir or Path("runs", file.stem))


def _nearest_file(file: Path) -> str:
    known = [str(other) for other in Path(file.parent).glob("*.py")] or [str(QUICKSTART)]
    nearest = difflib.get_close_matches(str(file), known, n=1)
    return f": did you mean {nearest[0]}?" if nearest else f": there is {', '.join(sorted(known))}"


def open_data(config: Config) -> TokenFiles:
    """The token files of the config, prepared if missing.

    Raises:
        RequestError: they do not fit, or the corpus cannot be had.
    """
    name = Path(config.data.corpus.split(",")[0]).stem
    directory = Path(config.data.dir or Path("data", f"{name}-{config.model.vocab_size}"))
    prepare_if_missing(config.data.corpus, directory, config.model.vocab_size, config.data.validation)
    return open_tokens(directory, config.model.vocab_size, config.model.context)


def claim(workdir: Path, config: Config) -> None:
    """Writes the settings to `workdir`/config.json, unless it holds checkpoints of other settings.

    Raises:
        RequestError: it does.
        RunError: the directory cannot be written.
    """
    file = workdir / "config.json"
    has_checkpoints = any((workdir / "checkpoints").glob("*"))
    if has_checkpoints and file.exists() and (found := differences(json.loads(file.read_text()), config)):
        raise RequestError(f"{workdir} belongs to another run: {'; '.join(found)}; choose another --workdir")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(".tmp")
        beside.write_text(json.dumps(to_dict(config), indent=2) + "\n")
        beside.replace(file)
    except OSError as error:
        raise RunError(f"cannot write to {workdir} ({error.strerror}): choose another --workdir") from error


def header(config: Config, parameters: int, device: str, tokens: TokenFiles, workdir: Path) -> str:
    """What will run, in three lines."""
    total = config.max_steps * config.tokens_per_step
    return (
        f"{parameters:,} parameters on {device}, {config.model.dtype}\n"
        f"{config.max_steps:,} steps of {config.tokens_per_step:,} tokens: {total / parameters:.3g} a parameter,"
        f" {total / len(tokens.train):.3g} epochs of {len(tokens.train):,}\n"
        f"Data in {tokens.directory}, work in {workdir}"
    )


def main(argv: list[str]) -> None:
    """Runs the command with `argv`, the words after its name. Raises RequestError, RunError and Stopped."""
    if {"--help", "-h"} & set(argv):
        print(f"{__doc__}\n{FLAGS.get_help()}\nThe settings are those of jaxlm/config.py.")
        return
    config, workdir = read_config(argv)
    tokens = open_data(config)

    from jaxlm import backend  # jax only now: what came before answers in a moment, and needs no device
    from jaxlm.loop import Run
    from jaxlm.model import parameter_count

    device = backend.start(config.platform)
    claim(workdir, config)
    model = dataclasses.replace(config.model, dtype=backend.compute_dtype(config.model.dtype, device))
    config = dataclasses.replace(config, model=model)
    training = Run(config, workdir, tokens, device)
    print(header(config, parameter_count(training.state.params), backend.describe(device), tokens, workdir), flush=True)
    training.train()


if __name__ == "__main__":
    run(main)
