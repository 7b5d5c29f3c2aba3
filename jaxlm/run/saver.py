"""When a run saves, and what becomes of each save. The rows of its steps are on the disk before it starts."""

from collections.abc import Callable
from typing import Any

from jaxlm.config import Config
from jaxlm.core.train_step import TrainState
from jaxlm.device import distributed
from jaxlm.errors import RunError, disk_advice
from jaxlm.run.checkpoint import Checkpoints
from jaxlm.run.clock import Clock
from jaxlm.run.events import Event, NotSavedEvent, SavedEvent, SavingEvent

LOOK_SECONDS = 5.0  # between two looks at whether the work directory is still in its place


class Saver:
    """Saves after the steps of an interval, after the last step, and `save_minutes` after the last save."""

    def __init__(
        self,
        config: Config,
        checkpoints: Checkpoints,
        clock: Clock,
        step: int,
        describe: Callable[[float], dict[str, Any]],
        sync_records: Callable[[], None],
        emit: Callable[[Event], None],
    ):
        """`step` is that of the newest checkpoint; 0: there is none.

        `describe` gives the `meta` of a checkpoint from the seconds trained. `sync_records` returns once the rows of
        all steps are on the disk, and may raise OSError.
        """
        self._config, self._checkpoints, self._clock = config, checkpoints, clock
        self._describe, self._sync_records, self._emit = describe, sync_records, emit
        self.saved_step = step
        self._saving_step: int | None = None  # of the save in progress
        self._failure = ""
        self._last_save = self._last_look = clock.seconds()

    def is_late(self) -> bool:
        """Whether the last save was `save_minutes` ago."""
        return 0 < 60 * self._config.save_minutes <= self._clock.seconds() - self._last_save

    def due(self, step: int, is_late: bool = False) -> bool:
        """Whether to save after `step`."""
        return step % self._config.save_interval == 0 or step == self._config.max_steps or is_late

    def save(self, step: int, state: TrainState) -> None:
        """Starts a save once the rows of all steps up to this one are on the disk. Raises as `check_place`."""
        self.report(wait=True)
        self._last_save = self._clock.seconds()
        self.check_place()
        try:
            with distributed.all_or_none("rows"):
                self._sync_rows()
        except RunError as error:
            self._fail(step, str(error))
            return
        self._checkpoints.save(step, state, self._describe(self._last_save))
        self._saving_step = step
        self._emit(SavingEvent(step))

    def _sync_rows(self) -> None:
        try:
            self._sync_records()
        except OSError as error:
            reason = f"cannot store the rows up to it ({error.strerror or error}): {disk_advice(error)}"
            raise RunError(f"{self._checkpoints.workdir} {reason}") from error

    def report(self, wait: bool = False) -> None:
        """Reports the save in progress once it is complete or has failed. Raises as `check_place`."""
        if self._clock.seconds() - self._last_look >= LOOK_SECONDS:
            self.check_place()
        if self._saving_step is None or (self._checkpoints.saving() and not wait):
            return
        step, self._saving_step = self._saving_step, None
        try:
            self._checkpoints.wait()
        except (OSError, RunError) as error:
            self.check_place()
            self._fail(step, str(error))
        else:
            self.saved_step = step
            self._emit(SavedEvent(step))

    def finish(self, step: int, state: TrainState) -> None:
        """Saves the state of `step` unless it is saved, and waits. Raises RunError if that fails."""
        self.report(wait=True)
        if self.saved_step != step:
            self.save(step, state)
            self.report(wait=True)
        self.check_place()
        if self.saved_step != step:
            raise RunError(f"{self._failure}; the same command resumes from step {self.saved_step}")

    def check_place(self) -> None:
        """Raises RunError if the work directory or its checkpoints are no longer in their place."""
        self._last_look = self._clock.seconds()
        if not self._checkpoints.in_place():
            workdir, folder = self._checkpoints.workdir, self._checkpoints.directory
            gone, advice = folder, "put it back"
            if not workdir.is_dir():
                gone, advice = workdir, "put it back or name its new place with --workdir"
            last = f"step {self.saved_step} is the last known to be saved" if self.saved_step else "no step is saved"
            raise RunError(
                f"{gone} was renamed, deleted or unmounted, so the run stops ({last}): {advice}, and the same command"
                " resumes"
            )

    def _fail(self, step: int, reason: str) -> None:
        self._failure = f"step {step} is not saved, {reason}"
        self._emit(NotSavedEvent(step, reason))
