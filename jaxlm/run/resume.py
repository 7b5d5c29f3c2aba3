"""How a session of training begins: from the newest whole checkpoint or from the start, after checks of both."""

import shutil
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from jaxlm.config import Config, differences, to_dict
from jaxlm.core.train_step import TrainState, init_state
from jaxlm.data.token_files import TOKENIZER_NAME, TokenFiles
from jaxlm.errors import UsageError
from jaxlm.interop.huggingface import check_init, read_params
from jaxlm.run.checkpoint import DIRECTORY, Checkpoints, checkpoint_bytes
from jaxlm.run.memory import state_shapes

RECORD_BYTES = 1000  # per step, of metrics.jsonl, samples.jsonl and TensorBoard's events


def check_room(workdir: Path, config: Config) -> None:
    """Raises UsageError if the disk lacks the room for what a run has yet to write."""
    shapes = state_shapes(config)
    saved_steps = [int(path.name) for path in (workdir / DIRECTORY).glob("*") if path.name.isdigit()]
    steps = max(config.max_steps - max(saved_steps, default=0), 0)
    saves = -(-steps // config.save_interval) + 1  # with a rolling one
    milestones = config.max_steps // config.keep_every if config.keep_every else 0
    most = config.max_checkpoints + milestones + 2  # with a rolling one, and the next until the oldest is deleted
    new = min(saves, most - len(saved_steps))
    model = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes.params))
    needed = max(new, 0) * checkpoint_bytes(shapes) + model + RECORD_BYTES * steps
    existing = next(path for path in (workdir, *workdir.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UsageError(
            f"this run will write {needed / 1e9:.2f} GB to {workdir}, where {free / 1e9:.2f} GB are free: make room,"
            " lower max_checkpoints or choose another --workdir"
        )


def describe_run(config: Config, tokens: TokenFiles, seconds: float) -> dict[str, Any]:
    """The item `meta` of a checkpoint: the settings, fingerprints of the tokens, seconds trained."""
    train, val = tokens.sha256
    fingerprint = {"tokenizer": TOKENIZER_NAME, "train_sha256": train, "val_sha256": val}
    return {"config": to_dict(config), "tokens": fingerprint, "seconds": seconds}


def restore_or_init(
    checkpoints: Checkpoints, config: Config, tokens: TokenFiles, device: jax.Device
) -> tuple[TrainState, float, list[str]]:
    """Restores the newest whole checkpoint on `device`, or initialises the state.

    Initial parameters are those of the folder `config.init_from`, or are drawn on the CPU, so that one seed gives the
    same model on every device. Returns the state, the seconds trained before, and lines that say what was skipped.

    Raises UsageError if the newest whole checkpoint does not fit the settings or the tokens, if none is whole, or if
    the folder does not fit the settings.
    """

    def load(step: int) -> tuple[TrainState, float]:
        meta = checkpoints.meta(step)
        _check_same_run(f"{checkpoints.directory / str(step)}", meta, config, tokens)
        return checkpoints.state(step, state_shapes(config), SingleDeviceSharding(device)), meta["seconds"]

    steps = checkpoints.steps()
    if not steps:
        with jax.default_device(jax.devices("cpu")[0]):
            state = init_state(config)
        if config.init_from:
            check_init(config)
            state = state._replace(params=read_params(Path(config.init_from), config.model))
        return jax.device_put(state, device), 0.0, checkpoints.clean_up(0)
    (state, seconds), skipped = checkpoints.newest(load, steps)
    notes = [f"Skipped {reason}" for reason in skipped] + checkpoints.clean_up(int(state.step))
    return state, seconds, notes


def _check_same_run(checkpoint: str, meta: dict[str, Any], config: Config, tokens: TokenFiles) -> None:
    mismatches = differences(meta["config"], config)
    for name, value in describe_run(config, tokens, 0)["tokens"].items():
        if meta["tokens"].get(name) != value:
            mismatches.append(f"{name} of the data is {value}, the checkpoint has {meta['tokens'].get(name)}")
    if mismatches:
        raise UsageError(
            f"{checkpoint} belongs to another run: {'; '.join(mismatches)}; restore these or choose another --workdir"
        )
