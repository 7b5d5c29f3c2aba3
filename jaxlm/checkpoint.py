"""Checkpoints of a run: `checkpoints/STEP/`, written by orbax in the background, the last few kept.

Each holds the items `params` (the model's parameters), `optimizer` (its state and the counters) and `meta` (JSON:
the configuration, which tokens the run reads, seconds trained). One is taken only between two optimizer steps, where
the accumulated gradients are zero and need no room.
"""

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxlm.errors import RequestError, RunError
from jaxlm.step import TrainState

DIRECTORY = "checkpoints"

for name in ("absl", "asyncio"):  # they print the tracebacks of errors that are raised here as well
    logging.getLogger(name).setLevel(logging.CRITICAL)


class Checkpoints:
    """The checkpoints of one work directory."""

    def __init__(self, workdir: Path, max_to_keep: int | None = None):
        self.directory = (workdir / DIRECTORY).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        """The steps of which there is a whole checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, meta: Mapping[str, Any]) -> None:
        """Starts saving; returns once the state's buffers may be reused. Raises RunError when the last save failed."""
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            optimizer=ocp.args.StandardSave(_optimizer_item(state)),
            meta=ocp.args.JsonSave(dict(meta)),
        )
        with self._disk_errors():
            self._manager.save(step, args=items)

    def saving(self) -> bool:
        """Whether a save is under way."""
        return self._manager.is_saving_in_progress()

    def wait(self) -> None:
        """Waits until the last save is whole. Raises RunError when it failed."""
        with self._disk_errors():
            self._manager.wait_until_finished()

    def meta(self, step: int) -> dict[str, Any]:
        """What the checkpoint says of itself. Raises RequestError when it cannot be read."""
        return self._restore(step, meta=ocp.args.JsonRestore())["meta"]

    def params(self, step: int, like: Any, device: jax.Device) -> Any:
        """The parameters alone, on `device`; `like` gives the tree and its shapes."""
        return self._restore(step, params=ocp.args.StandardRestore(_on(device, like)))["params"]

    def state(self, step: int, like: TrainState, device: jax.Device) -> TrainState:
        """The whole training state, on `device`; `like` gives the tree and its shapes."""
        items = self._restore(
            step,
            params=ocp.args.StandardRestore(_on(device, like.params)),
            optimizer=ocp.args.StandardRestore(_on(device, _optimizer_item(like))),
        )
        saved = items["optimizer"]
        with jax.default_device(device):
            acc_grads = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like.opt_state.acc_grads)
            skip_state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like.opt_state.skip_state)
            opt_state = like.opt_state._replace(
                mini_step=jnp.int32(0),
                gradient_step=saved["step"],
                inner_opt_state=saved["moments"],
                acc_grads=acc_grads,
                skip_state=skip_state,
            )
            return TrainState(items["params"], opt_state, saved["batches"], jnp.int32(0), jnp.float32(0))

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # orbax and tensorstore raise many kinds for a damaged checkpoint
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RequestError(
                f"checkpoint {self.directory / str(step)} cannot be read ({reason}): delete it to use the one before"
            ) from error

    @contextlib.contextmanager
    def _disk_errors(self):
        try:
            yield
        except Exception as error:  # as above: a full disk comes as OSError, ValueError or an XLA error
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RunError(f"cannot save to {self.directory}: {reason}") from error


def _optimizer_item(state: TrainState) -> dict[str, Any]:
    return {"moments": state.opt_state.inner_opt_state, "step": state.step, "batches": state.batches}


def _on(device: jax.Device, tree: Any) -> Any:
    sharding = jax.sharding.SingleDeviceSharding(device)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
