"""A run in trackio, a dashboard that keeps its projects on this machine; nothing here runs unless it is asked for."""

import contextlib
import io
from pathlib import Path
from typing import Any

from jaxlm.config import INT32_MAX, Config
from jaxlm.errors import UsageError
from jaxlm.run.events import EvaluationEvent, Event, SamplesEvent, StepEvent
from jaxlm.run.records import flat_settings, step_scalars
from jaxlm.run.workdir import RECORDS, saved_steps
from jaxlm.storage.jsonl import rows_up_to


class Trackio:
    """The listener that logs to trackio: the numbers of metrics.jsonl, the samples and the settings.

    A session that resumes continues the run of its work directory. It logs no step again that an earlier session
    reached.
    """

    def __init__(self, project: str, workdir: Path, config: Config):
        """Opens the run. Raises UsageError if trackio is not installed, and whatever trackio raises."""
        try:
            import trackio  # only now: it is an extra, and takes seconds
        except ImportError as error:
            raise UsageError(f"--trackio needs the package trackio ({error}): pip install trackio") from error
        resumes = bool(saved_steps(workdir))
        steps = [row["step"] for row in rows_up_to(workdir / RECORDS[0], INT32_MAX)] if resumes else []
        self._config, self._last, self._as_markdown = config, max(steps, default=0), trackio.Markdown
        options: Any = {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False}
        with contextlib.redirect_stdout(io.StringIO()):  # it says where it writes
            self._run = trackio.init(
                project,
                name=workdir.absolute().name,
                config=flat_settings(config),
                resume="allow" if resumes else "never",
                **options,
            )

    def __call__(self, event: Event) -> None:
        match event:
            case StepEvent(step):
                self._log(step, step_scalars(event, self._config.optimizer))
            case EvaluationEvent(step):
                self._log(step, vars(event))
            case SamplesEvent(step, samples):
                self._log(step, {"samples": self._as_markdown("\n\n".join(text for _, text in samples))})

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if step > self._last:
            self._run.log({name: value for name, value in values.items() if name != "step"}, step=step)

    def close(self) -> None:
        """Returns once trackio has written everything. The run has ended, so nothing else prints."""
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()
