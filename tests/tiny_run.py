"""A run so small that it takes a second: what the tests of the shell train, and how they look at what it left."""

import atexit
import contextlib
import dataclasses
import functools
import io
import json
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxlm.config import Config, DataConfig, SampleConfig, from_config_dict
from jaxlm.core.train_step import TrainState, init_state, make_eval_step, make_train_step
from jaxlm.device import backend
from jaxlm.main import main
from jaxlm.prepare import prepare
from jaxlm.run import memory, resume, trainer
from jaxlm.run.checkpoint import Checkpoints
from jaxlm.run.memory import state_shapes

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


CODE = "__import__('os').mkdir('ran')"  # a word of the text that makes a directory if it is evaluated
WORDS = f"the king dog cat sun old man saw went home é 日本 {CODE}"


def write_text(path: Path, words: str = WORDS, seed: int = 0) -> None:
    choice = np.random.default_rng(seed).choice(words.split(), (150, 10))
    path.write_text(".\n".join(" ".join(line) for line in choice), encoding="utf-8")


@contextlib.contextmanager
def workplace(tmp_path_factory, trained: bool = False) -> Iterator[Path]:
    """Makes a directory with a text and `tiny.py`, and works in it; `trained` adds `tokens` and the run in `run`.

    That run (12 steps, checkpoints of 3, 6, 9 and 12) is a copy of the one that this process trains once.
    """
    place = tmp_path_factory.mktemp("place")
    if trained:
        shutil.copytree(trained_run()[0], place, dirs_exist_ok=True)
    else:
        _write_inputs(place)
    with contextlib.chdir(place):
        yield place


@functools.cache
def trained_run() -> tuple[Path, str]:
    """Trains the run once in this process; returns its directory, to copy from, and what its console showed."""
    place = Path(tempfile.mkdtemp(prefix="jaxlm-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    _write_inputs(place)
    with contextlib.chdir(place):
        prepare("text.txt", Path("tokens"), 300, 0.1)
        return place, train("run", share="plain")


def _write_inputs(place: Path) -> None:
    (place / "tiny.py").write_text(CONFIG)
    write_text(place / "text.txt")


def train(workdir: str, *flags: str, config: str = "tiny.py", share: str = "") -> str:
    """Runs the command in the current directory; returns its console output, also as an error's `console`.

    Runs of the same `share` compile once if they differ only in their start, data, samples and intervals.
    """
    console = io.StringIO()
    with contextlib.redirect_stdout(console), shared_compilation(share) if share else contextlib.nullcontext():
        try:
            main(["--config", config, "--workdir", workdir, *flags])
        except BaseException as error:
            error.console = console.getvalue()
            raise
    return console.getvalue()


@contextlib.contextmanager
def shared_compilation(name: str) -> Iterator[None]:
    """Reuses what runs in contexts of this name compile; training alone would clear it and compile again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_train_step", lambda config, *_: _SharedStep(_key(config), name))
        patch.setattr(trainer, "make_eval_step", lambda config, *_: _eval_step(_key(config), name))
        for module in (memory, resume):
            patch.setattr(module, "init_state", _init_state)
        patch.setattr(backend, "keep_freed_memory", lambda device, temporaries: None)
        yield


class _SharedStep:
    """A training step that is compiled once for each key."""

    compiled: ClassVar[dict[tuple[Config, str], Any]] = {}

    def __init__(self, config: Config, name: str):
        self.key = config, name

    def lower(self, *arguments: Any) -> "_SharedStep":
        if self.key not in self.compiled:
            self.compiled[self.key] = make_train_step(self.key[0]).lower(*arguments).compile()
        return self

    def compile(self) -> Any:
        return self.compiled[self.key]


def _key(config: Config) -> Config:
    names = ("eval_interval", "generation_interval", "save_interval", "max_checkpoints", "max_nonfinite_microbatches")
    plain = {"save_minutes": 0.0, "keep_every": 0, "keep_best": False, "hours": 0.0, "seed": 0, "init_from": ""}
    plain |= {"data": DataConfig(), "sample": SampleConfig()}
    return dataclasses.replace(config, **dict.fromkeys(names, 1), **plain)


def _init_state(config: Config, mesh: Mesh | None = None) -> TrainState:
    return init_state(dataclasses.replace(_key(config), seed=config.seed), mesh)


@functools.cache
def _eval_step(config: Config, name: str) -> Any:
    return make_eval_step(config)


def rows(path: Path | str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def config_of(workdir: Path | str) -> Config:
    settings = json.loads(Path(workdir, "config.json").read_text())
    return from_config_dict(settings)


def saved_state(workdir: Path | str, step: int) -> TrainState:
    like = state_shapes(config_of(workdir))
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
