"""The loss of runs as a picture, by matplotlib."""

from pathlib import Path
from typing import Any

from jaxlm.errors import UsageError
from jaxlm.pages.page import MARK
from jaxlm.storage import atomic

COLOURS = ("#2f5bd0", "#b3470f", "#157a58", "#8f3aa8", "#7d6500", "#b02a5b")  # as the page's
QUIET = "#596273"
MARK_KEYS = {".png": "Software", ".svg": "Creator", ".pdf": "Creator"}  # of the metadata of each format


def require_matplotlib() -> None:
    """Raises UsageError if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError("a picture needs matplotlib: pip install 'jaxlm[plots]'") from error


def write_loss(path: Path, runs: list[dict[str, Any]]) -> None:
    """Draws training and validation loss against steps. The suffix of `path` says the format.

    Args:
        path: the file, *.png, *.svg or *.pdf.
        runs: from `jaxlm.pages.run.read_run`.

    Raises UsageError for another suffix, OSError if the file cannot be written.
    """
    from matplotlib.figure import Figure

    suffix = path.suffix.lower()
    if suffix not in MARK_KEYS:
        raise UsageError(f"{path} is no picture: its name must end in one of {', '.join(MARK_KEYS)}")
    figure = Figure(figsize=(7.2, 3.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for number, run in enumerate(runs):
        _draw(axes, run, number, len(runs) > 1)
    axes.set_xlabel("step", color=QUIET)
    axes.set_ylabel("loss, nats a token", color=QUIET)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(color="#ecece8")
    axes.tick_params(colors=QUIET, length=0)
    axes.spines[:].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False)
    with atomic.new_file(path) as temporary:
        figure.savefig(temporary, format=suffix[1:], metadata={MARK_KEYS[suffix]: MARK.decode()})


def _draw(axes: Any, run: dict[str, Any], number: int, several: bool) -> None:
    first, second = (COLOURS[(number + i * (not several)) % len(COLOURS)] for i in (0, 1))
    prefix = f"{run['name']}, " if several else ""
    training, validation = run["metrics"].get("loss"), run["metrics"].get("val_loss")
    if training:
        if "mean" in training:
            axes.plot(*_xy(training), color=first, alpha=0.3, linewidth=0.8)
        axes.plot(*_xy(training.get("mean", training)), color=first, linewidth=1.8, label=f"{prefix}training")
    if validation:
        steps, losses = _xy(validation)
        label = f"{prefix}validation, at the end {losses[-1]:.3f}"
        style = {"linestyle": "--" if several else "-", "marker": "o" if len(steps) < 100 else "", "markersize": 3.5}
        axes.plot(steps, losses, color=second, linewidth=1.2, label=label, **style)


def _xy(points: dict[str, Any]) -> tuple[list[float], list[float]]:
    return points["step"], [float("nan") if value is None else value for value in points["value"]]
