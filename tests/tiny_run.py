"""A run so small that it takes a second: what the tests of the shell train, and how they look at what it left."""

import contextlib
import io
import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from jaxlm.config import Config, from_config_dict
from jaxlm.core.train_step import TrainState, init_state
from jaxlm.device import backend
from jaxlm.main import main
from jaxlm.run.checkpoint import Checkpoints

CONFIG = """
from jaxlm.config import default_config


def get_config():
    config = default_config()
    config.batch_size = 2
    config.grad_accum_steps = 2
    config.max_steps = 12
    config.eval_interval = 4
    config.save_interval = 3
    config.generation_interval = 6
    config.max_checkpoints = 5
    sizes = dict(vocab_size=300, context=16, layers=2, heads=2, width=16, mlp_width=24, precision="float32")
    config.model.update(sizes)
    config.optimizer.warmup_steps = 2
    config.optimizer.learning_rate = 1e-2
    config.data.corpus = "text.txt"
    config.data.dir = "tokens"
    config.data.val_fraction = 0.1
    config.data.eval_sequences = 4
    config.sample.prompts = ("Once", "The king", "A", "She", "Far", "It was", "He", "My")
    config.sample.texts = 3
    config.sample.tokens = 5
    return config
"""


def write_text(path: Path, words: str = "the king dog cat sun old man saw went home é 日本", seed: int = 0) -> None:
    choice = np.random.default_rng(seed).choice(words.split(), (150, 10))
    path.write_text(".\n".join(" ".join(line) for line in choice), encoding="utf-8")


@contextlib.contextmanager
def workplace(tmp_path_factory) -> Iterator[Path]:
    """Makes a directory with a text and `tiny.py`, and works in it."""
    place, before = tmp_path_factory.mktemp("place"), Path.cwd()
    (place / "tiny.py").write_text(CONFIG)
    write_text(place / "text.txt")
    os.chdir(place)
    yield place
    os.chdir(before)


def train(workdir: str, *flags: str, config: str = "tiny.py") -> str:
    """Runs the command in the current directory; gives its console output, also to an error's `console`."""
    console = io.StringIO()
    with contextlib.redirect_stdout(console):
        try:
            main(["--config", config, "--workdir", workdir, *flags])
        except BaseException as error:
            error.console = console.getvalue()
            raise
    return console.getvalue()


def rows(path: Path | str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def config_of(workdir: Path | str) -> Config:
    settings = json.loads(Path(workdir, "config.json").read_text())
    return from_config_dict(settings)


def saved_state(workdir: Path | str, step: int) -> TrainState:
    like = jax.eval_shape(lambda: init_state(config_of(workdir)))
    return Checkpoints(Path(workdir)).state(step, like, jax.sharding.SingleDeviceSharding(jax.devices()[0]))


def resolved(config: Config) -> Config:
    """As the training command computes it here."""
    return backend.resolve_run(config, jax.devices()[0])


def assert_same_bits(tree, other) -> None:
    leaves, others = jax.tree.leaves(tree), jax.tree.leaves(other)
    assert len(leaves) == len(others) > 0
    for a, b in zip(leaves, others, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())


def listing(directory: Path) -> dict[str, bytes | None]:
    """Every path below a directory, with what files hold."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


def is_one_line(error: BaseException) -> bool:
    return bool(str(error).strip()) and len(str(error).splitlines()) == 1


@contextlib.contextmanager
def disk_room(size: int) -> Iterator[None]:
    """No file may grow beyond this."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
