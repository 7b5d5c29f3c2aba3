"""A step on a mesh compared with a step on one device. `test_sharding.py` runs this file on eight devices."""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import Config, MeshConfig, ModelConfig, OptimizerConfig
from jaxlm.core.checksum import checksums
from jaxlm.core.model import loss_and_gradient
from jaxlm.core.train_step import init_state, make_eval_step, make_train_step
from jaxlm.device.mesh import batch_sharding, make_mesh, place_rows

STEPS = 8
NAN = 255  # a micro-batch that holds this token has a gradient that is not finite, on the device with its row
SIZES = {"vocab_size": 257, "context": 16, "layers": 2, "heads": 2, "width": 32, "mlp_width": 48}
CONFIG = Config(
    batch_size=16,
    grad_accum_steps=2,
    microbatch_chunks=2,
    max_steps=STEPS,
    model=ModelConfig(**SIZES, precision="float32", remat=True),
    optimizer=OptimizerConfig(warmup_steps=2, learning_rate=1e-2, clip_norm=0.3, average=0.5),
)
MUON = replace(CONFIG, optimizer=replace(CONFIG.optimizer, name="muon", muon_b2=0.9))
NO_REMAT = replace(CONFIG, microbatch_chunks=1, model=replace(CONFIG.model, remat=False, tied=False, qk_norm=True))
AT_ONCE = replace(NO_REMAT, grad_accum_steps=1)  # gradients are summed as soon as they are computed
DEVICE = jax.devices()[0]


def on(config, layout):
    """The config and its mesh; None for one device."""
    config = replace(config, mesh=MeshConfig(*layout))
    return config, make_mesh(config, DEVICE)


@pytest.fixture(autouse=True, scope="module")
def poisoned_gradient():
    def poisoned(config, params, inputs_BT, *more):
        loss_sum, grads = loss_and_gradient(config, params, inputs_BT, *more)
        poison = jnp.where(jnp.any(inputs_BT == NAN), jnp.nan, 0)
        return loss_sum, grads | {"embedding": grads["embedding"].at[3, 5].add(poison)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxlm.core.train_step.loss_and_gradient", poisoned)
        yield


def micro_batches():
    """Enough for STEPS, and three more whose gradient is not finite: one in the first row, two in the last."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 250, (2 * STEPS + 3, CONFIG.batch_size, SIZES["context"] + 1), np.int32)
    ids[(0, 5, 6), (0, -1, -1), (3, 7, 2)] = NAN
    return ids


@functools.cache
def trained(config, layout):
    """What each micro-step reports, and the state after STEPS."""
    config, mesh = on(config, layout)
    state, step, reports = init_state(config, mesh), make_train_step(config, mesh), []
    for ids in micro_batches()[: STEPS * config.grad_accum_steps + 3]:
        state, metrics = step(state, place_rows(ids, batch_sharding(mesh, DEVICE)))
        reports.append(jax.device_get(metrics))
    return reports, state


def evaluation(config, layout):
    """The loss of the average of the weights; some targets, more of them in the first rows, are ignored."""
    (_, state), (config, mesh) = trained(config, layout), on(config, layout)
    ids = micro_batches()[1]
    targets = np.where(ids[:, 1:] < np.arange(len(ids), 0, -1)[:, None] * 10, -1, ids[:, 1:])
    batch = (place_rows(array, batch_sharding(mesh, DEVICE)) for array in (ids[:, :-1], targets))
    return float(make_eval_step(config, mesh)(state.weights, *batch))


def assert_same_training(config, layout):
    (one_reports, one), (reports, state) = trained(config, (1, 1)), trained(config, layout)
    for a, b in zip(one_reports, reports, strict=True):
        counted = ("updated", "step", "skipped", "skipped_in_a_row")
        assert [getattr(a, name) for name in counted] == [getattr(b, name) for name in counted]
        if a.updated:
            assert float(b.loss) == pytest.approx(float(a.loss), rel=2e-6)
            assert float(b.grad_norm) == pytest.approx(float(a.grad_norm), rel=1e-3)
            for kind, ratio in a.update_ratios.items():
                assert float(b.update_ratios[kind]) == pytest.approx(float(ratio), rel=1e-3)
    assert [int(report.skipped) for report in reports][:8] == [1, 1, 1, 1, 1, 2, 3, 3]
    assert int(state.step) == STEPS
    for a, b in zip(jax.tree.leaves(one.weights), jax.tree.leaves(state.weights), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_steps_are_those_of_one_device():
    assert_same_training(CONFIG, (2, 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "layout"),
    [(MUON, (2, 4)), (NO_REMAT, (1, 8)), (AT_ONCE, (8, 1)), (replace(AT_ONCE, model=CONFIG.model), (4, 2))],
)
def test_steps_are_those_of_one_device_for_every_kind_of_step_and_layout(config, layout):
    assert_same_training(config, layout)


@pytest.mark.slow
def test_an_evaluation_is_that_of_one_device():
    assert evaluation(MUON, (2, 4)) == pytest.approx(evaluation(MUON, (1, 1)), rel=1e-5)


@pytest.mark.slow
def test_a_drawn_state_has_the_same_bits_and_each_device_its_part_only():
    one = init_state(CONFIG)
    for data, fsdp in ((4, 2), (1, 8)):
        state = init_state(*on(CONFIG, (data, fsdp)))
        for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(state.params), strict=True):
            np.testing.assert_array_equal(a, b)
        assert checksums(state.params).tolist() == checksums(one.params).tolist()
        moments = [leaf for leaf in jax.tree.leaves(state.opt_state.inner_opt_state) if leaf.ndim]
        assert len(moments) == 2 * len(jax.tree.leaves(one.params))
        for tree, parts in (((state.params, state.average, moments), fsdp), (state.opt_state.acc_grads, data * fsdp)):
            for leaf in jax.tree.leaves(tree):
                assert {shard.data.size * parts for shard in leaf.addressable_shards} == {leaf.size}


def collectives(config, layout):
    """The kind, the shapes of the result and the name of each collective operation of the compiled step."""
    config, mesh = on(config, layout)
    ids = jax.ShapeDtypeStruct(micro_batches()[0].shape, np.int32, sharding=batch_sharding(mesh, DEVICE))
    text = make_train_step(config, mesh).lower(init_state(config, mesh), ids).compile().as_text()
    rows, V = CONFIG.batch_size // mesh.size * SIZES["context"], config.model.vocab_size
    assert f"[{rows},{V}]" not in text, "the whole logits"
    found = re.findall(r"(?m)^.* = (.*) (all-reduce|all-gather|reduce-scatter)(?:-start)?\((.*)$", text)
    return [(kind, re.findall(r"(\w+)\[([\d,]*)\]", shapes), rest) for shapes, kind, rest in found]


@pytest.mark.slow
def test_gradients_are_summed_over_data_once_a_step_in_float32():
    model = replace(CONFIG.model, vocab_size=4096, precision="bf16", remat=False)
    config = replace(CONFIG, microbatch_chunks=1, model=model)
    for every, place in ((2, "cond/branch_1_fun"), (1, "transpose(jvp())/psum")):
        sums = [
            (dtype, rest)
            for kind, shapes, rest in collectives(replace(config, grad_accum_steps=every), (4, 1))
            for dtype, shape in shapes
            if kind == "all-reduce" and "," in shape
        ]
        assert len(sums) >= len(jax.tree.leaves(init_state(config).params)) - 1  # all but the last norm are matrices
        assert {dtype for dtype, _ in sums} == {"f32"}
        assert all(place in rest for _, rest in sums)


@pytest.mark.slow
def test_the_embedding_is_gathered_once_a_micro_batch():
    config = replace(CONFIG, microbatch_chunks=1, model=replace(CONFIG.model, vocab_size=4096))
    gathers = [
        (shape, rest)
        for kind, shapes, rest in collectives(config, (1, 4))
        for _, shape in shapes
        if kind == "all-gather" and shape
    ]
    whole = [rest for shape, rest in gathers if "4096" in shape]
    assert len(whole) == 1
    assert "while" not in whole[0]
    blocks = [rest for shape, rest in gathers if "," in shape and "4096" not in shape]
    assert len(blocks) >= 14  # seven matrices forward, and again backward
    assert all("while/body" in rest for rest in blocks)
