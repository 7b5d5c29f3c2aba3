"""The command that trains: python -m jaxlm.main [--config m2_60m] [--workdir DIR] [--config.batch_size=16]

--config is a config file or the name of a shipped preset (m2_60m, quickstart). Training resumes from the newest
checkpoint in the work directory. If the data is missing, the corpus that the config names is prepared first.
"""

import json
import os
from pathlib import Path
from typing import Any

from jaxlm.cli import define_flags, read_flags, run, run_errors
from jaxlm.config import Config, differences, to_dict
from jaxlm.data.encode import TRAINING_FLAGS
from jaxlm.data.token_files import TRAIN, TokenFiles, data_directory, open_tokens
from jaxlm.data.tokenizer import encode_prompts, load_tokenizer
from jaxlm.errors import UsageError
from jaxlm.interop.huggingface import check_init
from jaxlm.prepare import prepare
from jaxlm.run.quiet import quiet_libraries
from jaxlm.storage import atomic
from jaxlm.storage.lock import only_writer


def open_data(config: Config) -> TokenFiles:
    """The token files of the config: those in `data.dir` if they exist, else the corpus's, prepared if missing.

    Raises:
        UsageError: the files do not fit the config, or the corpus cannot be read.
    """
    data, vocab_size, directory = config.data, config.model.vocab_size, data_directory(config)
    if data.corpus and not (data.dir and os.path.isfile(directory / TRAIN)):
        prepare(data.corpus, directory, vocab_size, data.val_fraction, TRAINING_FLAGS)
    return open_tokens(directory, vocab_size, config.model.context)


def check_workdir(workdir: Path, config: Config) -> None:
    """Raises UsageError if `workdir` belongs to a run with other fixed settings."""
    file = workdir / "config.json"
    if not os.path.lexists(file):
        return
    try:
        saved = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file} is damaged: delete it, each checkpoint holds the settings too") from error
    if changes := differences(saved, config):
        raise UsageError(f"{workdir} belongs to another run: {'; '.join(changes)}; choose another --workdir")


def main(argv: list[str]) -> None:
    """Runs the command; `argv` is the command-line arguments. Raises UsageError, RunError and Stopped."""
    if {"--help", "-h"} & set(argv):
        print(f"{__doc__}{define_flags([]).get_help()}\nThe settings are those of jaxlm/config.py.")
        return
    config, workdir, force = read_flags(argv)
    if config.init_from and not os.path.lexists(workdir / "config.json"):  # a resumed run does not read it
        check_init(config)
    _train(config, workdir, force, open_data(config))


def _train(config: Config, workdir: Path, force: bool, tokens: TokenFiles) -> None:
    from jaxlm.device import backend, numerics  # only now, so that --help and most errors need neither jax nor a device
    from jaxlm.planner.memory import check_memory
    from jaxlm.planner.report import summary
    from jaxlm.run.resume import check_room
    from jaxlm.run.trainer import Trainer

    encode_prompts(load_tokenizer(config.model.vocab_size), config.sample.prompts, config.model.context)
    check_workdir(workdir, config)
    device = backend.start(config.platform, config.deterministic)
    resolved = backend.resolve_run(config, device)
    check_room(workdir, resolved)
    if not force:
        check_memory(resolved, device)

    def before_first_step(compiled: Any, step: int) -> str:
        if not force:
            check_memory(resolved, device, compiled)
        atomic.write_file(workdir / "config.json", (json.dumps(to_dict(config), indent=2) + "\n").encode())
        return summary(resolved, device, workdir, compiled, step)

    with run_errors(workdir):
        if device.platform != "cpu":
            numerics.require(resolved, device, say=print)
        workdir.mkdir(parents=True, exist_ok=True)
        with only_writer(workdir):
            Trainer(resolved, workdir, tokens, device, before_first_step).train()


if __name__ == "__main__":
    quiet_libraries()
    run(main)
