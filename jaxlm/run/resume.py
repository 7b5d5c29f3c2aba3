"""How a session of training begins: from the newest whole checkpoint or from the start, after checks of both."""

import os
import shutil
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxlm.config import Config, differences, from_config_dict, to_dict
from jaxlm.core.optimizer import make_schedule
from jaxlm.core.train_step import TrainState, init_state
from jaxlm.data.token_files import TokenFiles
from jaxlm.device import distributed
from jaxlm.device.mesh import shardings
from jaxlm.errors import UsageError
from jaxlm.interop.huggingface import WEIGHTS, check_init, read_params
from jaxlm.run.checkpoint import Checkpoints, checkpoint_bytes
from jaxlm.run.memory import state_shapes
from jaxlm.run.records import record_bytes
from jaxlm.run.workdir import FINAL_MODEL, NEVER_SAVED, existing_parent, fixed_differences, saved_steps


def check_room(workdir: Path, config: Config) -> None:
    """Raises UsageError if the disk lacks the room for what a run has yet to write."""
    shapes = state_shapes(config)
    saved = saved_steps(workdir)
    steps = max(config.max_steps - max(saved, default=0), 0)
    saves = -(-steps // config.save_interval) + (steps > 0)  # with a rolling one
    milestones = config.max_steps // config.keep_every if config.keep_every else 0
    most = config.max_checkpoints + milestones + 2  # a rolling one, and the next until the oldest is deleted
    best = 2 * config.keep_best  # and the next best
    new = min(saves, most - len(saved))
    is_new = steps or not os.path.lexists(workdir / FINAL_MODEL / WEIGHTS)
    model = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes.params)) if is_new else 0
    needed = (max(new, 0) + best) * checkpoint_bytes(shapes) + model + record_bytes(config, steps)
    free = shutil.disk_usage(existing_parent(workdir)).free
    if free < needed:
        raise UsageError(
            f"this run will write {needed / 1e9:.2f} GB to {workdir}, where {free / 1e9:.2f} GB are free: make room,"
            " lower max_checkpoints or choose another --workdir"
        )


def describe_run(config: Config, tokens: TokenFiles, seconds: float) -> dict[str, Any]:
    """The item `meta` of a checkpoint: the settings, fingerprints of the tokens and their source, seconds trained.

    It has the vocabulary of an own tokenizer.
    """
    train, val = tokens.sha256
    fingerprint = {"tokenizer": config.data.tokenizer, "train_sha256": train, "val_sha256": val}
    vocabulary, meta = {}, tokens.meta
    if meta and meta.tokenizer_sha256:
        fingerprint["tokenizer_sha256"] = meta.tokenizer_sha256
        vocabulary = {"vocabulary": tokens.tokenizer.to_bytes().decode()}
    source = {"text": meta.source, "sha256": meta.source_sha256} if meta else {"tokens": str(tokens.directory)}
    return {"config": to_dict(config), "tokens": fingerprint, "source": source, "seconds": seconds} | vocabulary


def restore_or_init(
    checkpoints: Checkpoints, config: Config, tokens: TokenFiles, device: jax.Device, mesh: Mesh | None = None
) -> tuple[TrainState, float, list[str]]:
    """Restores the newest whole checkpoint on the mesh or else on `device`, or initialises the state.

    Initial parameters are those of the folder `config.init_from`, or are drawn: on the CPU, or on a mesh by each device
    for its part. One seed gives the same model on every device. Returns the state, the seconds trained before, and
    lines that say what was skipped and which settings have changed.

    Raises UsageError if the newest whole checkpoint does not fit the settings or the tokens, if none is whole, or if
    the folder does not fit the settings.
    """
    shapes = state_shapes(config, mesh)
    places = shardings(config, mesh, device, shapes)

    def load(step: int) -> tuple[TrainState, dict[str, Any]]:
        meta = checkpoints.meta(step)
        _check_same_run(f"{checkpoints.directory / str(step)}", meta, config, tokens)
        return checkpoints.state(step, shapes, places), meta

    mark = checkpoints.directory.parent / NEVER_SAVED
    steps = distributed.of_first("steps", checkpoints.steps())
    if not steps:
        if distributed.is_first():
            mark.touch()
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            state = init_state(config, mesh)
        if config.init_from:
            check_init(config, tokens.tokenizer)
            state = state._replace(params=read_params(Path(config.init_from), config.model))
        return jax.device_put(state, places), 0.0, checkpoints.clean_up(0)
    (state, meta), skipped = checkpoints.newest(load, steps)
    if distributed.is_first():
        mark.unlink(missing_ok=True)
    notes = [f"Skipped {reason}" for reason in skipped] + checkpoints.clean_up(int(state.step))
    return state, meta["seconds"], notes + describe_changes(meta["config"], config, int(state.step))


def describe_changes(saved: Any, config: Config, step: int) -> list[str]:
    """A line for each setting that differs from the `saved` ones of `step`, and for the learning rate if it does.

    Where more `max_steps` raise the rate of a run that had ended, another line offers a second schedule.
    """
    lines = [
        f"{change.name} is {change.value!r:.100}, was {change.saved!r:.100} up to step {step}"
        for change in differences(saved, config)
        if not change.name.startswith("mesh.")  # any layout gives the same numbers
    ]
    former, jumps = from_config_dict(saved), False
    for name in ("learning_rate", "muon_learning_rate")[: 1 + (config.optimizer.name == "muon")]:
        before, now = (
            getattr(run.optimizer, name) * float(make_schedule(run.optimizer, run.max_steps)(step))
            for run in (former, config)
        )
        if before != now:
            jumps = now > before
            lines.append(
                f"so the {name.replace('_', ' ')} {'rises' if jumps else 'falls'} from {before:.1e} to {now:.1e}"
            )
    if jumps and step == former.max_steps and config.optimizer.lr_restart_step != step:
        lines.append(
            f"This run had ended, and its rate jumps: add --config.optimizer.lr_restart_step={step} for a second"
            f" schedule instead, with a warm-up to {config.optimizer.lr_restart_ratio} of the peak, and down again"
        )
    return lines


def _check_same_run(checkpoint: str, meta: dict[str, Any], config: Config, tokens: TokenFiles) -> None:
    mismatches = fixed_differences(meta["config"], config)
    for name, value in describe_run(config, tokens, 0)["tokens"].items():
        if meta["tokens"].get(name) != value:
            mismatches.append(f"{name} of the data is {value}, the checkpoint has {meta['tokens'].get(name)}")
    if mismatches:
        raise UsageError(
            f"{checkpoint} belongs to another run: {'; '.join(mismatches)}; restore these or choose another --workdir"
        )
