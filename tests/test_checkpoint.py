"""Checkpoints: exact, taken at the moment they are asked for, few, small."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import assert_same_bits, is_one_line, share_compilations

from jaxlm.checkpoint import DIRECTORY, Checkpoints
from jaxlm.config import Config, ModelConfig, OptimizerConfig
from jaxlm.errors import RequestError
from jaxlm.step import init_state, make_train_step

MODEL = ModelConfig(vocab_size=300, context=16, layers=2, heads=2, width=16, hidden=24, dtype="float32")
CONFIG = Config(batch_size=2, grad_accum_steps=2, max_steps=100, model=MODEL, optimizer=OptimizerConfig(warmup_steps=1))
META = {"config": {"é": [1, None, 2.5]}, "seconds": 0.1}
CPU = jax.devices("cpu")[0]

pytestmark = pytest.mark.usefixtures("quick_compilation")


def like(config=CONFIG):
    return jax.eval_shape(lambda: init_state(config))


def batches(config, seed=0):
    draw = np.random.default_rng(seed)
    while True:
        shape = (config.batch_size, config.model.context + 1)
        yield draw.integers(0, config.model.vocab_size, shape, np.int32)


def committed(state):
    """On its device for good, as a restored one is: so one compilation serves both."""
    return jax.device_put(state, CPU)


def copy(state):
    """On the host. Accumulated gradients are -0.0 after a step, which adds nothing; here they are 0.0."""
    state = jax.tree.map(np.array, state)
    gradients = jax.tree.map(lambda leaf: leaf + 0.0, state.opt_state.acc_grads)
    return state._replace(opt_state=state.opt_state._replace(acc_grads=gradients))


def advance(train_step, state, source, micro_batches):
    for _ in range(micro_batches):
        state, _ = train_step(state, next(source))
    return state


@pytest.fixture(scope="module")
def train_step(tmp_path_factory, quick_compilation):
    share_compilations(tmp_path_factory.getbasetemp() / "compiled")
    return make_train_step(CONFIG)


@pytest.fixture(scope="module")
def trained(train_step):
    """The state after three optimizer steps, as copies on the host."""
    return copy(advance(train_step, committed(init_state(CONFIG)), batches(CONFIG), 6))


@pytest.fixture
def checkpoints(tmp_path, trained):
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(3, committed(trained), META)
    checkpoints.wait()
    return checkpoints


def test_the_whole_state_comes_back_bit_for_bit(checkpoints, trained, tmp_path):
    for source in (checkpoints, Checkpoints(tmp_path)):
        assert source.steps() == [3]
        restored = source.state(3, like(), CPU)
        assert_same_bits(restored, trained)
        assert jax.tree.structure(restored) == jax.tree.structure(like())
        assert (int(restored.step), int(restored.batches)) == (3, 6)
    moments = [leaf for leaf in jax.tree.leaves(trained.opt_state.inner_opt_state) if leaf.ndim]
    assert len(moments) >= 2 * len(jax.tree.leaves(trained.params))
    assert all(leaf.any() for leaf in moments)


def test_a_restored_state_trains_on_as_the_saved_one_would_have(checkpoints, trained, train_step):
    on = [
        advance(train_step, state, batches(CONFIG, seed=1), 4)
        for state in (checkpoints.state(3, like(), CPU), committed(trained))
    ]
    assert_same_bits(*on)


def test_parameters_alone_come_back(checkpoints, trained):
    assert_same_bits(checkpoints.params(3, like().params, CPU), trained.params)


def test_what_it_says_of_itself_comes_back(checkpoints):
    assert checkpoints.meta(3) == META


def test_a_save_holds_the_values_of_its_moment_though_the_buffers_are_donated_at_once(tmp_path):
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, vocab_size=20_000, width=64))
    train_on = jax.jit(
        lambda state: jax.tree.map(lambda leaf: leaf + jnp.ones((), leaf.dtype), state), donate_argnums=0
    )
    state = committed(init_state(config))
    checkpoints = Checkpoints(tmp_path, 5)
    expected, saving = {}, []
    for step in (1, 2, 3, 4):
        embedding = state.params["embedding"]
        state = train_on(state)
        assert embedding.is_deleted()
        expected[step] = jax.tree.map(np.array, state)
        checkpoints.save(step, state, META)
        saving.append(checkpoints.saving())
        state = jax.block_until_ready(train_on(train_on(state)))
    checkpoints.wait()
    assert any(saving)
    assert not checkpoints.saving()
    for step, then in expected.items():
        restored = checkpoints.state(step, like(config), CPU)
        assert_same_bits(restored.params, then.params)
        assert_same_bits(restored.opt_state.inner_opt_state, then.opt_state.inner_opt_state)
        assert int(restored.batches) == then.batches


def test_only_the_last_few_are_kept(tmp_path, trained):
    checkpoints = Checkpoints(tmp_path, 2)
    state = committed(trained)
    for step in (1, 5, 7, 30):
        checkpoints.save(step, state, META)
    checkpoints.wait()
    assert checkpoints.steps() == [7, 30]
    assert sorted(path.name for path in (tmp_path / DIRECTORY).iterdir()) == ["30", "7"]


def test_one_holds_parameters_and_moments_and_no_more(tmp_path):
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, vocab_size=5000, width=64))
    draw = np.random.default_rng(0)
    random = [jnp.asarray(draw.normal(size=leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(like(config))]
    state = jax.tree.unflatten(jax.tree.structure(like(config)), random)
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(1, state, META)
    checkpoints.wait()
    size = sum(path.stat().st_size for path in (tmp_path / DIRECTORY).rglob("*") if path.is_file())
    numbers = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert 0.85 < size / (3 * 4 * numbers) < 1.05


@pytest.mark.parametrize("damaged", ["params", "optimizer", "meta"])
@pytest.mark.parametrize("how", ["gone", "cut"])
def test_a_damaged_one_is_refused_in_one_line_that_names_it(checkpoints, tmp_path, damaged, how):
    folder = tmp_path / DIRECTORY / "3" / damaged
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        if how == "gone":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-3])
    again = Checkpoints(tmp_path)
    with pytest.raises(RequestError) as caught:
        (again.state(3, like(), CPU), again.meta(3))
    assert is_one_line(caught.value)
    assert str(tmp_path / DIRECTORY / "3") in str(caught.value)


def test_one_of_another_model_is_refused_in_one_line(checkpoints):
    other = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, layers=1))
    with pytest.raises(RequestError) as caught:
        checkpoints.state(3, like(other), CPU)
    assert is_one_line(caught.value)


def test_a_save_that_was_broken_off_is_none(checkpoints, tmp_path):
    folder = tmp_path / DIRECTORY
    (folder / "3").rename(folder / "3.orbax-checkpoint-tmp")
    assert Checkpoints(tmp_path).steps() == []
