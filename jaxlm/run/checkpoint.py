"""Checkpoints of a run: `checkpoints/STEP/`, written by orbax in a thread; the last few are kept.

The newest checkpoint may be a rolling one, saved between two intervals by time or by a stop. The next save replaces it.

Each checkpoint has the items `params` (the model's parameters), `optimizer` (its state and the counters) and `meta`
(JSON: the settings, fingerprints of the tokens, seconds trained, checksums of all arrays), and `files.json` with the
hash of every file. Damaged files are found by their hash before anything reads them, and arrays that differ from the
training state by their checksum, whatever the cause. A checkpoint is taken between two optimizer steps only: there the
accumulated gradients are zero and need not be saved. Training does not wait for the disk: the device copies the state,
and the copy is written.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
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
SAVED = r"params|batches|opt_state\.(inner_opt_state|gradient_step)"  # parts of the state, as regular expressions
ZERO_BETWEEN_STEPS = r"skipped_in_a_row|loss_sum|opt_state\.(mini_step|acc_grads|skip_state\['should_skip'\])"
_UNFINISHED = "*.orbax-checkpoint-tmp*"

T = TypeVar("T")
Arrays = Any  # a tree of arrays, or of their shapes


class Checkpoints:
    """The checkpoints of one work directory."""

    def __init__(self, workdir: Path, max_to_keep: int | None = None, keep_every: int = 0):
        """Opens the checkpoints of `workdir`.

        Args:
            workdir: an existing directory.
            max_to_keep: after a save so many stay, beside a rolling one and those of `keep_every`; None: all.
            keep_every: checkpoints of its multiples stay; 0: none.
        """
        self.directory = (workdir / DIRECTORY).absolute()
        self._max_to_keep, self._keep_every = max_to_keep, keep_every
        self._manager = self._new_manager()
        self._place = os.stat(self.directory)
        self._thread = ThreadPoolExecutor(1)
        self._save: Future[None] | None = None  # the last save, until it is waited for

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, meta: Mapping[str, Any]) -> None:
        """Waits for the previous save and starts this one. The state's buffers may be donated at once.

        Raises RunError if the previous save failed, ValueError if the state has a part that a checkpoint does not save.
        """
        items = {"params": state.params, "optimizer": _optimizer_item(state)}
        self.wait()
        sums = {name: checksums(item) for name, item in items.items()}
        self._save = self._thread.submit(self._write_in_place, step, _copy(items), sums, dict(meta))

    def saving(self) -> bool:
        """Whether a save is in progress."""
        return self._save is not None and not self._save.done()

    def wait(self) -> None:
        """Waits until the last save is complete and on the disk. Raises RunError if it failed."""
        save, self._save = self._save, None
        if save:
            save.result()

    def meta(self, step: int) -> dict[str, Any]:
        """The item `meta`. Raises CorruptCheckpointError if it is not what was saved."""
        meta = self._restore(step, meta=ocp.args.JsonRestore())["meta"]
        if not isinstance(meta, dict) or not meta.keys() >= META_KEYS:
            raise CorruptCheckpointError(f"its meta lacks one of {', '.join(sorted(META_KEYS))}")
        return meta

    def params(self, step: int, like: Arrays, sharding: jax.sharding.Sharding) -> Arrays:
        """The parameters alone, placed by `sharding`; `like` gives the tree and its shapes.

        Raises CorruptCheckpointError if they are not what was saved, RunError if they cannot be read now.
        """
        return self._arrays(step, sharding, params=like)["params"]

    def state(self, step: int, like: TrainState, sharding: jax.sharding.Sharding) -> TrainState:
        """The training state; arguments and errors as for `params`."""
        items = self._arrays(step, sharding, params=like.params, optimizer=_optimizer_item(like))
        optimizer = items["optimizer"]
        rest = like._replace(params={}, opt_state=like.opt_state._replace(inner_opt_state=()))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=sharding), rest)
        opt_state = zeros.opt_state._replace(gradient_step=optimizer["step"], inner_opt_state=optimizer["moments"])
        return zeros._replace(params=items["params"], opt_state=opt_state, batches=optimizer["batches"])

    def newest(self, load: Callable[[int], T], steps: Sequence[int]) -> tuple[T, list[str]]:
        """Calls `load` with the last of `steps` whose checkpoint is whole.

        Returns its result, and for each later checkpoint the reason why it was skipped. Raises UsageError, with all
        reasons, if none is whole.
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
        """Moves checkpoints after step `newest` aside and deletes unfinished saves; returns a line for each."""
        lines = []
        for path in sorted(self.directory.glob(_UNFINISHED)):
            shutil.rmtree(path)
            lines.append(f"Deleted {DIRECTORY}/{path.name}, which is not a whole checkpoint")
        for step in [step for step in self.steps() if step > newest]:
            target = self.directory / f"{step}.damaged"
            shutil.rmtree(target, ignore_errors=True)
            (self.directory / str(step)).rename(target)
            lines.append(f"Moved {DIRECTORY}/{step} to {DIRECTORY}/{target.name}: delete it if you do not need it")
        self._manager.reload()
        return lines

    def _new_manager(self) -> ocp.CheckpointManager:
        background = ocp.options.AsyncOptions(post_finalization_callback=self._write_file_hashes)
        options = ocp.CheckpointManagerOptions(async_options=background)
        return ocp.CheckpointManager(self.directory, options=options)

    def _write(self, step: int, items: dict[str, Arrays], sums: dict[str, jax.Array], meta: dict[str, Any]) -> None:
        self._delete_unfinished()  # threads of a failed save may have written after it failed
        free, needed = shutil.disk_usage(self.directory).free, _size(items)
        if free < needed:
            raise RunError(f"{needed / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB are free")
        try:
            arrays = {name: ocp.args.StandardSave(item) for name, item in items.items()}
            meta["checksums"] = {name: item_sums.tolist() for name, item_sums in sums.items()}
            if not self._manager.save(step, args=ocp.args.Composite(**arrays, meta=ocp.args.JsonSave(meta))):
                raise RuntimeError("orbax has a later one")
            self._manager.wait_until_finished()
            if not (self.directory / str(step) / FILES).is_file():
                raise RuntimeError("orbax renamed it before its files were hashed")
            atomic.sync(self.directory)
        except Exception as error:  # a full disk shows as OSError, ValueError or an XLA error
            self._delete_unfinished()
            # the old manager may count this step as saved and refuse later ones: google/orbax#605, maxtext#5260
            self._manager = self._new_manager()
            raise RunError(f"{self.directory} cannot be written ({_reason(error)})") from error

    def _write_in_place(self, step: int, *items: Any) -> None:
        """As `_write`, and then deletes what this checkpoint replaces. Raises RunError if the directory has moved."""
        try:
            self._write(step, *items)
        finally:
            if not self._in_place():
                self._delete_misplaced(step)
                raise RunError(f"{self.directory} was renamed, deleted or unmounted meanwhile")
        self._delete_old()

    def _in_place(self) -> bool:
        return self.directory.is_dir() and os.path.samestat(os.stat(self.directory), self._place)

    def _delete_misplaced(self, step: int) -> None:
        """Deletes what orbax has made where the work directory was, if that is all there is."""
        self._delete_unfinished()
        with contextlib.suppress(OSError):
            if os.listdir(self.directory.parent) == [DIRECTORY] and set(os.listdir(self.directory)) <= {str(step)}:
                shutil.rmtree(self.directory.parent)

    def _delete_old(self) -> None:
        """Deletes the checkpoints that the newest one replaces. One that cannot be deleted is left to the next save."""
        if self._max_to_keep is None:
            return
        steps = self.steps()
        by_steps = [step for step in steps if not self._is_rolling(step)]
        kept = {steps[-1], *by_steps[-self._max_to_keep :]}
        for step in set(steps) - kept:
            if not self._keep_every or step % self._keep_every:
                unfinished = self.directory / f"{step}{_UNFINISHED.strip('*')}-old"
                with contextlib.suppress(OSError):  # first renamed: what is half deleted is no checkpoint
                    (self.directory / str(step)).rename(unfinished)
                    shutil.rmtree(unfinished)
        self._manager.reload()

    def _is_rolling(self, step: int) -> bool:
        """Whether the next save replaces it: by its own settings it is neither of an interval nor the run's last."""
        try:
            config = self.meta(step)["config"]
            return bool(step % config["save_interval"]) and step != config["max_steps"]
        except (CorruptCheckpointError, RunError, LookupError, TypeError):
            return False

    def _delete_unfinished(self) -> None:
        for path in self.directory.glob(_UNFINISHED):
            shutil.rmtree(path, ignore_errors=True)

    def _write_file_hashes(self) -> None:
        """Orbax calls this after it has written a checkpoint and before it renames the directory."""
        for path in self.directory.glob(_UNFINISHED):
            files = [file for file in path.glob("*/**/*") if file.is_file()]
            hashes = {file.relative_to(path).as_posix(): _sha256(file) for file in files}
            (path / FILES).write_text(json.dumps(hashes, indent=1))
            atomic.sync_tree(path)

    def _arrays(self, step: int, sharding: jax.sharding.Sharding, **like: Arrays) -> dict[str, Arrays]:
        """Restores items and compares their checksums."""
        expected = self.meta(step)["checksums"]
        placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), like)
        items = self._restore(step, **{name: ocp.args.StandardRestore(tree) for name, tree in placed.items()})
        for name, item in items.items():
            for path, actual, saved in zip(_paths(item), checksums(item).tolist(), expected[name], strict=True):
                if actual != saved:
                    raise CorruptCheckpointError(f"{name}{path} does not match its checksum")
        return items

    def _restore(self, step: int, **items: Any) -> Any:
        _check_files(self.directory / str(step), set(items))
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # orbax and tensorstore raise many kinds; the files match their hashes
            raise RunError(f"cannot restore {self.directory / str(step)} ({_reason(error)}): try again") from error


@jax.jit
def _copy(tree: Arrays) -> Arrays:
    return jax.tree.map(jnp.copy, tree)


def checkpoint_bytes(state: TrainState) -> int:
    """An upper bound of the bytes that a checkpoint takes on disk. `state` may hold shapes."""
    return _size((state.params, _optimizer_item(state)))


def _size(items: Arrays) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(items)) + 2**20


def _check_files(checkpoint: Path, items: set[str]) -> None:
    """Raises CorruptCheckpointError if a file of these items has changed, RunError if it cannot be read."""
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
    """None if the disk cannot read the file. Raises RunError if this process cannot."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        if error.errno == errno.EIO:
            return None
        raise RunError(f"cannot read {path} ({error.strerror}): see to that and try again") from error


def _paths(tree: Arrays) -> list[str]:
    """The path of each leaf, such as `['blocks']['query']` or `.opt_state.mini_step`."""
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _reason(error: BaseException) -> str:
    """One line, without the paths and specifications that tensorstore adds."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return os.strerror(errno.ENOSPC) if os.strerror(errno.ENOSPC) in text else text.splitlines()[0].split(" [")[0]


def _optimizer_item(state: TrainState) -> dict[str, Arrays]:
    """The item `optimizer`. Raises ValueError if the state has a part that would be lost."""
    unsaved = [path for path in _paths(state) if not re.match(rf"\.({SAVED}|{ZERO_BETWEEN_STEPS})(?!\w)", path)]
    if unsaved:
        names = ", ".join(unsaved)
        raise ValueError(f"a checkpoint does not save {names} of the training state: add it to SAVED and to the items")
    return {"moments": state.opt_state.inner_opt_state, "step": state.step, "batches": state.batches}
