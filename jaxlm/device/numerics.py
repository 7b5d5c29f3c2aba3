"""The numerics check: compares what a device computes with the CPU, at the shapes of a run, before the run starts.

Accelerators have silently computed wrong numbers at such shapes: MPS logits of more than 8 x 1024 tokens with 50,304
entries (pytorch/pytorch#109457), matmuls that contract 32,767 or more numbers on M1 and M2 (pytorch/pytorch#195163).

| part | on the device | compared with |
|---|---|---|
| random bits | threefry, as sampling uses it | the CPU's bits |
| sort; top-k and top-p | `jnp.sort`; `top_k_top_p_mask` | NumPy's sort |
| sampled tokens | `sample_tokens` | the CPU's tokens |
| generation | prefill, then greedy tokens, with a cache | one pass of the CPU over the same tokens, without a cache |
| losses | of a training and of an evaluation step | the CPU's losses |
| gradients | accumulated by the training step | the CPU's gradients |
| updates, moments, average | by the step that ends an optimizer step | the CPU's, from the device's gradients |

The device runs the programs of the run: its precision, its implementation, its chunk size, its number of samples. Two
things differ. A micro-batch has two chunks at most, one on a CPU, and a step has many micro-batches. The CPU computes
in float32, with its own implementation. Because it is slow, the micro-batch holds two different sequences only, each in
half of its rows (one sequence if it has one row).

The micro-batch is the second of its step. The gradient of the first is set to three times the CPU's, so that the
accumulated mean shows how the device averages. A single wrong row shows through its share of the mean.

Gradients and logits are compared twice. Each row and each column may differ by what rounding does to the worst of them.
The scale of the whole array, or of a layer's gradient, in which rounding averages out, may differ by much less.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import Config, ModelConfig
from jaxlm.core import ops, sampling
from jaxlm.core.decoder import Decoder
from jaxlm.core.generate import PROMPT_BUCKET
from jaxlm.core.model import loss_and_gradient, prepare_decode_params
from jaxlm.core.optimizer import make_optimizer
from jaxlm.core.parameters import Params, parameter_table, tree_of
from jaxlm.core.train_step import TrainState, init_state, make_eval_step, make_train_step
from jaxlm.device.backend import card, describe, identity, resolve
from jaxlm.errors import RunError
from jaxlm.storage import user_cache

# The largest relative error allowed in a row or column of a gradient, by what the matmuls read. A wrong row differs by
# about 1. bfloat16 rounds to 2**-9, and a row of the 60M preset differs by up to 0.22 on an H100. TF32, which an NVIDIA
# GPU uses for float32, rounds four times as finely. In float32 only the order of sums and the exponentials differ. For
# a greedy token: how far its logit is below the largest, in standard deviations.
ALLOWED = {"bfloat16": 0.4, "tf32": 0.1, "float32": 0.001}
# The largest error allowed in the scale of a whole array or layer, where rounding averages out. In bfloat16 on a CPU it
# is at most 0.0035 for a gradient of the 60M preset, and 0.0021 for one of a matrix.
ALLOWED_SCALE = {"bfloat16": 0.02, "tf32": 0.005, "float32": 0.0002}
SMALL_MODEL = ModelConfig(vocab_size=257, context=24, layers=2, heads=2, width=32, mlp_width=48, precision="float32")
_LOSS_SHARE = 0.01  # of ALLOWED, for a loss: the rounding errors of thousands of tokens average out
_SAMPLES = 16
_MAX_NEW_TOKENS = 64  # of each sample: the CPU's logits of all of them are in memory at once
_NEAR_TIE = 1 / _SAMPLES  # rounding may change one sampled token
_TOP_K, _TOP_P = 50, 0.9
_MICRO_BATCHES = 10**6  # of a step: so many that the last one has negligible weight
_FIRST_GRADIENT = 3.0  # the gradient of the first micro-batch, as a multiple of the CPU's gradient
_LAST_PLACES = np.float32(2**-22)  # of a number: two to four units of float32's last place
_WEIGHT_SCALE = 2  # times the initial weights: as in a trained model, attention is uneven and logits differ


class Part(NamedTuple):
    """One comparison."""

    name: str
    difference: float  # relative, 0 for none; NaN or infinite where the device's numbers are
    allowed: float
    failure: str = ""  # what the device raised

    @property
    def ok(self) -> bool:
        """Whether the difference is allowed."""
        return not self.failure and self.difference <= self.allowed


def require(config: Config, device: jax.Device, say: Callable[[str], None] = lambda line: None) -> None:
    """Checks a device unless it has passed the check before, with the same shapes, versions and source.

    Args:
        config: the settings, as `backend.resolve_run` returns them.
        device: the device to train on.
        say: called with one line before a check starts.

    Raises RunError if a part failed.
    """
    if user_cache.get("numerics", _cache_key(config, device)):
        return
    say(f"Checking once that {describe(device)} computes what the CPU does")
    parts = check(config, device)
    store_result(config, device, parts)
    refuse_wrong(parts, device)


def store_result(config: Config, device: jax.Device, parts: Sequence[Part]) -> None:
    """Stores for `require` whether the device passed."""
    user_cache.put("numerics", _cache_key(config, device), all(part.ok for part in parts))


def refuse_wrong(parts: Sequence[Part], device: jax.Device) -> None:
    """Raises RunError if a part failed. The message names the part that raised, or has the largest difference."""
    if reason := failure(parts):
        raise RunError(
            f"{describe(device)} {reason}: update the system, the driver and jax, or train with --config.platform=cpu"
            " (python -m jaxlm.plan --check shows all parts)"
        )


def failure(parts: Sequence[Part]) -> str:
    """Returns what is wrong, as the end of a sentence about the device; empty if all parts are right."""
    for part in parts:
        if part.failure:
            return f"fails in the check of {part.name} ({part.failure})"
    wrong = [part for part in parts if not part.ok]
    if not wrong:
        return ""
    worst = max(wrong, key=lambda part: np.nan_to_num(part.difference, nan=np.inf) / max(part.allowed, 1e-9))
    others = f" (and {len(wrong) - 1} other parts)" if wrong[1:] else ""
    return (
        f"computes wrong numbers: {worst.name} differs by {worst.difference:.2g} from the CPU's,"
        f" {worst.allowed:.2g} is allowed{others}"
    )


def _cache_key(c: Config, device: jax.Device) -> list[Any]:
    """Everything that the result depends on."""
    flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "MLX_ENABLE_TF32")]
    shapes = [dataclasses.asdict(c.model), c.chunk_size, c.microbatch_chunks > 1, c.sample.texts, c.sample.tokens]
    update = [c.optimizer.name, c.optimizer.muon_b2 > 0, c.optimizer.cautious, c.optimizer.average > 0]
    return [*identity(device), card(device), *flags, c.deterministic, *update, *shapes]


def table(parts: Sequence[Part]) -> str:
    """Formats a line for each part, of 80 columns at most except for what a device raised."""
    lines = [f"{'':44}{'differs by':>12}{'allowed':>12}"]
    for p in parts:
        numbers = f"{p.difference:12.1e}{p.allowed:12.1e}  {'ok' if p.ok else 'WRONG'}"
        lines.append(f"{p.name:44}{f'  FAILED: {p.failure}' if p.failure else numbers}")
    return "\n".join(lines)


def check(config: Config, device: jax.Device) -> tuple[Part, ...]:
    """Runs the whole check.

    Args:
        config: the settings, as `backend.resolve_run` returns them.
        device: the device to train on; may be the CPU.

    Returns:
        The parts in the order of the table above, wrong ones too. If the device raises, the failed part takes the place
        of the rest of its group.

    Raises jax.errors.JaxRuntimeError if the device is out of memory.
    """
    chunks = 1 if device.platform == "cpu" else min(config.microbatch_chunks, 2)
    B = config.chunk_size * chunks
    config = dataclasses.replace(config, batch_size=B, microbatch_chunks=chunks, grad_accum_steps=_MICRO_BATCHES)
    state = _trained(config)
    parts: list[Part] = []
    for name, group in (("random numbers", _random), ("sampling", _sampling), ("training", _training)):
        try:
            parts += group(config, device, state)
        except Exception as error:
            if "RESOURCE_EXHAUSTED" in str(error):  # callers advise on memory
                raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            parts.append(Part(name, np.inf, 0, reason))
    return tuple(parts)


def check_small_model(device: jax.Device) -> tuple[Part, ...]:
    """Compares the logits, the loss and the gradient of a small float32 model: one program, compiled in seconds.

    The limits leave room for matmuls that read TF32 or bfloat16. A run checks its own precision with `require`.
    """
    rng = np.random.default_rng(0)
    params = tree_of(SMALL_MODEL, lambda parameter: rng.normal(0, 0.3, parameter.shape).astype(np.float32))
    ids_BT = rng.integers(0, SMALL_MODEL.vocab_size, (2, SMALL_MODEL.context + 1), np.int32)

    def outputs(model: ModelConfig, params: Params, ids_BT: jax.Array) -> tuple[jax.Array, jax.Array, Params]:
        logits_BTV: Any = Decoder(model).apply({"params": params}, ids_BT[:, :-1])
        return logits_BTV, *_loss_and_gradient(model, params, ids_BT, 1.0)

    (logits_BTV, loss_sum, grads), (expected_BTV, expected_sum, expected_grads) = (
        compute(jax.jit(partial(outputs, resolve(SMALL_MODEL, place))), place, params, ids_BT)
        for place in (device, _cpu())
    )
    limit = ALLOWED["tf32"]
    return (
        Part("logits", difference(logits_BTV, expected_BTV), limit),
        Part("loss", abs(float(loss_sum) / float(expected_sum) - 1), _LOSS_SHARE * limit),
        *(Part(f"gradient of {name}", difference(a, b), limit) for name, a, b in _by_parameter(grads, expected_grads)),
    )


def _loss_and_gradient(model: ModelConfig, params: Params, ids_BT: jax.Array, scale: float) -> tuple[jax.Array, Params]:
    zeros = jax.tree.map(jnp.zeros_like, params)
    return loss_and_gradient(model, params, ids_BT[:, :-1], ids_BT[:, 1:], scale, zeros)


def compute(function: Callable[..., Any], device: jax.Device, *arguments: Any) -> Any:
    """Calls a function on a device with arrays of the host; returns its result on the host."""
    return jax.device_get(function(*jax.device_put(arguments, device)))


class Limits(NamedTuple):
    """What an array may differ by, relative to what is expected."""

    row: float  # the worst row or column
    scale: float  # the whole array, or a layer of it


def allowed(device: jax.Device, dtype: str) -> Limits:
    """Returns the limits for matmuls that read `dtype` on a device."""
    name = "tf32" if dtype == "float32" and device.platform == "gpu" else dtype
    return Limits(ALLOWED[name], ALLOWED_SCALE[name])


def difference(actual: np.ndarray, expected: np.ndarray, before: np.ndarray | float = 0.0) -> float:
    """Returns the largest relative error of a row or a column, which shows a wrong one in a matrix of any size.

    The error of a row is |actual - expected| / |expected - before|, with Euclidean norms. Numbers that differ in their
    last places only count as equal.

    Args:
        actual, expected: [..., R, C]. Columns count in matrices of weights, but not in stacked vectors [L, C] with
            fewer rows than columns.
        before: what `expected` was updated from; makes the error relative to the update.
    """
    actual, expected = (np.atleast_1d(np.asarray(array, np.float32)) for array in (actual, expected))
    error, change = np.abs(actual - expected), expected - before
    error -= _LAST_PLACES * np.abs(expected)
    np.maximum(error, 0, out=error)
    has_columns = expected.ndim == 3 or (expected.ndim == 2 and len(expected) > expected.shape[1])
    largest = []
    for sums in ("...c,...c->...", "...rc,...rc->...c")[: 1 + has_columns]:
        error_norm, change_norm = (np.sqrt(np.einsum(sums, array, array)) for array in (error, change))
        if_zero = np.where(error_norm == 0, 0, np.inf)
        largest.append(np.max(np.divide(error_norm, change_norm, out=if_zero, where=change_norm > 0)))
    return float(np.max(largest))


def scale_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Returns the relative error of an array's scale.

    That is the larger error of its norm, relative to the norm of `expected`, and of its projection on `expected`. An
    array that is right but for rounding, row by row and at random, has almost none.
    """
    a, e = (np.ravel(array).astype(np.float64) for array in (actual, expected))
    square = np.dot(e, e)
    if square == 0:
        return 0.0 if np.array_equal(a, e) else np.inf
    return float(np.max(np.abs([np.sqrt(np.dot(a, a) / square) - 1, np.dot(a, e) / square - 1])))


def _compare(
    name: str, actual: np.ndarray, expected: np.ndarray, limits: Limits, stacked: bool = False
) -> Iterator[Part]:
    """Compares the rows and columns of an array, and its scale; if the array is `stacked`, the scale of each layer."""
    layers = zip(actual, expected, strict=True) if stacked else [(actual, expected)]
    yield Part(name, difference(actual, expected), limits.row)
    yield Part(f"{name}: scale", float(np.max([scale_error(a, e) for a, e in layers])), limits.scale)


def _cpu() -> jax.Device:
    return jax.local_devices(backend="cpu")[0]


def _plain(config: Config) -> Config:
    """The same settings in float32, as the CPU computes them best."""
    model = dataclasses.replace(config.model, precision="float32", implementation="cpu", remat=True)
    return dataclasses.replace(config, model=model)


def _trained(config: Config) -> TrainState:
    """A state like that of a trained model: no gradient is small and no moment zero. NumPy draws it on the host."""
    rng = np.random.default_rng(0)
    plain = _plain(config)
    shapes = jax.eval_shape(lambda: init_state(plain))

    def draw(leaf: Any) -> np.ndarray:  # uniform, of standard deviation 1: three times as fast as a normal one
        return 12**0.5 * (rng.random(leaf.shape, np.float32) - 0.5)

    def draw_parameter(leaf: Any, kind: str) -> np.ndarray:
        return 1 + 0.1 * draw(leaf) if kind == "norm_scale" else 0.02 * _WEIGHT_SCALE * draw(leaf)

    params = jax.tree.map(draw_parameter, shapes.params, tree_of(config.model, lambda parameter: parameter.kind))
    grads = jax.tree.map(draw, shapes.params)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    state = _last_update(config, grads, zeros._replace(params=params))
    inner_opt_state = jax.tree.map(
        lambda leaf: np.full_like(leaf, config.optimizer.warmup_steps) if leaf.dtype == np.int32 else leaf,
        state.opt_state.inner_opt_state,
    )
    return state._replace(opt_state=state.opt_state._replace(inner_opt_state=inner_opt_state))


def _last_update(config: Config, grads: Params, state: TrainState) -> TrainState:
    """The CPU's update of the parameters, the optimizer's state and the average by the last micro-batch of a step."""
    opt_state = state.opt_state._replace(mini_step=np.int32(config.grad_accum_steps - 1))
    step = jax.jit(make_optimizer(_plain(config)).step)
    params, opt_state, average, _ = compute(step, _cpu(), grads, opt_state, state.params, state.average)
    return state._replace(params=params, opt_state=opt_state, average=average)


def _random(config: Config, device: jax.Device, state: TrainState) -> Iterator[Part]:
    """Random bits, sort, top-k and top-p, sampled tokens."""

    def bits(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        with sampling.counts_of_32_bits():
            return sampling.sequence_keys(key, jnp.arange(_SAMPLES)), jax.random.bits(key, (2**16 + 1,))

    key = np.array([3, 5], np.uint32)
    actual, expected = compute(bits, device, key), compute(bits, _cpu(), key)
    differs = [(a != b).ravel() for a, b in zip(actual, expected, strict=True)]
    yield Part("random bits", float(np.mean(np.concatenate(differs))), 0)

    logits_BV = 3 * np.random.default_rng(1).standard_normal((_SAMPLES, config.model.vocab_size), np.float32)
    sorted_BV = np.sort(logits_BV, axis=-1)
    yield Part("sort", float(np.mean(compute(jnp.sort, device, logits_BV) != sorted_BV)), 0)

    device_ops = ops.get(config.model.implementation)
    choice = sampling.SamplingParams(np.float32(0.8), np.int32(_TOP_K), np.float32(_TOP_P))
    mask = jax.jit(partial(sampling.top_k_top_p_mask, device_ops))
    mask_BV = compute(mask, device, logits_BV, choice.top_k, choice.top_p)
    yield Part("top-k and top-p", float(np.mean(mask_BV != _expected_mask(logits_BV, sorted_BV))), 0)

    actual_B, expected_B = (
        compute(jax.jit(partial(sampling.sample_tokens, record)), where, logits_BV, expected[0], choice)
        for where, record in ((device, device_ops), (_cpu(), ops.get("xla")))
    )
    yield Part("sampled tokens", float(np.mean(actual_B != expected_B)), _NEAR_TIE)


def _expected_mask(logits_BV: np.ndarray, sorted_BV: np.ndarray) -> np.ndarray:
    """`top_k_top_p_mask` in float64: the fewest largest logits of the top k whose share of their sum reaches top p."""
    top_BK = sorted_BV[:, : -_TOP_K - 1 : -1].astype(np.float64)
    weights_BK = np.exp(top_BK - top_BK[:, :1])
    before_BK = np.cumsum(weights_BK, axis=-1) - weights_BK
    counts_B = np.sum(before_BK < _TOP_P * weights_BK.sum(axis=-1, keepdims=True), axis=-1)
    return logits_BV >= np.take_along_axis(top_BK, counts_B[:, None] - 1, axis=-1)


def _sampling(config: Config, device: jax.Device, state: TrainState) -> Iterator[Part]:
    """Greedy generation with a cache, at the shapes of the run's samples; the CPU computes the logits in one pass."""
    model, B, V, P = config.model, config.sample.texts, config.model.vocab_size, PROMPT_BUCKET
    max_prompt = min(P, model.context // 2)
    N = min(config.sample.tokens, _MAX_NEW_TOKENS, model.context - max_prompt)
    lengths_B = 1 + np.arange(B, dtype=np.int32) % max_prompt
    rng, ids_BP, ids_BT = np.random.default_rng(2), np.zeros((B, P), np.int32), np.zeros((B, max_prompt + N), np.int32)
    for row_P, row_T, length in zip(ids_BP, ids_BT, lengths_B, strict=True):
        row_T[:length] = row_P[P - length :] = rng.integers(0, V, length)

    def generate(params: Params, ids_BP: jax.Array, lengths_B: jax.Array, keys_B: jax.Array) -> Any:
        weights = prepare_decode_params(model, params)
        state = sampling.prefill(model, weights, ids_BP, lengths_B, keys_B, N)
        first_BV = np.asarray(state.logits_BV)
        greedy = sampling.SamplingParams(np.float32(0))
        state, tokens_BN = sampling.decode(model, weights, state, greedy, np.int32(-1), N)
        return first_BV, tokens_BN, state.logits_BV

    keys_B = np.zeros((B, 2), np.uint32)
    first_BV, tokens_BN, last_BV = compute(generate, device, state.params, ids_BP, lengths_B, keys_B)

    positions = lengths_B[:, None] - 1 + np.arange(N + 1)
    np.put_along_axis(ids_BT, positions[:, 1:], tokens_BN, axis=1)
    plain = Decoder(_plain(config).model)
    forward = jax.jit(lambda params, ids_BT: plain.apply({"params": params}, ids_BT))
    logits_BTV = compute(forward, _cpu(), state.params, ids_BT)
    expected_BNV = np.take_along_axis(logits_BTV, positions[:, :, None], axis=1)

    limits = allowed(device, model.matmul_dtype)
    yield from _compare("sampling: logits after the prompts", first_BV, expected_BNV[:, 0], limits)
    yield from _compare(f"sampling: logits after {N} more tokens", last_BV, expected_BNV[:, N], limits)
    token_logits_BN1 = np.take_along_axis(expected_BNV[:, :N], np.clip(tokens_BN, 0, V - 1)[..., None], axis=-1)
    gap_BN = (expected_BNV[:, :N].max(axis=-1) - token_logits_BN1[..., 0]) / expected_BNV[:, :N].std(axis=-1)
    yield Part("sampling: greedy tokens", float(gap_BN.max()), limits.row)


def _training(config: Config, device: jax.Device, state: TrainState) -> Iterator[Part]:
    """The losses, the gradients and the update."""
    rng, B = np.random.default_rng(3), config.batch_size
    ids_2T = config.model.vocab_size * rng.random((2, config.model.context + 1)) ** 3  # as in text, few ids are common
    ids_2T, rows_B = ids_2T.astype(np.int32), rng.permutation(np.arange(B) < B / 2).astype(int)
    shares_2 = np.bincount(rows_B, minlength=2) / B
    expected_loss, expected_grads = _expected_training(config, state.params, ids_2T, shares_2)
    acc_grads = jax.tree.map(lambda g: _FIRST_GRADIENT * g, expected_grads)
    second = state._replace(opt_state=state.opt_state._replace(mini_step=np.int32(1), acc_grads=acc_grads))
    loss, acc_grads, after, eval_loss = compute(partial(_two_micro_batches, config), device, second, ids_2T[rows_B])

    limits = allowed(device, config.model.matmul_dtype)
    for name, value in (("training loss", loss), ("evaluation loss", eval_loss)):
        yield Part(name, abs(float(value) / float(expected_loss) - 1), _LOSS_SHARE * limits.row)
    for name, mean, expected in _by_parameter(acc_grads, expected_grads):
        # in one layer these scales are too few for rounding to average out
        stacked = name.startswith("blocks/") and name not in ("blocks/query_norm", "blocks/key_norm")
        yield from _compare(f"gradient of {name}", 2 * mean - _FIRST_GRADIENT * expected, expected, limits, stacked)

    before_last = state._replace(opt_state=state.opt_state._replace(acc_grads=acc_grads))
    expected_state = _last_update(config, acc_grads, before_last)
    by_muon = {"/".join(parameter.path) for parameter in parameter_table(config.model) if parameter.optimizer == "muon"}
    with_matmuls = by_muon if config.optimizer.name == "muon" else set()
    updates: dict[str, list[float]] = {}
    for name, actual, expected, before in _by_parameter(after.params, expected_state.params, state.params):
        updates[name] = [difference(actual, expected, before)]
    moments, expected_moments = ((s.opt_state.inner_opt_state, s.average) for s in (after, expected_state))
    for name, actual, expected in _by_parameter(moments, expected_moments):
        is_counter = expected.dtype == np.int32
        updates.setdefault(name, []).append(float(actual != expected) if is_counter else difference(actual, expected))
    for name, differences in updates.items():
        what = f"update of {name}" if name else "counters of the optimizer"
        limit = limits.row if name in with_matmuls else ALLOWED["float32"]
        yield Part(what, float(np.max(differences)), limit)


def _expected_training(config: Config, params: Params, ids_2T: np.ndarray, shares_2: np.ndarray) -> tuple[Any, Params]:
    """The mean loss of a micro-batch of which each of two sequences fills a share of the rows, and its gradient."""
    scale = 1 / config.model.context
    one_sequence = jax.jit(partial(_loss_and_gradient, _plain(config).model, scale=scale))
    results = [compute(one_sequence, _cpu(), params, ids_2T[i : i + 1]) for i in np.flatnonzero(shares_2)]
    results = [(loss_sum * scale, grads) for loss_sum, grads in results]
    shares = shares_2[shares_2 > 0].astype(np.float32)
    return jax.tree.map(lambda *leaves: sum(s * leaf for s, leaf in zip(shares, leaves, strict=True)), *results)


def _two_micro_batches(config: Config, state: TrainState, ids_BT: jax.Array) -> tuple[Any, Params, TrainState, Any]:
    """Runs the second micro-batch of a step, and the same micro-batch again as the last of the step.

    Returns:
        The second's mean loss; the mean gradient of the first two; the state after the last; and the second's mean loss
        by the evaluation step.
    """
    S, evaluate, step = config.chunk_size, make_eval_step(config), make_train_step(config)
    chunks = [ids_BT[start : start + S] for start in range(0, config.batch_size, S)]
    loss_sum = sum(evaluate(state.params, chunk_ST[:, :-1], chunk_ST[:, 1:]) for chunk_ST in chunks)
    eval_loss = loss_sum / (config.batch_size * config.model.context)
    state, _ = step(state, ids_BT)
    loss, acc_grads = jax.device_get((state.loss_sum, state.opt_state.acc_grads))
    last = state.opt_state.mini_step + (config.grad_accum_steps - 3)
    state, _ = step(state._replace(opt_state=state.opt_state._replace(mini_step=last)), ids_BT)
    return loss, acc_grads, state, eval_loss


def _by_parameter(*trees: Any) -> Iterator[tuple[Any, ...]]:
    """Yields the name of each leaf's parameter ("" if it has none) and the leaf of every tree."""
    flat = [jax.tree_util.tree_leaves_with_path(tree) for tree in trees]
    for leaves in zip(*flat, strict=True):
        keys = [entry.key for entry in leaves[0][0] if isinstance(entry, jax.tree_util.DictKey)]
        name = "/".join(key for key in keys if key not in ("adam", "muon"))
        yield name, *(leaf for _, leaf in leaves)
