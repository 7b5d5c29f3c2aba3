"""The losses of the first steps of a small run, compared with committed ones: a refactoring must not change them.

The runs are those of SETTINGS, and the same with others. `recipe` has all settings of Muon and an average of
the weights, and runs beyond the warm-up of its momentum; its last number is the average's loss on the last batch, per
token.

`python -m tests.run.test_golden_losses` writes those of the installed version of jax. A version that has none is
compared with the newest one that has.
"""

import json
from pathlib import Path

import jax
import pytest
from packaging.version import Version

from jaxlm.config import default_config, from_config_dict
from jaxlm.core.train_step import init_state, make_eval_step, make_train_step
from jaxlm.data.token_files import train_batch_stream
from jaxlm.device import backend
from jaxlm.main import open_data
from jaxlm.prepare import prepare

GOLDEN = Path(__file__).parents[1] / "golden_losses"
TOLERANCE = 2e-3  # relative; CPUs sum in different orders, which shows in the fourth digit after 50 steps

SETTINGS = {
    "max_steps": 680,
    "batch_size": 16,
    "grad_accum_steps": 1,
    "microbatch_chunks": 1,
    "model": {
        "vocab_size": 4096,
        "context": 128,
        "layers": 3,
        "heads": 2,
        "width": 128,
        "mlp_width": 384,
        "output_init": "zero",
        "remat": False,
    },
    "optimizer": {
        "name": "muon",
        "learning_rate": 1e-2,
        "muon_learning_rate": 6.5e-3,
        "warmup_steps": 10,
        "lr_schedule": "linear",
        "lr_decay_fraction": 0.55,
        "min_lr_ratio": 0.0,
        "b1": 0.85,
        "b2": 0.99,
        "muon_momentum": 0.85,
    },
    "data": {"corpus": "novels", "val_fraction": 0.05},
}
RECIPE = {"muon_momentum": 0.95, "muon_momentum_warmup": 30, "muon_b2": 0.95, "muon_weight_decay": 0.4}
RECIPE |= {"weight_decay": 0.0, "cautious": True, "average": 0.9}
RUNS: dict[str, tuple[int, dict]] = {  # steps and settings, by the start of the file's name
    "jax": (20, {}),
    "qk_norm-jax": (20, {"model": {"qk_norm": True}}),
    "recipe-jax": (50, {"optimizer": RECIPE}),
}


def first_losses(directory, steps, changes):
    """The losses [steps] of SETTINGS with changes; the data is prepared in `directory`.

    With an average of the weights, its loss on the last batch follows.
    """
    settings = default_config()
    settings.update(SETTINGS)
    settings.update(changes)
    settings.data.dir = str(directory)
    config = from_config_dict(settings)
    prepare(config.data.corpus, directory, config.model.vocab_size, config.data.val_fraction)
    tokens = open_data(config)
    config = backend.resolve_run(config, jax.devices("cpu")[0])
    batches = train_batch_stream(tokens.train, config.model.context, config.batch_size, config.seed, 0)
    train_step, state, losses = make_train_step(config), init_state(config), []
    for _ in range(steps):
        ids_BT = next(batches)
        state, metrics = train_step(state, ids_BT)
        losses.append(float(metrics.loss))
    if state.average:
        inputs_BT, targets_BT = ids_BT[:, :-1], ids_BT[:, 1:]
        losses.append(float(make_eval_step(config)(state.weights, inputs_BT, targets_BT)) / targets_BT.size)
    return losses


@pytest.mark.slow
@pytest.mark.usefixtures("optimized_compilation")
@pytest.mark.parametrize("name", RUNS)
def test_the_first_losses_are_the_committed_ones(tmp_path, name):
    file = GOLDEN / f"{name}-{jax.__version__}.json"
    if not file.is_file():  # a version of jax that nobody has written them for
        file = max(GOLDEN.glob(f"{name}-*.json"), key=lambda file: Version(file.stem.removeprefix(f"{name}-")))
    expected, losses = json.loads(file.read_text()), first_losses(tmp_path, *RUNS[name])
    assert losses == pytest.approx(expected, rel=TOLERANCE), (
        "The first losses have changed. If you meant to change no number (a refactoring, a"
        " faster kernel), this is a bug. If you meant to (another initialisation, schedule, default or order of the"
        f" data), run `python -m {__name__}` under each version of jax in {GOLDEN.name}/, commit"
        " the files with the change, and say in its message why."
    )


if __name__ == "__main__":
    import tempfile

    GOLDEN.mkdir(exist_ok=True)
    for name, run in RUNS.items():
        with tempfile.TemporaryDirectory() as place:
            losses = first_losses(Path(place), *run)
        (GOLDEN / f"{name}-{jax.__version__}.json").write_text(json.dumps(losses) + "\n")
