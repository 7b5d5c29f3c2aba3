"""The checkpoint of the step with the lowest validation loss, apart from those that newer ones replace."""

import logging
import shutil
from pathlib import Path
from typing import Any

import jax

from jaxlm.core.parameters import Params
from jaxlm.core.train_step import TrainState
from jaxlm.device import distributed
from jaxlm.errors import CorruptCheckpointError, RunError
from jaxlm.run.checkpoint import Checkpoints
from jaxlm.run.workdir import BEST


class BestCheckpoint:
    """The one checkpoint in `best/`. A save that fails costs no more than itself: the next best step is another try."""

    def __init__(self, workdir: Path, step: int):
        """Opens it, and deletes the one of a step after `step`, from which the run resumes."""
        self._checkpoints = Checkpoints(workdir / BEST, max_to_keep=1)
        if distributed.is_first():
            for later in (each for each in self._checkpoints.steps() if each > step):
                shutil.rmtree(self._checkpoints.directory / str(later), ignore_errors=True)
        distributed.exchange("best")

    def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
        """Replaces it by the state after `step`, in the background."""
        self.wait()
        if not self._holds(step):
            self._checkpoints.save(step, state, meta)

    def _holds(self, step: int) -> bool:
        return distributed.of_first("best step", step in self._checkpoints.steps())

    def wait(self) -> None:
        """Waits for the save in progress. Why one failed is in the library's log."""
        try:
            self._checkpoints.wait()
        except (OSError, RunError) as error:
            logging.getLogger(__name__).warning("the best step is not kept: %s", error)

    def weights(self, step: int, like: Params) -> Params | None:
        """The weights of `step`, shaped and placed as `like`; None if the checkpoint is of another step or damaged."""
        if not self._holds(step):
            return None
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), like)
        try:
            return self._checkpoints.weights(step, shapes, jax.tree.map(lambda leaf: leaf.sharding, like))
        except CorruptCheckpointError:
            return None
