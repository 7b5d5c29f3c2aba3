"""The saves of a run: when one is due, that its rows are on the disk before it, and what became of it."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

from jaxlm.config import Config
from jaxlm.core.train_step import TrainState
from jaxlm.data.token_files import TokenFiles
from jaxlm.errors import RunError, disk_advice
from jaxlm.run.checkpoint import Checkpoints
from jaxlm.run.clock import Clock
from jaxlm.run.events import Event, NotSavedEvent, SavedEvent, SavingEvent
from jaxlm.run.resume import describe_run

LOOK_SECONDS = 5.0  # between two looks at whether the work directory is still there


class Saver:
    """Saves after the steps of an interval, after the last step, and `save_minutes` after the last save."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        tokens: TokenFiles,
        checkpoints: Checkpoints,
        clock: Clock,
        step: int,
        sync_records: Callable[[], None],
        emit: Callable[[Event], None],
    ):
        """`step` is that of the newest checkpoint; 0: there is none. `sync_records` may raise OSError."""
        self._config, self._workdir, self._tokens, self._checkpoints = config, workdir, tokens, checkpoints
        self._clock, self._sync_records, self._emit = clock, sync_records, emit
        self.saved_step = step
        self._saving_step: int | None = None  # of the save in progress
        self._failure = ""
        self._last_save = self._last_look = clock.seconds()
        self._place = os.stat(workdir)

    def due(self, step: int) -> bool:
        """Whether to save after `step`."""
        c = self._config
        by_time = 0 < 60 * c.save_minutes <= self._clock.seconds() - self._last_save
        return step % c.save_interval == 0 or step == c.max_steps or by_time

    def save(self, step: int, state: TrainState) -> None:
        """Starts a save, after the rows of all steps up to this one are on the disk. Raises RunError as `look`."""
        self.report(wait=True)
        self._last_save = self._clock.seconds()
        self.look()
        try:
            self._sync_records()
        except OSError as error:
            reason = f"{self._workdir} cannot store the rows up to it ({error.strerror or error}): {disk_advice(error)}"
            self._fail(step, reason)
            return
        self._checkpoints.save(step, state, describe_run(self._config, self._tokens, self._last_save))
        self._saving_step = step
        self._emit(SavingEvent(step))

    def report(self, wait: bool = False) -> None:
        """Reports that the save in progress is complete or failed, once that is known. Raises RunError as `look`."""
        if self._saving_step is None or (self._checkpoints.saving() and not wait):
            return
        step, self._saving_step = self._saving_step, None
        try:
            self._checkpoints.wait()
        except (OSError, RunError) as error:
            self.look()
            self._fail(step, str(error))
        else:
            self.saved_step = step
            self._emit(SavedEvent(step))

    def finish(self, step: int, state: TrainState) -> None:
        """Returns once `step`, whose state this is, is saved, now or before. Raises RunError if it cannot be."""
        self.report(wait=True)
        if self.saved_step != step:
            self.save(step, state)
            self.report(wait=True)
        self.look()
        if self.saved_step != step:
            raise RunError(f"{self._failure}; the same command resumes from step {self.saved_step}")

    def look_now_and_then(self) -> None:
        """As `look`, every few seconds."""
        if self._clock.seconds() - self._last_look >= LOOK_SECONDS:
            self.look()

    def look(self) -> None:
        """Raises RunError if the work directory is no longer in its place."""
        self._last_look = self._clock.seconds()
        try:
            there = os.path.samestat(os.stat(self._workdir), self._place)
        except OSError as error:  # a disk that does not answer is for the saves to report
            there = error.errno not in (errno.ENOENT, errno.ENOTDIR)
        if not there:
            last = f"step {self.saved_step} is saved for sure" if self.saved_step else "no step is saved for sure"
            raise RunError(
                f"{self._workdir} was renamed, deleted or unmounted, so the run stops ({last}): put it back or name its"
                " new place with --workdir, and the same command resumes"
            )

    def _fail(self, step: int, reason: str) -> None:
        self._failure = f"step {step} is not saved, {reason}"
        self._emit(NotSavedEvent(step, reason))
