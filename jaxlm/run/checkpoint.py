"""Checkpoints of a run: `checkpoints/STEP/`, written by orbax in a thread, the last few kept.

Each holds the items `params` (the model's parameters), `optimizer` (its state and the counters) and `meta` (JSON:
the configuration, which tokens the run reads, seconds trained, checksums of all arrays), and in `files.json` the hash
of every file of these. So a file that is damaged is found before anything reads it, and numbers that are not those of
the training step are found however that came about. A checkpoint is taken only between two optimizer steps, where the
accumulated gradients are zero and need no room. Training waits for none of this: what is written is a copy of the
state that the device made.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxlm.core.checksum import checksums
from jaxlm.core.train_step import TrainState
from jaxlm.errors import CorruptCheckpointError, RunError, UsageError
from jaxlm.storage import atomic

DIRECTORY = "checkpoints"
FILES = "files.json"
META_KEYS = {"config", "tokens", "seconds", "checksums"}
_UNFINISHED = "*.orbax-checkpoint-tmp*"

T = TypeVar("T")

# the tracebacks of errors that are raised here as well
logging.getLogger("absl").setLevel(logging.CRITICAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def _say_unraisable(unraisable: Any) -> None:
    """What Python does, but for tensorstore's calls into the event loop of a save or restore that orbax gave up."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


sys.unraisablehook = _say_unraisable


class Checkpoints:
    """The checkpoints of one work directory."""

    def __init__(self, workdir: Path, max_to_keep: int | None = None):
        self.directory = (workdir / DIRECTORY).absolute()
        self._max_to_keep = max_to_keep
        self._manager = self._new_manager()
        self._thread = ThreadPoolExecutor(1)
        self._save: Future[None] | None = None  # the last one, until it was waited for

    def steps(self) -> list[int]:
        """The steps of which there is a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, meta: Mapping[str, Any]) -> None:
        """Starts saving, when the last save is over; the state's buffers may be reused at once.

        Raises:
            RunError: the last save failed.
        """
        self.wait()
        items = {"params": state.params, "optimizer": _optimizer_item(state)}
        sums = {name: checksums(item) for name, item in items.items()}
        self._save = self._thread.submit(self._write, step, _copy(items), sums, dict(meta))

    def saving(self) -> bool:
        """Whether a save is under way."""
        return self._save is not None and not self._save.done()

    def wait(self) -> None:
        """Waits until the last save is whole, and on the disk for good.

        Raises:
            RunError: there was no room for it, or the disk failed. The earlier checkpoints are as they were.
        """
        save, self._save = self._save, None
        if save:
            save.result()

    def meta(self, step: int) -> dict[str, Any]:
        """What the checkpoint says of itself. Raises CorruptCheckpointError when it is not what was saved."""
        meta = self._restore(step, meta=ocp.args.JsonRestore())["meta"]
        if not isinstance(meta, dict) or not meta.keys() >= META_KEYS:
            raise CorruptCheckpointError(f"its meta lacks one of {', '.join(sorted(META_KEYS))}")
        return meta

    def params(self, step: int, like: Any, sharding: jax.sharding.Sharding) -> Any:
        """The parameters alone, laid out by `sharding`; `like` gives the tree and its shapes.

        Raises CorruptCheckpointError when they are not what was saved, RunError when they cannot be read here and now.
        """
        return self._arrays(step, sharding, params=like)["params"]

    def state(self, step: int, like: TrainState, sharding: jax.sharding.Sharding) -> TrainState:
        """The whole training state, laid out by `sharding`; `like` gives the tree and its shapes.

        Raises CorruptCheckpointError when it is not what was saved, RunError when it cannot be read here and now.
        """
        items = self._arrays(step, sharding, params=like.params, optimizer=_optimizer_item(like))
        saved = items["optimizer"]
        rest = like._replace(params={}, opt_state=like.opt_state._replace(inner_opt_state=()))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=sharding), rest)
        opt_state = zeros.opt_state._replace(gradient_step=saved["step"], inner_opt_state=saved["moments"])
        return zeros._replace(params=items["params"], opt_state=opt_state, batches=saved["batches"])

    def newest(self, load: Callable[[int], T], steps: Sequence[int]) -> tuple[T, list[str]]:
        """What `load` makes of the last of `steps` whose checkpoint is whole, and why those after it were skipped.

        Raises UsageError, with all the reasons, when none is.
        """
        skipped: list[str] = []
        for step in reversed(steps):
            try:
                return load(step), skipped
            except CorruptCheckpointError as error:
                skipped.append(f"{DIRECTORY}/{step}: {error}")
        raise UsageError(
            f"no checkpoint in {self.directory.parent} can be used ({'; '.join(skipped)}): choose another --workdir"
        )

    def clean_up(self, newest: int) -> list[str]:
        """Moves checkpoints after step `newest` aside and deletes what unfinished saves left; says what it did.

        Raises OSError.
        """
        done = []
        for path in sorted(self.directory.glob(_UNFINISHED)):
            shutil.rmtree(path)
            done.append(f"Skipped {DIRECTORY}/{path.name}: its save was never finished, so it is deleted")
        for step in [step for step in self.steps() if step > newest]:
            place = self.directory / f"{step}.damaged"
            shutil.rmtree(place, ignore_errors=True)
            (self.directory / str(step)).rename(place)
            done.append(f"Moved {DIRECTORY}/{step} to {DIRECTORY}/{place.name}: delete it when you have no use for it")
        self._manager.reload()
        return done

    def _new_manager(self) -> ocp.CheckpointManager:
        background = ocp.options.AsyncOptions(post_finalization_callback=self._seal_unfinished)
        return ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=self._max_to_keep, async_options=background),
        )

    def _write(self, step: int, items: dict[str, Any], sums: dict[str, jax.Array], meta: dict[str, Any]) -> None:
        self._clear_unfinished()  # what the threads of a save that failed wrote after it had
        free, needed = shutil.disk_usage(self.directory).free, _bytes(items)
        if free < needed:
            raise RunError(f"{needed / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB are free")
        with self._disk_errors():
            arrays = {name: ocp.args.StandardSave(item) for name, item in items.items()}
            said = ocp.args.JsonSave(meta | {"checksums": {name: its.tolist() for name, its in sums.items()}})
            if not self._manager.save(step, args=ocp.args.Composite(**arrays, meta=said)):
                raise RuntimeError("orbax has a later one")
            self._manager.wait_until_finished()
            atomic.sync(self.directory)

    def _clear_unfinished(self) -> None:
        for path in self.directory.glob(_UNFINISHED):
            shutil.rmtree(path, ignore_errors=True)

    def _seal_unfinished(self) -> None:
        """Orbax calls this when a checkpoint is written and before it gets its name."""
        for path in self.directory.glob(_UNFINISHED):
            files = [file for file in path.glob("*/**/*") if file.is_file()]
            hashes = {file.relative_to(path).as_posix(): _sha256(file) for file in files}
            (path / FILES).write_text(json.dumps(hashes, indent=1))
            atomic.sync_tree(path)

    def _arrays(self, step: int, sharding: jax.sharding.Sharding, **like: Any) -> dict[str, Any]:
        expected = self.meta(step)["checksums"]
        shapes = {name: _laid_out(sharding, tree) for name, tree in like.items()}
        items = self._restore(step, **{name: ocp.args.StandardRestore(tree) for name, tree in shapes.items()})
        for name, item in items.items():
            if found := _mismatch(item, expected[name]):
                raise CorruptCheckpointError(f"{name}{found} does not match its checksum")
        return items

    def _restore(self, step: int, **items: Any) -> Any:
        _check_files(self.directory / str(step), set(items))
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # orbax and tensorstore raise many kinds; but the files are sound
            raise RunError(f"cannot restore {self.directory / str(step)} ({_reason(error)}): try again") from error

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Turns what a failed save raises into a RunError, and makes room and a fresh manager for the next one.

        The old one may count the failed step among the saved and refuse to go on (google/orbax#605,
        AI-Hypercomputer/maxtext#5260).
        """
        try:
            yield
        except Exception as error:  # a full disk comes as OSError, ValueError or an XLA error
            self._clear_unfinished()
            self._manager = self._new_manager()
            raise RunError(f"{self.directory} cannot take it ({_reason(error)})") from error


@jax.jit
def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def checkpoint_bytes(state: TrainState) -> int:
    """What a checkpoint of this state, or of its shapes, takes on disk at most."""
    return _bytes((state.params, _optimizer_item(state)))


def _bytes(items: Any) -> int:
    leaves = jax.tree.leaves(items)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) + 2**20


def _check_files(checkpoint: Path, items: set[str]) -> None:
    """Raises CorruptCheckpointError when a file of these items has changed, RunError when it cannot be read."""
    try:
        hashes = json.loads((checkpoint / FILES).read_text()) if (checkpoint / FILES).is_file() else {}
        names = [name for name in hashes if Path(name).parts[0] in items and ".." not in Path(name).parts]
        if not isinstance(hashes, dict) or {Path(name).parts[0] for name in names} != items:
            raise CorruptCheckpointError(f"{FILES} is missing or does not list its files")
    except (ValueError, TypeError, IndexError, RecursionError) as error:
        raise CorruptCheckpointError(f"{FILES} is not as it was saved") from error
    except OSError as error:
        raise RunError(f"cannot read {checkpoint / FILES} ({error.strerror}): see to that and try again") from error
    for name in names:
        if not (checkpoint / name).is_file():
            raise CorruptCheckpointError(f"{name} is missing")
        if _sha256(checkpoint / name) != hashes[name]:
            raise CorruptCheckpointError(f"{name} is not as it was saved")


def _sha256(path: Path) -> str | None:
    """None where the disk cannot read it. Raises RunError when this process cannot."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        if error.errno == errno.EIO:
            return None
        raise RunError(f"cannot read {path} ({error.strerror}): see to that and try again") from error


def _mismatch(tree: Any, expected: list[int]) -> str | None:
    """The path of the first leaf whose checksum is not the expected one."""
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    found = zip(paths, checksums(tree).tolist(), expected, strict=True)
    return next((path for path, sum, its in found if sum != its), None)


def _reason(error: BaseException) -> str:
    """In one line, without what tensorstore adds of paths and specifications."""
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return os.strerror(errno.ENOSPC) if os.strerror(errno.ENOSPC) in said else said.splitlines()[0].split(" [")[0]


def _optimizer_item(state: TrainState) -> dict[str, Any]:
    return {"moments": state.opt_state.inner_opt_state, "step": state.step, "batches": state.batches}


def _laid_out(sharding: jax.sharding.Sharding, tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
