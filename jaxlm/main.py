"""The command that trains: python -m jaxlm.main [--config m2_60m] [--workdir DIR] [--config.batch_size=16]

--config is a config file or the name of a shipped preset (quickstart, own_text, m2_60m). Training resumes from the
newest checkpoint in the work directory. If the data is missing, the corpus that the config names is prepared first:
--config.data.corpus takes files, folders and patterns, each as a word of its own.
--show prints every setting with its value, what set it and what it is for, and starts nothing.
"""

import contextlib
import itertools
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from platform import python_version
from textwrap import fill
from typing import Any

from jaxlm.cli import ArgumentParser, Flags, define_flags, read_flags, run, run_errors
from jaxlm.config import Config, DataConfig, groups, settings_of, to_dict
from jaxlm.data.corpus import source_changed
from jaxlm.data.directories import check_named_directory, data_directory, own_directory, plain_directory
from jaxlm.data.encode import TRAINING_FLAGS
from jaxlm.data.token_files import TokenFiles, open_tokens, read_meta
from jaxlm.data.tokenizer import encode_prompts
from jaxlm.device import distributed
from jaxlm.errors import UsageError
from jaxlm.interop.huggingface import check_init, own_vocabulary
from jaxlm.prepare import prepare
from jaxlm.run.events import Listener
from jaxlm.run.quiet import log_libraries, quiet_libraries
from jaxlm.run.workdir import FINAL_MODEL, check_workdir, saved_hashes, saved_settings, saved_steps
from jaxlm.storage import atomic
from jaxlm.storage.lock import only_writer
from jaxlm.terminal import console, printable


def open_data(config: Config, own: Path | None = None, corpus_is_named: bool = False) -> TokenFiles:
    """The token files in `data.dir`, in `own`, or else those of the corpus, which are prepared if missing.

    Args:
        config: the settings.
        own: the directory of the tokens of the run that is resumed. It is read even if the corpus has changed since.
        corpus_is_named: whether the corpus must be that of `data.dir`.

    Raises UsageError if the files do not fit the config, or the corpus cannot be read.
    """
    data, size = config.data, config.model
    if data.dir:
        check_named_directory(config, corpus_is_named)
        directory = Path(data.dir)
    elif own and (meta := read_meta(own)) and meta.fits_files(own):
        directory = own
    else:
        vocabulary = own_vocabulary(config)
        directory = data_directory(config, vocabulary)
        if directory != (plain := plain_directory(config)[0]) and plain.exists() and not directory.exists():
            print(printable(f"{plain} has the tokens of another text, split or vocabulary, and stays"))
        prepare(
            data.corpus,
            directory,
            size.vocab_size,
            data.val_fraction,
            TRAINING_FLAGS,
            data.tokenizer,
            data.exclude,
            vocabulary,
            size.context,
        )
    return open_tokens(directory, size.vocab_size, size.context, data.tokenizer)


def _has_changed(data: DataConfig, sha256: str | None) -> bool:
    """Whether the hash of the corpus is no longer `sha256`; an older checkpoint has none."""
    try:
        return sha256 is not None and source_changed(data.corpus, sha256, data.exclude)
    except UsageError:  # it cannot be read
        return True


def main(argv: list[str]) -> None:
    """Runs the command; `argv` is the command-line arguments. Raises UsageError, RunError and Stopped."""
    if {"--help", "-h"} & set(argv):
        print(f"{__doc__}{define_flags([]).get_help()}")
        return
    flags = read_flags(argv)
    if flags.show:
        _show(flags)
        return
    with distributed.joined(flags.coordinator, flags.processes, flags.process):
        _run(argv, flags)


def _run(argv: list[str], flags: Flags) -> None:
    """Trains as the flags say, in each process of the run."""
    config, workdir = flags.config, flags.workdir
    distributed.check_same("settings", json.dumps(to_dict(config)))
    with distributed.first_goes_first("data"):
        config, tokens = _choose(argv, flags)
    distributed.check_same("tokens", json.dumps(tokens.sha256))
    _train(config, workdir, flags.force, tokens, flags.trackio)


def _choose(argv: list[str], flags: Flags) -> tuple[Config, TokenFiles]:
    """The config, with the sizes that `hours` chooses, and the tokens, which are prepared if they are missing."""
    config, workdir = flags.config, flags.workdir
    if config.hours:
        from jaxlm.planner import sizes  # only now, as below

        if distributed.is_several():
            raise UsageError("hours measures one process: set the sizes instead, and hours to 0")
        with run_errors(workdir):
            config = sizes.resolve(config, workdir, flags.overridden, say=lambda line: print(printable(line)))
    saved = check_workdir(workdir, config)
    resumes = bool(saved_steps(workdir))
    if config.init_from and not resumes:
        check_init(config)
    own = _own_tokens(argv, workdir, saved, config) if resumes else None
    return config, open_data(config, own, _names_corpus(argv, config))


def _show(flags: Flags) -> None:
    """Prints every setting: what set it (its default, the file, a flag or `hours`), its name, its value and meaning.

    A value in the file that equals the default counts as the default. What `hours` has not chosen yet has no value.
    """
    config, chosen, began = flags.config, set[str](), False
    if config.hours:
        from jaxlm.planner import sizes

        chosen, began = {*sizes.CHOSEN}.difference(flags.overridden), saved_settings(flags.workdir) is not None
        config = sizes.resolve(config, flags.workdir, flags.overridden, say=print) if began else config
    terminal = console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    terminal.print(printable(f"{flags.config_file}, work directory {flags.workdir}"))
    for prefix, group in groups(config).items():
        terminal.print("\n" + fill(group.__doc__, 80))
        for name, value, default, meaning, _ in settings_of(group, prefix):
            source = "flag" if name in flags.overridden else "default" if value == default else "file"
            source = "hours" if name in chosen else source
            usual = "" if value == default or isinstance(value, tuple) else f" (default {default!r})"
            shown = f"{value!r}{usual}" if began or source != "hours" else "chosen when the run begins"
            terminal.print(_lines(f"{source:9}{name} = {shown}"), style="" if source == "default" else "bold")
            terminal.print(_lines(f"{'':9}{meaning}"), style="dim")


def _lines(text: str) -> str:
    """The text in lines of at most 80 columns, all but the first indented. A longer word, as of a path, stays whole."""
    return fill(text, 80, subsequent_indent=" " * 9, break_long_words=False, break_on_hyphens=False)


def _own_tokens(argv: list[str], workdir: Path, saved: Mapping[str, Any], config: Config) -> Path | None:
    """The directory of the tokens of the run that is resumed, None for that of a corpus that it names.

    It says if the text has changed. Raises UsageError if the tokens are gone too: no checkpoint fits what it gives now.
    """
    text, train = saved_hashes(workdir)
    own = own_directory(saved, config, train)
    if not own or config.data.dir:
        return own
    meta = read_meta(own)
    if not _has_changed(config.data, meta.source_sha256 if meta and not text else text):
        return own
    if not (meta and meta.fits_files(own) and train in (None, meta.train.sha256)):
        raise UsageError(
            f"{own} has lost the tokens of this run, and {config.data.corpus} has changed: restore one of them, or"
            " choose another --workdir"
        )
    when = "" if (workdir / FINAL_MODEL).exists() else ", once this run has ended"
    print(printable(f"{config.data.corpus} has changed: the run resumes with the tokens that it began with, in {own}"))
    print(printable(f"To train its model on the new text{when}: {_command_for_new_text(argv, workdir, config)}"))
    return own


def _command_for_new_text(argv: list[str], workdir: Path, config: Config) -> str:
    """The command of a new run that starts from the final model of `workdir`.

    It has the flags of this one, but not those that train a run longer.
    """
    longer = ("config.max_steps", "config.optimizer.lr_restart_step") if config.optimizer.lr_restart_step else ()
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("workdir", "config.init_from", *longer):
        parser.add_argument(f"--{name}", f"-{name}")
    rest = parser.parse_known_args(argv)[1]
    new = next(path for n in itertools.count(2) if not os.path.lexists(path := f"{workdir}-{n}"))
    start = f"--config.init_from={workdir / FINAL_MODEL}"
    return shlex.join(["python", "-m", "jaxlm.main", *rest, "--workdir", new, start])


def _names_corpus(argv: list[str], config: Config) -> bool:
    """Whether a person named the corpus: by a flag, or in a config file whose `data.dir` no flag replaces."""
    names = {word.partition("=")[0].lstrip("-") for word in argv}
    in_file = config.data.corpus != DataConfig().corpus and "config.data.dir" not in names
    return in_file or "config.data.corpus" in names


def _train(config: Config, workdir: Path, force: bool, tokens: TokenFiles, project: str) -> None:
    from jaxlm.device import backend, numerics  # only now, so that --help and most errors need neither jax nor a device
    from jaxlm.device.mesh import make_mesh, share
    from jaxlm.planner.memory import cached_benchmark, check_memory, known_memory
    from jaxlm.planner.report import summary
    from jaxlm.run.records import append_session
    from jaxlm.run.resume import check_room
    from jaxlm.run.trainer import Trainer

    encode_prompts(tokens.tokenizer, config.sample.prompts, config.model.context)
    device = backend.start(config.platform, config.deterministic)
    resolved = backend.resolve_run(config, device)
    kind = [device.platform, device.device_kind]
    advice = "use machines of one kind, and set --config.model.remat if their memory differs"
    distributed.check_same("settings for its device", json.dumps([kind, to_dict(resolved)]), advice)
    mesh = make_mesh(resolved, device)
    check_room(workdir, resolved)
    benchmark = cached_benchmark(resolved, device)
    if not force:
        check_memory(known_memory(resolved, device, benchmark), device)

    def before_first_step(compiled: Any, step: int) -> str:
        memory = known_memory(resolved, device, benchmark, compiled)
        if not force:
            check_memory(memory, device)
        if distributed.is_first():
            atomic.write_file(workdir / "config.json", (json.dumps(to_dict(config), indent=2) + "\n").encode())
            append_session(workdir, _describe_session(resolved, device, tokens, step))
        return summary(resolved, device, workdir, memory, step)

    with run_errors(workdir):
        if device.platform != "cpu":
            numerics.require(share(resolved), device, say=print)
        workdir.mkdir(parents=True, exist_ok=True)
        first = distributed.is_first()
        with only_writer(workdir) if first else contextlib.nullcontext(), log_libraries(workdir):
            distributed.check_shared(workdir)
            listeners = _trackio(project, workdir, config) if project and first else ()
            Trainer(resolved, workdir, tokens, device, before_first_step, listeners, mesh).train()


def _trackio(project: str, workdir: Path, config: Config) -> Sequence[Listener]:
    """The listener that logs to a project of trackio; none if trackio fails, as no run depends on it."""
    from jaxlm.run.tracker import Trackio

    try:
        return [Trackio(project, workdir, config)]
    except UsageError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(printable(f"The run is not logged to trackio ({reason})"))
        return ()


def _describe_session(config: Config, device: Any, tokens: TokenFiles, step: int) -> dict[str, Any]:
    """The row of sessions.jsonl. `device` is a jax.Device."""
    from jaxlm.device.backend import describe
    from jaxlm.device.plugins import version_of
    from jaxlm.planner.estimate import parameters_by_part
    from jaxlm.planner.report import planned_seconds

    count = config.mesh.devices
    return {
        "step": step,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": f"{count} x " * (count > 1) + describe(device),
        "precision": config.model.precision,
        "versions": {name: version_of(name) for name in ("jaxlm", "jax", "jaxlib")} | {"python": python_version()},
        "parameters": sum(parameters_by_part(config.model).values()),
        "data_tokens": len(tokens.train),
        "plan": planned_seconds(config, device),
    }


if __name__ == "__main__":
    quiet_libraries()
    run(main)
