"""The command that trains: python -m jaxlm.main --config configs/m2_60m.py [--workdir DIR] [--config.batch_size=16]

Goes on from the newest checkpoint in the work directory; prepares the text its config names when that is missing.
"""

import dataclasses
import difflib
import json
import re
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from jaxlm.command import ArgumentParser, run
from jaxlm.config import Config, check_name, differences, from_config_dict, to_dict
from jaxlm.errors import RequestError, RunError
from jaxlm.prepare import prepare
from jaxlm.tokenizer import load_tokenizer
from jaxlm.tokens import TRAIN, TokenFiles, open_tokens

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.py"


def read_config(argv: list[str]) -> tuple[Config, Path]:
    """The settings that the flags ask for, and the work directory.

    Raises:
        RequestError: an unknown flag, a config file that is missing or fails, a setting that is wrong.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=QUICKSTART)
    known, others = parser.parse_known_args(argv)
    if not known.config.is_file():
        raise RequestError(f"there is no config file {known.config}{_nearest_file(known.config)}")
    for setting in re.findall(r"(?m)^--config\.([\w.]+)", "\n".join(others)):
        check_name(setting)
    words = ["jaxlm.main", f"--config={known.config}", *others]
    values = define_flags(words)
    try:
        rest = values(words)
        settings = values.config
    except Exception as error:  # the config file is a program: it can raise anything
        text = str(error) or type(error).__name__
        reason = " ".join((text[text.rindex('File "') :] if "Traceback" in text else text).split())
        raise RequestError(f"{reason} (python -m jaxlm.main --help shows the flags)") from error
    if rest[1:]:
        raise RequestError(f"unexpected argument {rest[1]!r}: flags begin with --")
    return from_config_dict(settings), Path(values.workdir or Path("runs", known.config.stem))


def define_flags(words: list[str]) -> flags.FlagValues:
    """The flags of this command, not yet parsed; `words` is the whole command line, for the settings in it."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", str(QUICKSTART), "config file; --config.NAME=VALUE changes a setting", values, sys_argv=words
    )
    flags.DEFINE_string("workdir", "", "work directory; empty: runs/NAME-OF-THE-CONFIG", flag_values=values)
    return values


def _nearest_file(file: Path) -> str:
    known = [str(other) for other in Path(file.parent).glob("*.py")] or [str(QUICKSTART)]
    nearest = difflib.get_close_matches(str(file), known, n=1)
    return f": did you mean {nearest[0]}?" if nearest else f": there is {', '.join(sorted(known))}"


def open_data(config: Config) -> TokenFiles:
    """The token files of the config: those in `data.dir` as they are, else the corpus's, prepared if missing.

    Raises:
        RequestError: they do not fit, or the corpus cannot be had.
    """
    c, vocab_size = config.data, config.model.vocab_size
    name = re.sub(r"\W+", "-", c.corpus).strip("-")[:60]
    directory = Path(c.dir or Path("data", f"{name}-{vocab_size}"))
    if c.corpus and not (c.dir and (directory / TRAIN).is_file()):
        prepare(c.corpus, directory, vocab_size, c.validation)
    return open_tokens(directory, vocab_size, config.model.context)


def claim(workdir: Path, config: Config) -> None:
    """Writes the settings to `workdir`/config.json, unless it holds checkpoints of other settings.

    Raises:
        RequestError: it does.
        OSError: the directory cannot be written.
    """
    file = workdir / "config.json"
    if any((workdir / "checkpoints").glob("*")) and file.exists():
        try:
            saved = json.loads(file.read_text())
        except ValueError as error:
            raise RequestError(f"{file} is damaged: delete it, each checkpoint holds the settings too") from error
        if found := differences(saved, config):
            raise RequestError(f"{workdir} belongs to another run: {'; '.join(found)}; choose another --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(".tmp")
    beside.write_text(json.dumps(to_dict(config), indent=2) + "\n")
    beside.replace(file)


def main(argv: list[str]) -> None:
    """Runs the command with `argv`, the words after its name. Raises RequestError, RunError and Stopped."""
    if {"--help", "-h"} & set(argv):
        print(f"{__doc__}{define_flags([]).get_help()}\nThe settings are those of jaxlm/config.py.")
        return
    config, workdir = read_config(argv)
    tokens = open_data(config)

    from jaxlm import backend  # jax only now: what came before answers in a moment, and needs no device
    from jaxlm.generate import encode_prompts
    from jaxlm.loop import Run

    encode_prompts(load_tokenizer(config.model.vocab_size), config.sample.prompts, config.model.context)
    device = backend.start(config.platform)
    resolved = dataclasses.replace(config, model=backend.resolve(config.model, device))
    try:
        claim(workdir, config)
        Run(resolved, workdir, tokens, device).train()
    except OSError as error:
        raise RunError(
            f"cannot write to {workdir} ({error.strerror}): make room or choose another --workdir"
        ) from error


if __name__ == "__main__":
    run(main)
