"""Checkpoints of a run: `checkpoints/STEP/`. Orbax's CheckpointManager writes them in a thread and keeps the last few.

The newest checkpoint may be a rolling one, saved between two intervals by time or by a stop. The next save replaces it.
The manager moves what it no longer keeps into a folder that is no checkpoint: half of a checkpoint never looks whole.

Each checkpoint has the items `params` (the model's parameters), `optimizer` (its state and the counters), `average` (of
the weights, as `average.average_step` keeps it; only if the run has one) and `meta` (JSON: the settings, fingerprints
of the tokens, seconds trained, checksums of all arrays), and `files.json` with the hash of every file. Damaged files
are found by their hash before anything reads them, and arrays that differ from the training state by their checksum,
whatever the cause. A save is complete only after what it wrote has been opened again and its arrays listed.

A checkpoint is taken between two optimizer steps only: there the accumulated gradients are zero and need not be saved.
Training waits for a copy of the state, not for the disk: the copy is written.
"""

import contextlib
import errno
import hashlib
import inspect
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxlm.core.average import AVERAGE_DTYPE, averaged
from jaxlm.core.checksum import checksums
from jaxlm.core.parameters import Params
from jaxlm.device import distributed
from jaxlm.device.snapshot import snapshot
from jaxlm.errors import CorruptCheckpointError, RunError, UsageError, disk_advice, disk_error
from jaxlm.run.quiet import LIBRARY_LOG
from jaxlm.run.workdir import CHECKPOINTS, NEVER_SAVED, saved_steps
from jaxlm.storage import atomic

if TYPE_CHECKING:  # it imports optax, which sampling does not need
    from jaxlm.core.train_step import TrainState

FILES = "files.json"
META_BYTES = 2**21  # at most, of the files beside the arrays; the largest own vocabulary takes two thirds
HASHED_BYTES = 2**20  # at once: between them another thread may hold Python's lock for 5 ms
META_KEYS = {"config", "tokens", "seconds", "checksums"}
# parts of the state, as regular expressions
SAVED = r"params|average|batches|opt_state\.(inner_opt_state|gradient_step)"
ZERO_BETWEEN_STEPS = r"skipped_in_a_row|loss_sum|opt_state\.(mini_step|acc_grads|skip_state\['should_skip'\])"
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of what is no checkpoint yet, or no more
_OLD = f"old{_UNFINISHED}"  # holds the checkpoints that a new one replaces, until they are deleted
_SAFE_PATH = re.compile(r"(?!/(gs|s3|az|hf)/)[\w/.,=@+~ -]+", re.ASCII)

# Compression saves 8% of the bytes, and takes a compressed copy in memory and three times the processor's time. orbax
# of jax-metal's set has no choice.
_IS_OPTIONAL = "use_compression" in inspect.signature(ocp.PyTreeCheckpointHandler).parameters
_UNCOMPRESSED: dict[str, Any] = {"use_compression": False} if _IS_OPTIONAL else {}

# All saves, one after the other and in the same order in all processes of a run: orbax numbers them, and two at a time
# wait for each other's signals.
_SAVES = ThreadPoolExecutor(1)

T = TypeVar("T")
Arrays = Any  # a tree of arrays, or of their shapes


class Checkpoints:
    """The checkpoints of one work directory."""

    def __init__(self, workdir: Path, max_to_keep: int | None = None, keep_every: int = 0):
        """Opens the checkpoints of an existing work directory.

        After a save the last `max_to_keep` stay (None: all), and the multiples of `keep_every` (0: none). Raises
        UsageError if orbax can use neither its path nor a link to it.
        """
        self.workdir, self.directory = workdir, (workdir / CHECKPOINTS).absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        with _safe_path(self.directory):
            pass
        self._max_to_keep, self._keep_every = max_to_keep, keep_every
        self._place, self._is_mount = os.stat(self.directory), os.path.ismount(self.directory)
        self._save: Future[None] | None = None  # the last save, until it is waited for

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first. Raises RunError if they cannot be listed."""
        return saved_steps(self.directory.parent)

    def in_place(self) -> bool:
        """Whether the directory is where it was opened. A disk that does not answer counts as in place."""
        try:
            return os.path.samestat(os.stat(self.directory), self._place)
        except OSError as error:
            return error.errno not in (errno.ENOENT, errno.ENOTDIR)

    def save(self, step: int, state: "TrainState", meta: Mapping[str, Any]) -> None:
        """Waits for the previous save and starts this one. The state's buffers may be donated at once.

        Raises RunError if the previous save failed, ValueError if the state has a part that a checkpoint does not save.
        """
        items = _items(state)
        self.wait()
        sums = {name: checksums(item) for name, item in items.items()}
        self._save = _SAVES.submit(self._write_in_place, step, snapshot(items), sums, dict(meta))

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

    def weights(self, step: int, like: Params, sharding: Any) -> Params:
        """The parameters alone, their average if it is saved.

        `like` gives the shapes, and `sharding` the place of all arrays, or a tree of places.

        Raises CorruptCheckpointError if they are not what was saved or cannot be restored, RunError if the cause is
        this process or machine, such as its memory or a permission.
        """
        params = _placed(like, sharding)
        average = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, AVERAGE_DTYPE, sharding=leaf.sharding), params
        )
        saved_sums = self.meta(step)["checksums"]
        like_items = {"params": params} | ({"average": average} if "average" in saved_sums else {})
        items = self._arrays(step, saved_sums, like_items)
        return averaged(items["params"], items.get("average"))

    def state(self, step: int, like: "TrainState", sharding: Any) -> "TrainState":
        """The training state; arguments and errors as for `weights`."""
        like = _placed(like, sharding)
        items = self._arrays(step, self.meta(step)["checksums"], _items(like))
        optimizer = items["optimizer"]
        rest = like._replace(params={}, opt_state=like.opt_state._replace(inner_opt_state=()), average=None)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), rest)
        opt_state = zeros.opt_state._replace(gradient_step=optimizer["step"], inner_opt_state=optimizer["moments"])
        zeros = zeros._replace(opt_state=opt_state, batches=optimizer["batches"])
        return zeros._replace(params=items["params"], average=items.get("average"))

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
                skipped.append(f"{CHECKPOINTS}/{step}: {error}")
        raise UsageError(
            f"no checkpoint in {self.workdir} can be used ({'; '.join(skipped)}): choose another --workdir"
        )

    def clean_up(self, newest: int) -> list[str]:
        """Moves checkpoints after step `newest` aside and deletes unfinished saves; returns a line for each.

        Of several processes, the first one does.
        """
        lines: list[str] = []
        if not distributed.is_first():
            return lines
        for path in self._unfinished():
            shutil.rmtree(path, ignore_errors=True)
            lines.append(f"Deleted {CHECKPOINTS}/{path.name}, which is not a whole checkpoint")
        for step in [step for step in self.steps() if step > newest]:
            target = atomic.unused(self.directory / f"{step}.damaged")
            (self.directory / str(step)).rename(target)
            lines.append(f"Moved {CHECKPOINTS}/{step} to {CHECKPOINTS}/{target.name}, which nothing reads")
        return lines

    def _write(self, step: int, items: dict[str, Arrays], sums: dict[str, jax.Array], meta: dict[str, Any]) -> None:
        self._delete_unfinished()  # threads of a failed save may have written after it failed
        try:
            with distributed.all_or_none("save"):
                free, needed = shutil.disk_usage(self.directory).free, _size(items)
                if free < needed and distributed.is_first():
                    raise OSError(errno.ENOSPC, f"{needed / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB are free")
            meta["checksums"] = {name: item_sums.tolist() for name, item_sums in sums.items()}
            with distributed.all_or_none("save"):
                self._write_items(step, items, meta)
                atomic.sync(self.directory)
        except Exception as error:  # a full disk shows as OSError, ValueError or an XLA error
            self._delete_unfinished()
            logging.getLogger(__name__).warning("step %d is not saved", step, exc_info=True)
            cause = disk_error(error)
            advice = disk_advice(cause) if cause else f"{LIBRARY_LOG} in the work directory says more"
            raise RunError(f"{self.directory} cannot be written ({_reason(error)}): {advice}") from error

    def _write_items(self, step: int, items: dict[str, Arrays], meta: dict[str, Any]) -> None:
        arrays = {name: ocp.args.PyTreeSave(item) for name, item in items.items()}
        files = self.directory / str(step) / FILES
        with _safe_path(self.directory) as directory:
            manager, rolling = self._new_manager(directory, step, items, meta["config"])
            with contextlib.closing(manager):
                if not manager.save(step, args=ocp.args.Composite(**arrays, meta=ocp.args.JsonSave(meta))):
                    raise RuntimeError("orbax has a later one")
                try:
                    manager.wait_until_finished()
                except OSError:
                    if not files.is_file():
                        raise  # else an old checkpoint could not be moved: the next save tries again
                if not files.is_file():
                    self._undo(step)
                    raise RuntimeError("orbax renamed it before its files were hashed")
                with contextlib.suppress(OSError):
                    for old in rolling.intersection(manager.all_steps()):
                        manager.delete(old)

    def _new_manager(
        self, directory: Path, step: int, items: dict[str, Arrays], config: Any
    ) -> tuple[ocp.CheckpointManager, set[int]]:
        """The manager that saves `step`, and the rolling checkpoints that are to be deleted after it.

        It calls `_finish` after it has written a checkpoint and before it renames it. It keeps as many as reach back to
        the oldest regular one to keep, and the multiples of `keep_every`.
        """
        saved = distributed.of_first("saved steps", self.steps())  # a shared folder may show them late to others
        rolling = {old for old in saved if self._is_rolling(old)}
        steps = [*saved, step]
        regular = [each for each in steps if each not in rolling and (each != step or not _is_rolling(step, config))]
        keep = self._max_to_keep and sum(each >= min(regular[-self._max_to_keep :], default=0) for each in steps)
        multiprocessing = _multiprocessing("orbax save")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=self._keep_every or None,
            todelete_subdir=_OLD,
            create=False,
            multiprocessing_options=multiprocessing,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=partial(self._finish, directory, items)),
        )
        replaced = {old for old in rolling if not self._keep_every or old % self._keep_every} if keep else set()
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for name in items:
            handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=multiprocessing, **_UNCOMPRESSED)
            handlers.add(name, ocp.args.PyTreeSave, handler)
        return ocp.CheckpointManager(directory, options=options, handler_registry=handlers), replaced

    def _finish(self, directory: Path, items: dict[str, Arrays]) -> None:
        """Opens the arrays that were written, and stores the hash of each file."""
        self._check_place()
        for path in set(directory.glob(f"*{_UNFINISHED}*")) - {directory / _OLD}:
            for name, item in items.items():
                _check_written(path / name, item)
            files = [file for file in path.glob("*/**/*") if file.is_file()]
            hashes = {file.relative_to(path).as_posix(): _sha256(file) for file in files}
            (path / FILES).write_text(json.dumps(hashes, indent=1))
            atomic.sync_tree(path)

    def _undo(self, step: int) -> None:
        """Deletes a checkpoint that is not whole, and moves those that it replaced back."""
        if not distributed.is_first():
            return
        shutil.rmtree(self.directory / str(step), ignore_errors=True)
        for old in self.directory.glob(f"{_OLD}/*"):
            old.rename(self.directory / old.name)

    def _write_in_place(self, step: int, *items: Any) -> None:
        """As `_write`. Raises RunError if the directory has moved."""
        try:
            self._write(step, *items)
        finally:
            if not self.in_place():
                self._delete_misplaced(step)
            self._check_place()
        with contextlib.suppress(OSError):
            (self.directory.parent / NEVER_SAVED).unlink(missing_ok=True)
        self._delete_unfinished()

    def _check_place(self) -> None:
        if not self.in_place():
            raise RunError(f"{self.directory} was renamed, deleted or unmounted during the save")

    def _delete_misplaced(self, step: int) -> None:
        """Deletes what orbax has written to another directory in this place, and that directory if nothing is left.

        The work directory above it stays: it may be the place of a disk.
        """
        for path in self.directory.glob(f"{step}{_UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)
        if not self._is_mount:
            with contextlib.suppress(OSError):
                self.directory.rmdir()

    def _is_rolling(self, step: int) -> bool:
        """Whether the next save replaces it, by its own settings."""
        try:
            return _is_rolling(step, self.meta(step)["config"])
        except (CorruptCheckpointError, RunError):
            return False

    def _delete_unfinished(self) -> None:
        for path in self._unfinished() if distributed.is_first() else ():
            shutil.rmtree(path, ignore_errors=True)

    def _unfinished(self) -> list[Path]:
        return sorted(self.directory.glob(f"*{_UNFINISHED}*"))

    def _arrays(self, step: int, saved_sums: dict[str, list[int]], like: dict[str, Arrays]) -> dict[str, Arrays]:
        """Restores the items of `like` and compares their checksums with those of the checkpoint."""
        items = self._restore(step, **{name: ocp.args.StandardRestore(tree) for name, tree in like.items()})
        for name, item in items.items():
            for path, actual, saved in zip(_paths(item), checksums(item).tolist(), saved_sums[name], strict=True):
                if actual != saved:
                    raise CorruptCheckpointError(f"{name}{path} does not match its checksum")
        return items

    def _restore(self, step: int, **items: Any) -> Any:
        checkpoint, options = self.directory / str(step), _multiprocessing("orbax restore")
        with distributed.all_or_none("restore"):
            if distributed.is_first():
                _check_files(checkpoint, set(items))
        several = distributed.is_several()  # orbax of jax-metal's set has no such options
        composite = {"composite_options": ocp.CompositeOptions(multiprocessing_options=options)} if several else {}
        handler = ocp.CompositeCheckpointHandler(**composite)
        try:
            with (
                distributed.all_or_none("restored"),
                _safe_path(checkpoint) as path,
                ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer,
            ):
                return checkpointer.restore(path, args=ocp.args.Composite(**items))
        except Exception as error:  # orbax and tensorstore raise many kinds; the files match their hashes
            message = f"cannot restore {checkpoint} ({_reason(error)})"
            if isinstance(error, (MemoryError, jax.errors.JaxRuntimeError)):
                raise RunError(f"{message}: close other programs, or choose another device") from error
            if (cause := disk_error(error)) and cause.errno not in (errno.EIO, errno.ENOENT):
                raise RunError(f"{message}: {disk_advice(cause)}") from error
            raise CorruptCheckpointError(f"it cannot be restored ({_reason(error)})") from error


def _multiprocessing(purpose: str) -> ocp.options.MultiprocessingOptions:
    """Lets orbax wait for the other processes through the coordination service, as a save has a thread of its own."""
    if not distributed.is_several():
        return ocp.options.MultiprocessingOptions()
    prefix = distributed.unique(purpose)
    return ocp.options.MultiprocessingOptions(
        active_processes=set(range(jax.process_count())), barrier_sync_key_prefix=prefix
    )


@contextlib.contextmanager
def _safe_path(directory: Path) -> Iterator[Path]:
    """A path to `directory` that orbax and tensorstore can use: itself, or a link in a temporary folder.

    They use the path as a pattern and as a URL, and it must be UTF-8. Raises UsageError if no such folder has such a
    path, OSError if the link cannot be made.
    """
    if _SAFE_PATH.fullmatch(str(directory)):
        yield directory
        return
    places = [path for path in (tempfile.gettempdir(), "/tmp") if _SAFE_PATH.fullmatch(path) and os.path.isdir(path)]
    if not places:
        raise UsageError(f"orbax cannot use the path {directory}: set TMPDIR to a folder of letters and digits")
    with tempfile.TemporaryDirectory(prefix="jaxlm-", dir=places[0]) as folder:
        link = Path(folder, "link")
        link.symlink_to(directory, target_is_directory=True)
        yield link


def _is_rolling(step: int, config: Any) -> bool:
    """Whether `config` makes it neither a regular checkpoint nor the last one of the run."""
    try:
        return bool(step % config["save_interval"]) and step != config["max_steps"]
    except (LookupError, TypeError):
        return False


def _check_written(path: Path, item: Arrays) -> None:
    """Raises ValueError if the item at `path` cannot be opened, or if a name, shape or dtype of its arrays differs."""
    written = ocp.tree.to_flat_dict(ocp.StandardCheckpointHandler().metadata(path).tree)
    expected = ocp.tree.to_flat_dict(item)
    for name in written.keys() | expected.keys():
        kinds = [(tuple(tree[name].shape), tree[name].dtype) if name in tree else None for tree in (written, expected)]
        if kinds[0] != kinds[1]:
            raise ValueError(f"{path.name}.{'.'.join(name)} is {kinds[0]} on the disk and {kinds[1]} in memory")


def _placed(like: Arrays, sharding: Any) -> Arrays:
    """The shapes of `like` with their places: one for all, or a tree of them."""
    places = jax.tree.map(lambda _: sharding, like) if isinstance(sharding, jax.sharding.Sharding) else sharding
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), like, places)


def checkpoint_bytes(state: "TrainState") -> int:
    """An upper bound of the bytes that a checkpoint takes on disk. `state` may hold shapes."""
    return _size(_items(state))


def writer_bytes(copy: int, in_own_pages: bool) -> int:
    """About the bytes that a save takes beside a copy of this size, which lies in pages of its own or in malloc's heap.

    Measured were 0.13 of the copy; in malloc's heap 0.38, and compressed up to 0.6.
    """
    return copy // 6 if in_own_pages and _UNCOMPRESSED else copy * 2 // 3


def _size(items: Arrays) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(items)) + META_BYTES


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
        raise _unreadable(checkpoint / FILES, error) from error
    for name in names:
        try:
            if not (checkpoint / name).is_file():
                raise CorruptCheckpointError(f"{name} is missing")
            if _sha256(checkpoint / name) != hashes[name]:
                raise CorruptCheckpointError(f"{name} is not as it was saved")
        except OSError as error:
            raise _unreadable(checkpoint / name, error) from error


def _unreadable(path: Path, error: OSError) -> CorruptCheckpointError | RunError:
    """Damage if the disk cannot read the file, else an error of this process or machine."""
    if error.errno == errno.EIO:
        return CorruptCheckpointError(f"{path.name} cannot be read ({error.strerror})")
    return RunError(f"cannot read {path} ({error.strerror}): {disk_advice(error)}")


def _sha256(path: Path) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(path.stat().st_size, HASHED_BYTES)))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def _paths(tree: Arrays) -> list[str]:
    """The path of each leaf, such as `['blocks']['query']` or `.opt_state.mini_step`."""
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _reason(error: BaseException) -> str:
    """One line, without the paths and specifications that tensorstore adds."""
    if (cause := disk_error(error)) and cause.strerror:
        return cause.strerror
    return (str(error) or type(error).__name__).splitlines()[0].split(" [")[0]


def _items(state: "TrainState") -> dict[str, Arrays]:
    """The items that hold the state. Raises ValueError if it has a part that would be lost."""
    unsaved = [path for path in _paths(state) if not re.match(rf"\.({SAVED}|{ZERO_BETWEEN_STEPS})(?!\w)", path)]
    if unsaved:
        names = ", ".join(unsaved)
        raise ValueError(f"a checkpoint does not save {names} of the training state: add it to SAVED and to the items")
    optimizer = {"moments": state.opt_state.inner_opt_state, "step": state.step, "batches": state.batches}
    items = {"params": state.params, "optimizer": optimizer}
    return items | {"average": state.average} if state.average else items
