"""Checkpoints: exact, of the moment of the call, few, small."""

import collections
import dataclasses
import errno
import hashlib
import json
import logging
import os
import re
import resource
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxlm.config import Config, ModelConfig, OptimizerConfig
from jaxlm.core.checksum import checksums
from jaxlm.core.train_step import init_state, make_train_step
from jaxlm.errors import CorruptCheckpointError, RunError, UsageError, disk_advice
from jaxlm.run import checkpoint
from jaxlm.run.checkpoint import Checkpoints, checkpoint_bytes
from jaxlm.run.memory import state_shapes
from jaxlm.run.workdir import CHECKPOINTS
from jaxlm.storage import atomic
from tests.tiny_run import assert_same_bits, disk_room, is_one_line

# of a save that failed; commands hide it (`quiet_libraries`)
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
MODEL = ModelConfig(vocab_size=300, context=16, layers=2, heads=2, width=16, mlp_width=24, precision="float32")
OPTIMIZER = OptimizerConfig(warmup_steps=1, average=0.9)
CONFIG = Config(batch_size=2, grad_accum_steps=2, max_steps=100, model=MODEL, optimizer=OPTIMIZER)
META = {"config": {"é": [1, None, 2.5]}, "tokens": {}, "seconds": 0.1}
CPU = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])


def like(config=CONFIG):
    return state_shapes(config)


def batches(config, seed=0):
    draw = np.random.default_rng(seed)
    while True:
        shape = (config.batch_size, config.model.context + 1)
        yield draw.integers(0, config.model.vocab_size, shape, np.int32)


def committed(state):
    """Committed to its device, as a restored state is, so that one compilation serves both."""
    return jax.device_put(state, CPU)


def random_state(config, seed=0):
    """A state between two steps, on the host: parameters and moments are random, the rest is zero."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        return rng.normal(size=leaf.shape).astype(leaf.dtype) if leaf.ndim else np.array(3, leaf.dtype)

    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like(config))
    moments = jax.tree.map(draw, zeros.opt_state.inner_opt_state)
    opt_state = zeros.opt_state._replace(inner_opt_state=moments, gradient_step=np.int32(3))
    params, average = (jax.tree.map(draw, tree) for tree in (zeros.params, zeros.average))
    return zeros._replace(params=params, opt_state=opt_state, batches=np.int32(6), average=average)


@pytest.fixture(scope="module")
def trained():
    return random_state(CONFIG)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, trained):
    """The checkpoints 1, 3 and 5 of `trained`; the tests copy them."""
    checkpoints = Checkpoints(tmp_path_factory.mktemp("saved"), 3)
    for step in (1, 3, 5):
        checkpoints.save(step, committed(trained), META)
    checkpoints.wait()
    return checkpoints


@pytest.fixture
def checkpoints(saved, tmp_path):
    """Checkpoint 3 alone."""
    shutil.copytree(saved.directory / "3", tmp_path / CHECKPOINTS / "3")
    return Checkpoints(tmp_path)


@pytest.fixture
def three(saved, tmp_path):
    shutil.copytree(saved.directory, tmp_path / CHECKPOINTS)
    return Checkpoints(tmp_path, 3)


def test_the_whole_state_is_restored_bit_for_bit(saved, checkpoints, trained):
    assert (saved.steps(), checkpoints.steps()) == ([1, 3, 5], [3])
    for source in (saved, checkpoints):
        restored = source.state(3, like(), CPU)
        assert_same_bits(restored, trained)
        assert jax.tree.structure(restored) == jax.tree.structure(like())
        assert (int(restored.step), int(restored.batches)) == (3, 6)
    moments = [leaf for leaf in jax.tree.leaves(trained.opt_state.inner_opt_state) if leaf.ndim]
    assert len(moments) >= 2 * len(jax.tree.leaves(trained.params))
    assert all(leaf.any() for leaf in moments)


@pytest.mark.slow
def test_a_restored_state_trains_on_as_the_saved_one(tmp_path):
    train_step = make_train_step(CONFIG)

    def advance(state, seed, micro_batches):
        source = batches(CONFIG, seed)
        for _ in range(micro_batches):
            state, _ = train_step(state, next(source))
        return state

    state = advance(committed(init_state(CONFIG)), 0, 6)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state, META)
    checkpoints.wait()
    assert_same_bits(advance(checkpoints.state(3, like(), CPU), 1, 4), advance(state, 1, 4))


def assert_average_of(state, weights):
    assert_same_bits(weights, jax.tree.map(lambda p, d: p + np.float32(d) / 256, state.params, state.average))


def test_the_average_of_the_weights_alone_is_restored(checkpoints, trained):
    assert_average_of(trained, checkpoints.weights(3, like().params, CPU))


def test_meta_is_restored(checkpoints):
    assert META.items() <= checkpoints.meta(3).items()


def test_a_save_holds_the_values_of_its_moment_though_the_buffers_are_donated(tmp_path):
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, vocab_size=20_000, layers=1, width=64))
    add_one = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + jnp.ones((), leaf.dtype), state), donate_argnums=0)
    state = committed(random_state(config))
    checkpoints = Checkpoints(tmp_path, 5)
    expected, saving = {}, []
    for step in (1, 2):
        embedding = state.params["embedding"]
        state = add_one(state)
        assert embedding.is_deleted()
        expected[step] = jax.tree.map(np.array, state)
        checkpoints.save(step, state, META)
        saving.append(checkpoints.saving())
        state = jax.block_until_ready(add_one(state))
    checkpoints.wait()
    assert any(saving)
    assert not checkpoints.saving()
    for step, saved in expected.items():
        restored = checkpoints.state(step, like(config), CPU)
        assert_same_bits(restored.params, saved.params)
        assert_same_bits(restored.opt_state.inner_opt_state, saved.opt_state.inner_opt_state)
        assert int(restored.batches) == saved.batches


@pytest.mark.parametrize("name", [".ema", ".opt_state.ema", ".opt_state.skip_state['norms']"])
def test_a_part_of_the_state_that_is_not_saved_is_an_error(tmp_path, trained, name):
    """Else it comes back as zeros."""

    def with_field(state):
        fields = [*state._fields, "ema"]
        return collections.namedtuple(type(state).__name__, fields)(*state, np.ones(3, np.float32))

    opt_state = trained.opt_state
    state = {
        ".ema": with_field(trained),
        ".opt_state.ema": trained._replace(opt_state=with_field(opt_state)),
        ".opt_state.skip_state['norms']": trained._replace(
            opt_state=opt_state._replace(skip_state=opt_state.skip_state | {"norms": np.ones(3, np.float32)})
        ),
    }[name]
    with pytest.raises(ValueError, match=f"does not save {re.escape(name)} of"):
        Checkpoints(tmp_path).save(3, state, META)
    with pytest.raises(ValueError, match=re.escape(name)):  # before a run trains for hours
        checkpoint_bytes(state)


def test_only_the_last_few_are_kept(tmp_path, trained):
    checkpoints = Checkpoints(tmp_path, 2)
    state = committed(trained)
    for step in (1, 5, 30):
        checkpoints.save(step, state, META)
    checkpoints.wait()
    assert checkpoints.steps() == [5, 30]
    assert sorted(path.name for path in (tmp_path / CHECKPOINTS).iterdir()) == ["30", "5"]


def saved_with(config):
    return META | {"config": {"save_interval": 10, "max_steps": 33} | config}


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"),
    [
        (2, 0, [[4], [7], [10], [10, 15], [10, 20], [20, 30], [30, 33]]),  # 15 does not displace 10
        pytest.param(1, 0, [[4], [7], [10], [10, 15], [20], [30], [33]], marks=pytest.mark.slow),
        (1, 20, [[4], [7], [10], [10, 15], [20], [20, 30], [20, 33]]),
        pytest.param(None, 0, [[4], [4, 7], [4, 7, 10], [4, 7, 10, 15]], marks=pytest.mark.slow),
    ],
)
def test_a_rolling_checkpoint_is_replaced_by_the_next_and_displaces_none(tmp_path, trained, keep, keep_every, left):
    """Also in a session with another save_interval: 7, 10 and 30 are what their own settings say."""
    state = committed(trained)
    for step, steps in zip((4, 7, 10, 15, 20, 30, 33), left, strict=False):
        checkpoints = Checkpoints(tmp_path, keep, keep_every)
        checkpoints.save(step, state, saved_with({}))
        checkpoints.wait()
        assert checkpoints.steps() == steps
        assert sorted(int(path.name) for path in (tmp_path / CHECKPOINTS).iterdir()) == steps


def test_a_checkpoint_of_an_earlier_interval_is_no_rolling_one(tmp_path, trained):
    checkpoints = Checkpoints(tmp_path, 2)
    for step, interval in ((3, 3), (6, 3), (10, 10)):
        checkpoints.save(step, committed(trained), saved_with({"save_interval": interval}))
    checkpoints.wait()
    assert checkpoints.steps() == [6, 10]


def test_a_new_checkpoint_is_whole_before_an_old_one_is_deleted(tmp_path, trained, monkeypatch):
    """What is half deleted no longer has the name of a checkpoint, and goes with the next save."""
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(1, committed(trained), META)
    checkpoints.wait()
    rmtree, whole = shutil.rmtree, []

    def die(path, *arguments, **others):
        if Path(path).name.startswith("old."):
            whole.append(Checkpoints(tmp_path).meta(2))
        else:
            rmtree(path, *arguments, **others)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", die)
        checkpoints.save(2, committed(trained), META)
        checkpoints.wait()
    assert len(whole) == 1
    assert Checkpoints(tmp_path).steps() == [2]
    assert len(list((tmp_path / CHECKPOINTS).iterdir())) == 2
    checkpoints.save(3, committed(trained), META)
    checkpoints.wait()
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == ["3"]


def test_an_old_checkpoint_that_cannot_be_moved_is_left_to_the_next_save(three, tmp_path, trained):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("rename", "replace"):
            patch.setattr(os, name, refuse_to_move("1", getattr(os, name)))
        three.save(7, committed(trained), META)
        three.wait()
        assert three.steps() == [1, 3, 5, 7]
    three.save(9, committed(trained), META)
    three.wait()
    assert sorted(path.name for path in three.directory.iterdir()) == ["5", "7", "9"]


def refuse_to_move(name, move):
    def refuse(source, target, **options):
        if Path(source).name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return move(source, target, **options)

    return refuse


def test_a_folder_with_another_name_is_not_counted_by_the_manager(three, trained):
    for name in ("007", "9.damaged", "notes"):
        (three.directory / name).mkdir()
    (three.directory / "2").write_text("a file")
    three.save(7, committed(trained), META)
    three.wait()
    assert sorted(path.name for path in three.directory.iterdir()) == ["007", "2", "3", "5", "7", "9.damaged", "notes"]


MOMENTS = ["before", "within", "written", "after"]


@pytest.mark.parametrize(
    ("moment", "there"),
    [
        *((moment, True) for moment in MOMENTS),
        *(pytest.param(moment, False, marks=[pytest.mark.slow] * (moment != "within")) for moment in MOMENTS),
    ],
)
def test_a_save_into_a_directory_that_has_moved_fails_and_leaves_nothing_there(
    tmp_path, trained, monkeypatch, moment, there
):
    """If there is another directory in its place, such as that of an unmounted disk, it stays."""
    (tmp_path / "run").mkdir()
    checkpoints = Checkpoints(tmp_path / "run", 1)
    checkpoints.save(1, committed(trained), META)
    checkpoints.wait()

    def move():
        (tmp_path / "run").rename(tmp_path / "moved")
        if there:
            (tmp_path / "run").mkdir()

    def before(function):
        return lambda *arguments, **options: (move(), function(*arguments, **options))[1]

    def after(function):
        return lambda *arguments, **options: (function(*arguments, **options), move())[0]

    owner, name, around = {
        "before": (checkpoints, "_write", before),
        "within": (ocp.CheckpointManager, "save", before),
        "written": (checkpoints, "_finish", before),
        "after": (checkpoints, "_write", after),
    }[moment]
    monkeypatch.setattr(owner, name, around(getattr(owner, name)))
    checkpoints.save(2, committed(trained), META)
    with pytest.raises(RunError, match="renamed, deleted or unmounted"):
        checkpoints.wait()
    assert {path.name for path in tmp_path.iterdir()} - {"run"} == {"moved"}
    if there:
        assert (tmp_path / "run").is_dir()
    assert list((tmp_path / "run").rglob("*")) == []
    assert 1 in Checkpoints(tmp_path / "moved").steps() or moment == "after"


def test_the_place_of_a_disk_is_not_deleted(tmp_path, monkeypatch):
    """The directory `checkpoints` was a mount: what is there now is where it was mounted."""
    for is_mount in (False, True):
        monkeypatch.setattr(os.path, "ismount", lambda path, is_mount=is_mount: is_mount)
        checkpoints = Checkpoints(tmp_path)
        (checkpoints.directory / "2.orbax-checkpoint-tmp").mkdir()
        (checkpoints.directory / "3.orbax-checkpoint-tmp").mkdir()
        checkpoints._delete_misplaced(3)
        assert [path.name for path in checkpoints.directory.iterdir()] == ["2.orbax-checkpoint-tmp"]
        (checkpoints.directory / "2.orbax-checkpoint-tmp").rmdir()
        checkpoints._delete_misplaced(3)
        assert checkpoints.directory.exists() == is_mount


def test_a_checkpoint_takes_the_bytes_of_parameters_moments_and_average(tmp_path):
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, vocab_size=20_000, width=64))
    state = random_state(config)
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(1, committed(state), META)
    checkpoints.wait()
    size = sum(path.stat().st_size for path in (tmp_path / CHECKPOINTS).rglob("*") if path.is_file())
    numbers = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert 0.85 < size / ((3 * 4 + 2) * numbers) < 1.05


def files_of(tmp_path, step=3):
    return sorted(path for path in (tmp_path / CHECKPOINTS / str(step)).rglob("*") if path.is_file())


def whole_or_damaged(tmp_path, trained):
    """Whether the state is restored bit for bit (True) or refused with a reason in one line (False)."""
    try:
        assert_same_bits(Checkpoints(tmp_path).state(3, like(), CPU), trained)
    except CorruptCheckpointError as error:
        assert is_one_line(error)
        return False
    return True


@pytest.mark.parametrize("item", ["params", "optimizer", "meta"])
@pytest.mark.parametrize("how", ["gone", "cut", pytest.param("emptied", marks=pytest.mark.slow)])
def test_damaged_files_of_an_item_are_refused(checkpoints, tmp_path, trained, item, how):
    for path in files_of(tmp_path):
        if item in path.parts:
            if how == "gone":
                path.unlink()
            else:
                path.write_bytes(path.read_bytes()[:-3] if how == "cut" else b"")
    assert not whole_or_damaged(tmp_path, trained)


@pytest.mark.slow
def test_a_flipped_bit_is_refused_or_harmless(checkpoints, tmp_path, trained):
    """In any file."""
    draw, refused = np.random.default_rng(0), 0
    for path in files_of(tmp_path):
        before = path.read_bytes()
        for bit in draw.integers(0, 8 * len(before), 6 if len(before) > 2000 else 2):
            after = bytearray(before)
            after[bit // 8] ^= 1 << (bit % 8)
            path.write_bytes(after)
            refused += not whole_or_damaged(tmp_path, trained)
        path.write_bytes(before)
    assert refused > 10
    assert whole_or_damaged(tmp_path, trained)


def test_arrays_that_differ_from_the_state_are_refused_though_all_files_are_whole(tmp_path, trained):
    """For example after a bit flip in memory."""
    checkpoints, of_trained = Checkpoints(tmp_path), checksums(trained.params)
    altered = committed(trained._replace(params=jax.tree.map(lambda leaf: leaf + np.float32(1e-6), trained.params)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "checksums", lambda tree: of_trained if tree is altered.params else checksums(tree))
        checkpoints.save(3, altered, META)
        checkpoints.wait()
    with pytest.raises(CorruptCheckpointError, match=r"^params\['.*\] does not match its checksum$"):
        checkpoints.state(3, like(), CPU)


@pytest.mark.parametrize("item", ["params", "optimizer", "average"])
@pytest.mark.parametrize("leaf", [0, 1, -1])
def test_the_checksum_of_each_leaf_is_compared(checkpoints, trained, monkeypatch, item, leaf):
    """Of the first, the second and the last leaf here; the message names it."""
    tree = checkpoint._items(trained)[item]
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    kinds = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]

    def with_other(arrays):
        sums = checksums(arrays)
        same_item = [(a.shape, a.dtype) for a in jax.tree.leaves(arrays)] == kinds
        return sums.at[leaf].add(1) if same_item else sums

    monkeypatch.setattr(checkpoint, "checksums", with_other)
    with pytest.raises(CorruptCheckpointError) as caught:
        checkpoints.state(3, like(), CPU)
    assert str(caught.value) == f"{item}{paths[leaf]} does not match its checksum"


@pytest.mark.parametrize("name", ["meta/metadata", "optimizer/_METADATA"])
def test_the_reason_names_the_file(checkpoints, tmp_path, name):
    path = tmp_path / CHECKPOINTS / "3" / name
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b" ")
    with pytest.raises(CorruptCheckpointError, match=f"^{name} is not as it was saved$"):
        checkpoints.state(3, like(), CPU)
    path.unlink()
    with pytest.raises(CorruptCheckpointError, match=f"^{name} is missing$"):
        checkpoints.state(3, like(), CPU)
    os.mkfifo(path)
    with pytest.raises(CorruptCheckpointError, match=f"^{name} is missing$"):
        checkpoints.state(3, like(), CPU)


def test_a_file_that_this_process_cannot_open_is_not_called_damaged(checkpoints):
    """For example for lack of descriptors: the checkpoint may be whole."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(RunError) as caught:
            checkpoints.newest(load_with(checkpoints), [3])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert is_one_line(caught.value)


def test_a_list_of_files_cannot_name_files_elsewhere(checkpoints, tmp_path):
    path = tmp_path / CHECKPOINTS / "3" / "files.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"params/../../../secret": ""}))
    (tmp_path / "secret").write_text("")
    assert checkpoints.meta(3)["seconds"] == META["seconds"]
    checkpoints.weights(3, like().params, CPU)


def test_a_malformed_list_of_files_is_refused_in_one_line(checkpoints, tmp_path):
    objects = (b'{"params/x": 1}', b'{"meta": ""}', b'{"": ""}')
    for text in (*objects, b"", b"[]", b"3", b"\xff", b"null", b"[[]]", b"[" * 99_999):
        (tmp_path / CHECKPOINTS / "3" / "files.json").write_bytes(text)
        with pytest.raises(CorruptCheckpointError) as caught:
            checkpoints.state(3, like(), CPU)
        assert is_one_line(caught.value)


def test_parameters_alone_need_only_their_own_files(checkpoints, tmp_path, trained):
    shutil.rmtree(tmp_path / CHECKPOINTS / "3" / "optimizer")
    assert_average_of(trained, checkpoints.weights(3, like().params, CPU))


def load_with(checkpoints):
    return lambda step: (step, checkpoints.state(step, like(), CPU))


def empty(tmp_path, *steps):
    for step in steps:
        for path in files_of(tmp_path, step):
            path.write_bytes(b"")


def test_the_newest_whole_checkpoint_is_taken_and_damaged_ones_are_named(three, tmp_path, trained):
    empty(tmp_path, 3, 5)
    (step, state), skipped = three.newest(load_with(three), three.steps())
    assert step == 1
    assert_same_bits(state, trained)
    assert [reason.split(":")[0] for reason in skipped] == ["checkpoints/5", "checkpoints/3"]


def test_if_none_is_whole_each_is_named_and_left_in_place(three, tmp_path):
    empty(tmp_path, 1, 3, 5)
    with pytest.raises(UsageError) as caught:
        three.newest(load_with(three), three.steps())
    assert is_one_line(caught.value)
    assert all(f"checkpoints/{step}: " in str(caught.value) for step in (1, 3, 5))
    assert Checkpoints(tmp_path).steps() == [1, 3, 5]


def test_a_checkpoint_that_is_moved_aside_frees_its_name_and_evicts_no_good_one(three, tmp_path, trained):
    empty(tmp_path, 3, 5)
    lines = three.clean_up(1)
    assert len(lines) == 2
    assert three.steps() == [1]
    for step in (3, 5):
        three.save(step, committed(trained), META)
    three.wait()
    assert three.steps() == [1, 3, 5]
    assert_same_bits(three.state(5, like(), CPU), trained)
    assert sorted(path.name for path in (tmp_path / CHECKPOINTS).glob("*.damaged")) == ["3.damaged", "5.damaged"]
    (tmp_path / CHECKPOINTS / "5.damaged/notes").write_text("a person's")
    assert "5.damaged-2" in three.clean_up(3)[0]
    assert (tmp_path / CHECKPOINTS / "5.damaged/notes").read_text() == "a person's"
    assert Checkpoints(tmp_path).steps() == [1, 3]


def test_an_unfinished_save_is_no_checkpoint_and_is_deleted(three, tmp_path):
    folder = tmp_path / CHECKPOINTS
    (folder / "5").rename(folder / "5.orbax-checkpoint-tmp")
    reopened = Checkpoints(tmp_path)
    assert reopened.steps() == [1, 3]
    (line,) = reopened.clean_up(3)
    assert "5.orbax-checkpoint-tmp" in line
    assert sorted(path.name for path in folder.iterdir()) == ["1", "3"]


# the largest array takes 19,200 bytes of one file; which others share its file depends on the threads that write
@pytest.mark.parametrize("room", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (300, 3_000)), 15_000])
def test_a_full_disk_harms_no_other_checkpoint_and_the_next_save_works(three, tmp_path, trained, room):
    before = {path: path.read_bytes() for step in (1, 3, 5) for path in files_of(tmp_path, step)}
    with disk_room(room), pytest.raises(RunError) as caught:
        three.save(7, committed(trained), META)
        three.wait()
    assert is_one_line(caught.value)
    assert Checkpoints(tmp_path).steps() == [1, 3, 5]
    assert {path: path.read_bytes() for path in before} == before
    for step in (7, 9):
        three.save(step, committed(trained), META)
        three.wait()
    assert sorted(path.name for path in (tmp_path / CHECKPOINTS).iterdir()) == ["5", "7", "9"]
    assert three.steps() == [5, 7, 9]
    assert_same_bits(three.state(7, like(), CPU), trained)


def test_a_save_without_room_does_not_begin(three, tmp_path, trained, monkeypatch):
    needed = checkpoint_bytes(trained)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    three.save(7, committed(trained), META)
    with pytest.raises(RunError, match="MB are free"):
        three.wait()
    assert sorted(path.name for path in (tmp_path / CHECKPOINTS).iterdir()) == ["1", "3", "5"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    three.save(7, committed(trained), META)
    three.wait()
    assert three.steps() == [3, 5, 7]


def test_a_checkpoint_fits_in_checkpoint_bytes(three, tmp_path, trained):
    size = sum(path.stat().st_size for path in files_of(tmp_path))
    assert size <= checkpoint_bytes(trained) == checkpoint_bytes(like())


def test_all_files_are_synced_before_the_directory_is_renamed(tmp_path, trained, monkeypatch):
    """A power cut may lose files that orbax writes later: the checkpoint is whole without them."""
    synced, sync_tree = {}, atomic.sync_tree

    def watch(directory):
        sync_tree(directory)
        synced.update(
            {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
        )

    monkeypatch.setattr(atomic, "sync_tree", watch)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, committed(trained), META)
    checkpoints.wait()
    for path in files_of(tmp_path):
        path.write_bytes(synced.get(path.relative_to(tmp_path / CHECKPOINTS / "3"), b""))
    assert whole_or_damaged(tmp_path, trained)


def test_a_checkpoint_without_file_hashes_is_no_saved_checkpoint_and_replaces_none(three, trained, monkeypatch):
    """As with a version of orbax that calls its callback after it renames the directory, or not at all."""
    monkeypatch.setattr(Checkpoints, "_finish", lambda *arguments: None)
    assert "before its files were hashed" in failed_save(three, trained)
    assert sorted(path.name for path in three.directory.iterdir()) == ["1", "3", "5"]
    assert_same_bits(three.state(1, like(), CPU), trained)


def test_a_checkpoint_of_another_model_is_refused(checkpoints):
    other = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, layers=1))
    with pytest.raises(CorruptCheckpointError) as caught:
        checkpoints.state(3, like(other), CPU)
    assert is_one_line(caught.value)


def failed_save(checkpoints, trained, step=7):
    """The reason in one line."""
    checkpoints.save(step, committed(trained), META)
    with pytest.raises(RunError) as caught:
        checkpoints.wait()
    assert is_one_line(caught.value)
    return str(caught.value)


ODD = ["[proj]", "b\\c", "{a,b}", "%41#x", "new\nline", "file:", "\udcff", "**", "5.orbax-checkpoint-tmp-1"]
LESS_ODD = ["s*", "q?", " blanks ", "~", "é日", "gs:"]


@pytest.mark.parametrize("name", [*ODD, *(pytest.param(name, marks=pytest.mark.slow) for name in LESS_ODD)])
def test_any_path_holds_checkpoints(saved, tmp_path, trained, monkeypatch, name):
    """A checkpoint written there is restored, and one that was copied there."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    shutil.copytree(saved.directory / "3", tmp_path / name / CHECKPOINTS / "3")
    checkpoints = Checkpoints(tmp_path / name, 3)
    checkpoints.save(7, committed(trained), META)
    checkpoints.wait()
    for step in (3, 7):
        assert_same_bits(Checkpoints(tmp_path / name).state(step, like(), CPU), trained)
    assert sorted(path.name for path in (tmp_path / name / CHECKPOINTS).iterdir()) == ["3", "7"]
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize("name", ["t[m]p", "%41", "missing"])
def test_an_odd_path_of_temporary_files_is_not_given_to_orbax(tmp_path, trained, monkeypatch, name):
    if name != "missing":
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / name))
    (tmp_path / "[proj]").mkdir()
    checkpoints = Checkpoints(tmp_path / "[proj]")
    checkpoints.save(1, committed(trained), META)
    checkpoints.wait()
    assert_same_bits(checkpoints.state(1, like(), CPU), trained)


def test_an_odd_path_without_a_place_for_a_link_is_refused_at_the_start(tmp_path, monkeypatch):
    (tmp_path / "[proj]").mkdir()
    monkeypatch.setattr(checkpoint, "_SAFE_PATH", re.compile("safe"))
    with pytest.raises(UsageError, match="set TMPDIR") as caught:
        Checkpoints(tmp_path / "[proj]")
    assert is_one_line(caught.value)


def test_a_relative_link_to_an_odd_path_holds_checkpoints(tmp_path, trained, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("[far]/run").mkdir(parents=True)
    Path("near").symlink_to("[far]/run")
    for workdir in (Path("near"), Path("[far]", "..", "near")):
        checkpoints = Checkpoints(workdir)
        checkpoints.save(len(checkpoints.steps()), committed(trained), META)
        checkpoints.wait()
    assert Checkpoints(tmp_path / "[far]/run").steps() == [0, 1]
    assert_same_bits(Checkpoints(tmp_path / "[far]/run").state(1, like(), CPU), trained)


@pytest.mark.parametrize("name", ["/gs/run", "/s3/run", "/az/run", "/hf/run"])
def test_a_folder_named_as_a_cloud_is_hidden_from_orbax(name):
    with checkpoint._safe_path(Path(name)) as path:
        assert path.is_symlink()
        assert os.readlink(path) == name


def test_a_safe_path_needs_no_link(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "mkdtemp", None)
    with checkpoint._safe_path(Path("/gsx/A run/of_2,.=@+~-")) as path:
        assert path == Path("/gsx/A run/of_2,.=@+~-")


def test_a_save_whose_parts_orbax_does_not_merge_is_no_checkpoint(saved, tmp_path, trained, monkeypatch):
    """It globs the path unescaped: without the link, the checkpoint lacks every array, and its files have hashes."""
    shutil.copytree(saved.directory, tmp_path / "[proj]" / CHECKPOINTS)
    monkeypatch.setattr(checkpoint, "_SAFE_PATH", re.compile(".*"))
    checkpoints = Checkpoints(tmp_path / "[proj]", 3)
    reason = failed_save(checkpoints, trained)
    assert reason.endswith("library.log in the work directory says more")
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["1", "3", "5"]
    assert_same_bits(checkpoints.state(1, like(), CPU), trained)


@pytest.mark.skipif(not checkpoint._UNCOMPRESSED, reason="this orbax always compresses")
def test_arrays_are_not_compressed(three, trained):
    three.save(7, trained._replace(params={"norm": jnp.zeros(2**18)}), META)
    three.wait()
    assert sum(file.stat().st_size for file in three.directory.glob("7/params/**/*") if file.is_file()) > 2**20


CHANGES = ["missing", "added", "shape", "dtype"]
OTHERS = [("optimizer", change) for change in CHANGES] + [("average", change) for change in CHANGES]
FAST = [("optimizer", "shape"), ("average", "dtype")]


@pytest.mark.parametrize(
    ("item", "change"),
    [
        *(("params", change) for change in CHANGES),
        *(pytest.param(*other, marks=[pytest.mark.slow] * (other not in FAST)) for other in OTHERS),
    ],
)
def test_a_save_that_lacks_or_alters_an_array_is_no_checkpoint(three, trained, monkeypatch, change, item):
    handler, names = ocp.PyTreeCheckpointHandler, {np.float32: "params", np.float16: "average"}
    async_save = handler.async_save

    def altered(tree):
        name = "step" if item == "optimizer" else "norm"
        if item == ("optimizer" if "moments" in tree else names[tree["norm"].dtype.type]):
            other = {"shape": tree[name][None], "dtype": tree[name].astype(jnp.bfloat16)}.get(change)
            rest = {key: leaf for key, leaf in tree.items() if key != name or change == "added"}
            tree = rest | ({} if change == "missing" else {"more" if change == "added" else name: other})
            if change == "added":
                tree["more"] = jnp.zeros(3)
        return tree

    async def save_altered(self, *place, args):
        return await async_save(self, *place, args=dataclasses.replace(args, item=altered(args.item)))

    monkeypatch.setattr(handler, "async_save", save_altered)
    name = "more" if change == "added" else "step" if item == "optimizer" else "norm"
    assert f"{item}.{name} is " in failed_save(three, trained)
    assert sorted(path.name for path in three.directory.iterdir()) == ["1", "3", "5"]


NUMBERS = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.EFBIG]


@pytest.mark.parametrize(
    ("number", "as_text"), [*((number, True) for number in NUMBERS), (errno.ENOSPC, False), (errno.EIO, False)]
)
def test_the_advice_of_a_failed_save_fits_its_error(three, trained, monkeypatch, number, as_text):
    def fail(*arguments):
        text = f'UNKNOWN: Failed writing: "/a b": {os.strerror(number)} [os_error_code=\'{number}\'] [more="]'
        raise ValueError(text) if as_text else OSError(number, os.strerror(number))

    monkeypatch.setattr(*((checkpoint, "_check_written") if as_text else (os, "fsync")), fail)
    reason = failed_save(three, trained)
    assert f"({os.strerror(number)}): {disk_advice(OSError(number, ''))}" in reason
    assert ("make room" in reason) == (number in (errno.ENOSPC, errno.EDQUOT))
    monkeypatch.undo()
    assert three.steps() == [1, 3, 5]
    three.save(7, committed(trained), META)
    three.wait()


def test_a_work_directory_that_is_gone_is_not_created_by_a_save(three, tmp_path, trained):
    (tmp_path / CHECKPOINTS).rename(tmp_path / "moved")
    assert "was renamed, deleted or unmounted" in failed_save(three, trained)
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]


def test_the_cause_of_a_failed_save_is_logged(three, trained, monkeypatch, caplog):
    monkeypatch.setattr(checkpoint, "_check_written", lambda *arguments: {}["of orbax"])
    with caplog.at_level(logging.WARNING, logger="jaxlm"):
        failed_save(three, trained)
    assert "KeyError: 'of orbax'" in caplog.text


def seal(tmp_path, step):
    """Gives a checkpoint the hashes of its files as they are, as a save by orbax would that went wrong."""
    folder = tmp_path / CHECKPOINTS / str(step)
    files = [path for path in folder.glob("*/**/*") if path.is_file()]
    hashes = {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (folder / "files.json").write_text(json.dumps(hashes))


@pytest.mark.parametrize("item", ["params", "optimizer", "meta"])
def test_a_sealed_checkpoint_that_cannot_be_restored_costs_only_itself(three, tmp_path, trained, item):
    for path in files_of(tmp_path, 5):
        if path.name in ("manifest.ocdbt", "metadata") and path.parent.name == item:
            path.unlink() if item == "params" else path.write_bytes(b"")
    seal(tmp_path, 5)
    (step, state), (reason,) = three.newest(load_with(three), three.steps())
    assert step == 3
    assert_same_bits(state, trained)
    assert reason.startswith("checkpoints/5: it cannot be restored (")


def fail_restore(monkeypatch, error):
    def restore(*arguments, **options):
        raise error

    monkeypatch.setattr(ocp.Checkpointer, "restore", restore)


HERE = [
    (MemoryError(), "close other programs"),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), "close other programs"),
    (OSError(errno.EACCES, os.strerror(errno.EACCES)), "permissions"),
    (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "ulimit"),
    (ValueError(f"X: Error reading \"/a\": {os.strerror(errno.EACCES)} [os_error_code='13']"), "permissions"),
    (ValueError(f'X: Error reading "/a": {os.strerror(errno.ENOMEM)}'), "close other programs"),
]


@pytest.mark.parametrize(("error", "advice"), HERE)
def test_a_restore_that_fails_for_this_process_is_not_called_damage(three, monkeypatch, error, advice):
    fail_restore(monkeypatch, error)
    with pytest.raises(RunError, match=advice) as caught:
        three.newest(load_with(three), three.steps())
    assert is_one_line(caught.value)
    assert "try again" not in str(caught.value)


@pytest.mark.parametrize(
    "error", [ValueError("a\nb"), KeyError("x"), OSError(errno.EIO, "I/O"), FileNotFoundError(2, "x")]
)
def test_if_no_checkpoint_can_be_restored_each_is_named(three, monkeypatch, error):
    fail_restore(monkeypatch, error)
    with pytest.raises(UsageError) as caught:
        three.newest(load_with(three), three.steps())
    assert is_one_line(caught.value)
    assert all(f"checkpoints/{step}: it cannot be restored" in str(caught.value) for step in (1, 3, 5))


@pytest.mark.parametrize("of_list", [False, True])
@pytest.mark.parametrize(("number", "kind"), [(errno.EIO, CorruptCheckpointError), (errno.EACCES, RunError)])
def test_a_file_that_the_disk_cannot_read_is_damaged(checkpoints, monkeypatch, of_list, number, kind):
    def fail(path, *arguments, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(*((Path, "read_text") if of_list else (checkpoint, "_sha256")), fail)
    with pytest.raises(kind, match=os.strerror(number)) as caught:
        checkpoints.state(3, like(), CPU)
    assert is_one_line(caught.value)


def test_a_file_that_cannot_be_read_again_fails_the_save(three, trained, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoint, "_sha256", fail)
    assert os.strerror(errno.EIO) in failed_save(three, trained)
    assert three.steps() == [1, 3, 5]


def test_only_folders_of_whole_numbers_are_checkpoints(three, tmp_path):
    for name in ("007", "²", "7.damaged", "x"):
        (tmp_path / CHECKPOINTS / name).mkdir()
    (tmp_path / CHECKPOINTS / "9").write_text("a file")
    assert three.steps() == [1, 3, 5]
