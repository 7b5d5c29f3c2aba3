"""The losses of first steps, compared with committed ones: a refactoring must not change them.

The runs are the quickstart, and the quickstart with other settings of its model.
`python -m tests.run.test_golden_losses` writes the losses for the installed version of jax. A version that has none is
compared with the newest one that has.
"""

import json
from pathlib import Path

import jax
import pytest
from packaging.version import Version

from configs import quickstart
from jaxlm.config import from_config_dict
from jaxlm.core.train_step import init_state, make_train_step
from jaxlm.data.token_files import train_batch_stream
from jaxlm.device import backend
from jaxlm.main import open_data
from jaxlm.prepare import prepare

GOLDEN = Path(__file__).parents[1] / "golden_losses"
CASES = {"": {}, "qk_norm-": {"qk_norm": True}}  # settings of the model, by what the names of their files start with
STEPS = 50
TOLERANCE = 2e-3  # relative; CPUs sum in different orders, which shows in the fourth digit after 50 steps


def first_losses(directory, changes):
    """The losses [STEPS] of the quickstart, with these settings of its model, on its data, prepared in `directory`."""
    settings = quickstart.get_config()
    settings.model.update(changes)
    settings.data.dir = str(directory)
    config = from_config_dict(settings)
    prepare(config.data.corpus, directory, config.model.vocab_size, config.data.val_fraction)
    tokens = open_data(config)
    config = backend.resolve_run(config, jax.devices("cpu")[0])
    batches = train_batch_stream(tokens.train, config.model.context, config.batch_size, config.seed, 0)
    train_step, state, losses = make_train_step(config), init_state(config), []
    for _ in range(STEPS):
        state, metrics = train_step(state, next(batches))
        losses.append(float(metrics.loss))
    return losses


@pytest.mark.slow
@pytest.mark.usefixtures("optimized_compilation")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.rstrip("-") or "quickstart")
def test_the_first_losses_are_the_committed_ones(tmp_path, case):
    file = GOLDEN / f"{case}jax-{jax.__version__}.json"
    if not file.is_file():  # a version of jax that nobody has written them for
        file = max(GOLDEN.glob(f"{case}jax-*.json"), key=lambda file: Version(file.stem.removeprefix(f"{case}jax-")))
    expected, losses = json.loads(file.read_text()), first_losses(tmp_path, CASES[case])
    assert losses == pytest.approx(expected, rel=TOLERANCE), (
        "The first losses of the quickstart have changed. If you meant to change no number (a refactoring, a"
        " faster kernel), this is a bug. If you meant to (another initialisation, schedule, default or order of the"
        f" data), run `python -m {__name__}` under each version of jax in {GOLDEN.name}/, commit"
        " the files with the change, and say in its message why."
    )


if __name__ == "__main__":
    import tempfile

    GOLDEN.mkdir(exist_ok=True)
    for case, changes in CASES.items():
        with tempfile.TemporaryDirectory() as place:
            losses = first_losses(Path(place), changes)
        (GOLDEN / f"{case}jax-{jax.__version__}.json").write_text(json.dumps(losses) + "\n")
