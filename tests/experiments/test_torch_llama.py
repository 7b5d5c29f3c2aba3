"""The peer in PyTorch computes what jaxlm computes from the same weights, and trains as jaxlm does.

python -m pytest -m interop tests/experiments/test_torch_llama.py
"""

from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments.time_to_loss import JaxlmRun, TorchRun, alternate, measure
from jaxlm.config import Config, DataConfig, ModelConfig, OptimizerConfig
from jaxlm.core.decoder import Decoder
from jaxlm.core.optimizer import make_schedule
from jaxlm.core.train_step import init_state, make_eval_step, make_train_step
from jaxlm.data.token_files import val_batches
from jaxlm.prepare import prepare
from tests import tiny_run

torch = pytest.importorskip("torch")
from experiments import torch_llama  # noqa: E402  (it needs PyTorch)

pytestmark = pytest.mark.interop

MODEL = ModelConfig(  # a vocabulary that the peer does not pad
    vocab_size=320, context=24, layers=2, heads=2, width=24, mlp_width=32, rope_theta=50.0, precision="float32"
)
ADAMW = OptimizerConfig(
    learning_rate=0.02,
    warmup_steps=3,
    lr_schedule="linear",
    min_lr_ratio=0.0,
    b1=0.8,
    b2=0.9,
    weight_decay=0.5,
    clip_norm=1.0,
)
CONFIG = Config(batch_size=3, grad_accum_steps=2, max_steps=8, model=MODEL, optimizer=ADAMW)


@pytest.fixture
def uncompiled(monkeypatch):
    """PyTorch runs as it is written."""
    monkeypatch.setattr(torch, "compile", lambda model: model)


def copy_weights(model, params):
    """Gives the peer's model jaxlm's weights; rows that pad the vocabulary are zero."""
    blocks = {name: np.asarray(leaf) for name, leaf in params["blocks"].items()}
    embedding = np.zeros(model.embedding.weight.shape, np.float32)
    embedding[: len(params["embedding"])] = params["embedding"]
    weights = {"embedding": embedding, "norm": params["norm"]}
    for layer in range(len(blocks["query"])):
        fused = {"qkv": ("query", "key", "value"), "gate_up": ("gate", "up"), "output": ("output",), "down": ("down",)}
        for name, parts in fused.items():
            weights[f"blocks.{layer}.{name}"] = np.concatenate([blocks[part][layer].T for part in parts])
        for name in ("attention_norm", "mlp_norm"):
            weights[f"blocks.{layer}.{name}"] = blocks[name][layer]
    state = {f"{name}.weight": torch.from_numpy(np.array(weight)) for name, weight in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert sorted(missing) == ["cos", "sin"]


def weights_of(model):
    return {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}


def test_logits_are_those_of_jaxlm(small_model):
    config, params = small_model
    model = torch_llama.Decoder(config)
    copy_weights(model, params)
    ids = np.random.default_rng(0).integers(config.vocab_size, size=(2, config.context))
    expected = Decoder(config).apply({"params": params}, ids)
    with torch.no_grad():
        logits = model.logits(torch.from_numpy(ids)).numpy()
    assert logits.shape == (2, config.context, 320)
    np.testing.assert_allclose(
        logits[..., : config.vocab_size], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max()
    )


def test_training_has_the_losses_and_the_weights_of_jaxlm(uncompiled):
    """Schedule, clipping, moments, decay without the norms, accumulation; and the validation loss, with padding."""
    config = replace(CONFIG, microbatch_chunks=1, model=replace(MODEL, implementation="cpu"))
    state = init_state(config)
    peer, trained = torch_llama.Peer(config, "cpu"), torch_llama.Decoder(MODEL)
    copy_weights(peer.model, state.params)
    rng = np.random.default_rng(1)
    batches = rng.integers(MODEL.vocab_size, size=(config.max_steps, 2, 3, MODEL.context + 1), dtype=np.int32)
    batches[3] = 7  # one token alone has a gradient that is clipped; those of the other steps are not
    train_step, norms = make_train_step(config), []
    for step_batches in batches:
        for ids in step_batches:
            state, metrics = train_step(state, ids)
        norms.append(float(metrics.grad_norm))
        peer.train(map(peer.to_device, step_batches), 1)
    assert [norm > ADAMW.clip_norm for norm in norms] == [step == 3 for step in range(config.max_steps)]
    copy_weights(trained, state.params)
    expected, actual = weights_of(trained), weights_of(peer.model)
    for name, weight in expected.items():
        np.testing.assert_allclose(actual[name], weight, atol=2e-4, err_msg=name)
        assert np.abs(weight).mean() > 0.01
    val = rng.integers(MODEL.vocab_size, size=100).astype(np.uint16)
    ((inputs, targets),) = val_batches(val, MODEL.context, 6)
    assert (targets < 0).any()
    expected_sum = make_eval_step(config)(state.params, inputs, targets)
    assert peer.loss_sum(inputs, targets) == pytest.approx(float(expected_sum), rel=1e-5)


def test_a_training_loss_is_the_mean_over_tokens(uncompiled):
    peer = torch_llama.Peer(replace(CONFIG, grad_accum_steps=1), "cpu")
    ids = np.random.default_rng(0).integers(MODEL.vocab_size, size=(3, MODEL.context + 1))
    expected = peer.loss_sum(ids[:, :-1], ids[:, 1:]) / (3 * MODEL.context)
    assert peer.train(map(peer.to_device, [ids]), 1) == pytest.approx(expected, rel=1e-5)
    assert peer.loss_sum(ids[:, :-1], ids[:, 1:]) / (3 * MODEL.context) < expected


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("warmup", "fraction", "floor"), [(0, 1.0, 0.0), (7, 1.0, 0.1), (7, 0.4, 0.0)])
def test_the_schedule_is_that_of_jaxlm(schedule, warmup, fraction, floor):
    c = replace(ADAMW, lr_schedule=schedule, warmup_steps=warmup, lr_decay_fraction=fraction, min_lr_ratio=floor)
    expected = make_schedule(c, 30)
    for step in range(30):
        assert torch_llama.lr_scale(c, 30, step) == pytest.approx(float(expected(step)), abs=1e-6)


def test_the_initial_weights_are_drawn_as_those_of_jaxlm():
    torch.manual_seed(0)
    config = replace(MODEL, width=48, mlp_width=96, layers=3)
    model, expected = torch_llama.Decoder(config), torch_llama.Decoder(config)
    copy_weights(expected, init_state(replace(CONFIG, model=config)).params)
    for name, weight in weights_of(expected).items():
        actual = weights_of(model)[name]
        if actual.ndim == 1:
            assert (actual == weight).all()
        else:
            assert actual.std() == pytest.approx(weight.std(), rel=0.05), name
            assert abs(actual.mean()) < 4 * weight.std() / np.sqrt(weight.size)


def test_compilation_changes_no_weight(uncompiled):
    peer = torch_llama.Peer(CONFIG, "cpu")
    before = weights_of(peer.model)
    peer.compile()
    assert not peer.optimizer.state
    assert all(parameter.grad is None for parameter in peer.model.parameters())
    jax.tree.map(np.testing.assert_array_equal, weights_of(peer.model), before)


def test_from_equal_weights_the_comparison_measures_equal_losses(uncompiled, tmp_path, monkeypatch):
    """Both programs read the same batches and the same validation text."""
    monkeypatch.chdir(tmp_path)
    tiny_run.write_text(tmp_path / "text.txt")
    prepare("text.txt", tmp_path / "tokens", MODEL.vocab_size, 0.1)
    config = replace(CONFIG, data=DataConfig(corpus="text.txt", dir="tokens", val_fraction=0.1))

    def peer_from_equal_weights(c, tokens):
        run = TorchRun(c, tokens)
        copy_weights(run.peer.model, init_state(c).params)
        return run

    peer, ours = alternate([measure(program, config, 3) for program in (peer_from_equal_weights, JaxlmRun)])
    assert peer["val_bits_per_byte"] == pytest.approx(ours["val_bits_per_byte"], rel=1e-4)
    assert peer["val_loss"] < np.log(MODEL.vocab_size) - 0.5
