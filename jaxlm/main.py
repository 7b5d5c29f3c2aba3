"""The command that trains: python -m jaxlm.main --config configs/m2_60m.py [--workdir DIR] [--config.batch_size=16]

Goes on from the newest checkpoint in the work directory; prepares the text its config names when that is missing.
"""

import difflib
import glob
import json
import os
import re
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from jaxlm import durable
from jaxlm.command import ArgumentParser, run
from jaxlm.config import Config, check_name, differences, from_config_dict, to_dict
from jaxlm.errors import RequestError, RunError
from jaxlm.huggingface import check_init
from jaxlm.lock import only_writer
from jaxlm.prepare import prepare
from jaxlm.tokenizer import load_tokenizer
from jaxlm.tokens import TRAIN, TokenFiles, open_tokens

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.py"


def read_config(argv: list[str]) -> tuple[Config, Path]:
    """The settings that the flags ask for, and the work directory. Raises RequestError as `read_flags`."""
    return read_flags(argv)[:2]


def read_flags(argv: list[str]) -> tuple[Config, Path, bool]:
    """The settings that the flags ask for, the work directory, and whether to begin a run that does not fit.

    Raises:
        RequestError: an unknown flag, a config file that is missing or fails, a setting that is wrong.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=QUICKSTART)
    known, others = parser.parse_known_args(argv)
    if not os.path.isfile(known.config):
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
    return from_config_dict(settings), Path(values.workdir or Path("runs", known.config.stem)), values.force


def define_flags(words: list[str]) -> flags.FlagValues:
    """The flags of this command, not yet parsed; `words` is the whole command line, for the settings in it."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", str(QUICKSTART), "config file; --config.NAME=VALUE changes a setting", values, sys_argv=words
    )
    flags.DEFINE_string("workdir", "", "work directory; empty: runs/NAME-OF-THE-CONFIG", flag_values=values)
    flags.DEFINE_bool("force", False, "begin a run though the machine has not the memory for it", flag_values=values)
    return values


def _nearest_file(file: Path) -> str:
    known = sorted(str(file.parent / name) for name in glob.glob("*.py", root_dir=file.parent))
    nearest = difflib.get_close_matches(str(file), known, n=1)
    if nearest:
        return f": did you mean {nearest[0]}?"
    return f": there is {', '.join(known)}" if known else ": name one with --config"


def data_directory(config: Config) -> Path:
    """Where the token files of the config are, or will be."""
    name = re.sub(r"\W+", "-", config.data.corpus).strip("-")[:60]
    return Path(config.data.dir or Path("data", f"{name}-{config.model.vocab_size}"))


def open_data(config: Config) -> TokenFiles:
    """The token files of the config: those in `data.dir` as they are, else the corpus's, prepared if missing.

    Raises:
        RequestError: they do not fit, or the corpus cannot be had.
    """
    c, vocab_size, directory = config.data, config.model.vocab_size, data_directory(config)
    if c.corpus and not (c.dir and os.path.isfile(directory / TRAIN)):
        prepare(c.corpus, directory, vocab_size, c.validation)
    return open_tokens(directory, vocab_size, config.model.context)


def check_workdir(workdir: Path, config: Config) -> None:
    """Raises RequestError if `workdir` is the place of a run of other settings."""
    file = workdir / "config.json"
    if not os.path.lexists(file):
        return
    try:
        saved = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{file} is damaged: delete it, each checkpoint holds the settings too") from error
    if found := differences(saved, config):
        raise RequestError(f"{workdir} belongs to another run: {'; '.join(found)}; choose another --workdir")


def main(argv: list[str]) -> None:
    """Runs the command with `argv`, the words after its name. Raises RequestError, RunError and Stopped."""
    if {"--help", "-h"} & set(argv):
        print(f"{__doc__}{define_flags([]).get_help()}\nThe settings are those of jaxlm/config.py.")
        return
    config, workdir, force = read_flags(argv)
    if config.init_from and not os.path.lexists(workdir / "config.json"):  # once begun, a run has what it needs
        check_init(config)
    tokens = open_data(config)

    import jax  # only now: what came before answers in a moment, and needs no device

    from jaxlm import backend, soundness
    from jaxlm.fit import check_memory
    from jaxlm.generate import encode_prompts
    from jaxlm.loop import Run
    from jaxlm.planning import in_short
    from jaxlm.resume import check_room

    encode_prompts(load_tokenizer(config.model.vocab_size), config.sample.prompts, config.model.context)
    check_workdir(workdir, config)
    device = backend.start(config.platform, config.deterministic)
    resolved = backend.resolve_run(config, device)
    check_room(workdir, resolved)
    if not force:
        check_memory(resolved, device)

    def ready(compiled: Any, step: int) -> str:
        if not force:
            check_memory(resolved, device, compiled)
        durable.write_file(workdir / "config.json", (json.dumps(to_dict(config), indent=2) + "\n").encode())
        return in_short(resolved, device, workdir, compiled, step)

    try:
        if device.platform != "cpu":
            soundness.require(resolved, device, say=print)
        workdir.mkdir(parents=True, exist_ok=True)
        with only_writer(workdir):
            training = Run(resolved, workdir, tokens, device, ready)
            training.train()
    except OSError as error:
        raise RunError(f"cannot write to {workdir} ({error.strerror}): make room or choose another place") from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise RunError("out of memory: set model.remat and slices, or a smaller batch_size") from error
        reason = str(error).splitlines()[0]
        raise RunError(f"the device failed ({reason}): the same command goes on from the last checkpoint") from error


if __name__ == "__main__":
    run(main)
