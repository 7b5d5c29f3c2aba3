"""Whether a device computes what a CPU does, at the very shapes of a run, before days are spent on it.

Accelerators have silently computed wrong numbers at such sizes: MPS logits of more than 8 x 1024 tokens at 50,304
entries (pytorch/pytorch#109457), products over 32,767 or more numbers on M1 and M2 (pytorch/pytorch#195163).

| part | on the device | held against |
|---|---|---|
| random bits | threefry, as a text's draws take it | the CPU's, bit by bit |
| sort; top-k and top-p | `jnp.sort`; `top_k_top_p_mask` | NumPy's sort |
| tokens drawn | `sample_tokens` | the CPU's tokens |
| sampling | prompts, then greedy tokens, with a cache | the CPU's logits in one pass over both, without one |
| losses | of a training and of an evaluation step | the CPU's |
| gradients | the training step's, as accumulated | the CPU's |
| updates, with moments | by the training step that ends a step | the CPU's, from what was accumulated |

The device runs the programs of the run itself, but for the number of micro-batches of a step: its forms, its slices
(two at most, one on a CPU), its texts. The CPU is slow, so the micro-batch holds two sequences only, each in half of
its rows (one, if it has but one row): the CPU computes these, in float32 and in plain forms. The micro-batch is the
second of its step; the first is taken to have left three times the gradient that the CPU finds, so that what is
accumulated tells how it is averaged. A single row that is wrong shows by its share of the mean.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import Config
from jaxlm.core import ops
from jaxlm.core.generate import PROMPT_BUCKET
from jaxlm.core.model import Decoder, loss_and_gradient, prepare_decode_params
from jaxlm.core.optimizer import make_optimizer
from jaxlm.core.sampling import (
    SamplingParams,
    counts_of_32_bits,
    decode,
    prefill,
    sample_tokens,
    sequence_keys,
    top_k_top_p_mask,
)
from jaxlm.core.train_step import TrainState, init_state, make_eval_step, make_train_step
from jaxlm.device.backend import describe, identity
from jaxlm.errors import RunError
from jaxlm.storage import user_cache

# How much the worst row or column of a gradient may differ, of its own size, by what the products read. Rounded to
# bfloat16 (2**-9), those of the 60M preset differ by up to 0.22 on an H100, as the numbers happen to be drawn; TF32,
# which an NVIDIA GPU makes of float32, rounds four times as finely. In float32 it is the order of the sums and the
# exponentials. What is wrong differs by 1. Of a greedy token: how much less likely than the best, in deviations.
ALLOWED = {"bfloat16": 0.4, "tf32": 0.1, "float32": 0.001}
LOSS_SHARE = 0.01  # of that, for a loss: the roundings of thousands of tokens cancel
DRAWS = 16  # texts
LONGEST = 64  # tokens of each text: the CPU's logits of all of them lie whole in memory
NEAR_TIE = 1 / DRAWS  # one draw may fall on the other side of a rounding
TOP_K, TOP_P = 50, 0.9
MICRO_BATCHES = 10**6  # of a step: its update is that of gradients seen before, as its last ones weigh nothing
BEFORE = 3.0  # times the gradient: what was accumulated before the micro-batch
LAST_PLACES = np.float32(2**-22)  # of a number: two to four units of float32's last place
SPREAD = 2  # times the initial weights: as trained ones, they make attention choose and logits differ


class Part(NamedTuple):
    """One thing compared."""

    name: str
    difference: float  # relative, 0 for none; NaN and infinite where the device's numbers are
    allowed: float
    failure: str = ""  # what the device raised instead of computing

    @property
    def ok(self) -> bool:
        """Whether the device computes this part right."""
        return not self.failure and self.difference <= self.allowed


def require(config: Config, device: jax.Device, say: Callable[[str], None] = lambda line: None) -> None:
    """Checks a device once for each run's shapes and each version of what computes; then remembers that it passed.

    Args:
        config: the settings, as `backend.resolve_run` gives them.
        device: what is to train.
        say: told a line before the check begins.

    Raises:
        RunError: a part differs by more than is allowed.
    """
    if user_cache.get("sound", _key(config, device)):
        return
    say(f"Checking once that {describe(device)} computes what the CPU does")
    parts = check(config, device)
    remember(config, device, parts)
    refuse_wrong(parts, device)


def remember(config: Config, device: jax.Device, parts: Sequence[Part]) -> None:
    """Has `require` know whether a device passed the check of a run."""
    user_cache.put("sound", _key(config, device), all(part.ok for part in parts))


def refuse_wrong(parts: Sequence[Part], device: jax.Device) -> None:
    """Raises RunError, with the name of the part that failed or is furthest off, if a part is not as it should be."""
    what_to_do = (
        "update the system, the driver and jax, or train with --config.platform=cpu"
        " (python -m jaxlm.plan --check shows all parts)"
    )
    for part in parts:
        if part.failure:
            raise RunError(f"{describe(device)} fails in the check of {part.name} ({part.failure}): {what_to_do}")
    if wrong := [part for part in parts if not part.ok]:
        worst = max(wrong, key=lambda part: np.nan_to_num(part.difference, nan=np.inf) / max(part.allowed, 1e-9))
        others = f" (and {len(wrong) - 1} other parts)" if wrong[1:] else ""
        raise RunError(
            f"{describe(device)} computes wrong numbers: {worst.name} differs by {worst.difference:.2g} from the CPU's,"
            f" {worst.allowed:.2g} is allowed{others}: {what_to_do}"
        )


def _key(config: Config, device: jax.Device) -> Any:
    """All that the outcome hangs on: what computes, and how; shapes and forms."""
    c, text = config, config.sample
    flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "MLX_ENABLE_TF32", "JAX_DEFAULT_MATMUL_PRECISION")]
    shapes = [
        dataclasses.asdict(c.model),
        c.chunk_size,
        c.microbatch_chunks > 1,
        c.optimizer.name,
        text.texts,
        text.tokens,
    ]
    return [*identity(device), *flags, c.deterministic, *shapes]


def table(parts: Sequence[Part]) -> str:
    """A line for each part, 80 columns at most, but for what a device raised."""
    lines = [f"{'':44}{'differs by':>12}{'allowed':>12}"]
    for p in parts:
        numbers = f"{p.difference:12.1e}{p.allowed:12.1e}  {'ok' if p.ok else 'WRONG'}"
        lines.append(f"{p.name:44}{f'  FAILED: {p.failure}' if p.failure else numbers}")
    return "\n".join(lines)


def check(config: Config, device: jax.Device) -> tuple[Part, ...]:
    """Compares all parts.

    Args:
        config: the settings, as `backend.resolve_run` gives them.
        device: what is to train; the CPU too.

    Returns:
        The parts in the order of the table above; nothing is raised for those that differ, nor for what a device
        raises, which ends its group of parts.

    Raises:
        jax.errors.JaxRuntimeError: the device is out of memory.
    """
    slices = 1 if device.platform == "cpu" else min(config.microbatch_chunks, 2)
    config = dataclasses.replace(
        config,
        batch_size=config.chunk_size * slices,
        microbatch_chunks=slices,
        grad_accum_steps=MICRO_BATCHES,
    )
    state = _trained(config)
    parts: list[Part] = []
    groups = {
        "random numbers and draws": _random(config, device),
        "sampling": _sampling(config, device, state),
        "training": _training(config, device, state),
    }
    for name, group in groups.items():
        try:
            parts += group
        except Exception as error:
            if "RESOURCE_EXHAUSTED" in str(error):  # the callers know what to do
                raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            parts.append(Part(name, np.inf, 0, reason))
    return tuple(parts)


def compute(function: Callable[..., Any], device: jax.Device, *arguments: Any) -> Any:
    """What a function makes of arrays of the host on a device, back on the host."""
    return jax.device_get(function(*jax.device_put(arguments, device)))


def allowed(device: jax.Device, dtype: str) -> float:
    """How much a row or column of what came from products of `dtype` may differ."""
    return ALLOWED["tf32" if dtype == "float32" and device.platform == "gpu" else dtype]


def difference(a: np.ndarray, b: np.ndarray, before: np.ndarray | float = 0.0) -> float:
    """The largest relative error of a row or a column, so that one that is wrong shows in a matrix of any size.

    Args:
        a: [..., R, C], what is in question.
        b: the same as it should be. What differs in its last places only counts as equal.
        before: what b was changed from; the error is relative to the change.

    Returns:
        The largest |a - b| / |b - before| (Euclidean norms) of all rows, and of all columns where there are as many
        rows as in a matrix of weights (stacked vectors have none).
    """
    a, b = (np.atleast_1d(np.asarray(array, np.float32)) for array in (a, b))
    error, change = np.abs(a - b), b - before
    error -= LAST_PLACES * np.abs(b)
    np.maximum(error, 0, out=error)
    columns = b.ndim == 3 or (b.ndim == 2 and len(b) > b.shape[1])
    largest = []
    for sums in ("...c,...c->...", "...rc,...rc->...c")[: 1 + columns]:
        wrong, size = (np.sqrt(np.einsum(sums, array, array)) for array in (error, change))
        largest.append(np.max(np.divide(wrong, size, out=np.where(wrong == 0, 0, np.inf), where=size > 0)))
    return float(np.max(largest))


def _cpu() -> jax.Device:
    return jax.devices("cpu")[0]


def _plain(config: Config) -> Config:
    """The same run in float32 and plain forms, as the CPU computes it best."""
    model = dataclasses.replace(config.model, precision="float32", implementation="cpu", remat=True)
    return dataclasses.replace(config, model=model)


def _trained(config: Config) -> TrainState:
    """A state as training leaves it: no gradient is small and no moment zero. Drawn by NumPy, on the host."""
    rng = np.random.default_rng(0)
    plain = _plain(config)
    shapes = jax.eval_shape(lambda: init_state(plain))

    def draw(leaf: Any) -> np.ndarray:  # of deviation 1; normal ones take three times as long
        return 12**0.5 * (rng.random(leaf.shape, np.float32) - 0.5)

    def param(path: Any, leaf: Any) -> np.ndarray:
        return 1 + 0.1 * draw(leaf) if path[-1].key.endswith("norm") else 0.02 * SPREAD * draw(leaf)

    params = jax.tree_util.tree_map_with_path(param, shapes.params)
    drawn = jax.tree.map(draw, shapes.params)
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    last = state.opt_state._replace(mini_step=np.int32(config.grad_accum_steps - 1))
    params, opt_state = compute(jax.jit(make_optimizer(plain).step), _cpu(), drawn, last, params)
    warm = jax.tree.map(
        lambda leaf: np.full_like(leaf, config.optimizer.warmup_steps) if leaf.dtype == np.int32 else leaf,
        opt_state.inner_opt_state,
    )
    return state._replace(params=params, opt_state=opt_state._replace(inner_opt_state=warm))


def _random(config: Config, device: jax.Device) -> Iterator[Part]:
    """Random bits, sort, top-k and top-p, draws."""

    def bits(key: jax.Array) -> Any:
        with counts_of_32_bits():
            return sequence_keys(key, DRAWS), jax.random.bits(key, (2**16 + 1,))

    key = np.array([3, 5], np.uint32)
    ours, theirs = compute(bits, device, key), compute(bits, _cpu(), key)
    yield Part("random bits", _share(np.concatenate([(a != b).ravel() for a, b in zip(ours, theirs, strict=True)])), 0)

    logits_BV = 3 * np.random.default_rng(1).standard_normal((DRAWS, config.model.vocab_size), np.float32)
    sorted_BV = np.sort(logits_BV, axis=-1)
    yield Part("sort", _share(compute(jnp.sort, device, logits_BV) != sorted_BV), 0)

    device_ops = ops.get(config.model.implementation)
    kept_BV = compute(
        jax.jit(partial(top_k_top_p_mask, device_ops)), device, logits_BV, np.int32(TOP_K), np.float32(TOP_P)
    )
    best_BK = sorted_BV[:, : -TOP_K - 1 : -1].astype(np.float64)
    share_BK = np.exp(best_BK - best_BK[:, :1])
    before_BK = np.cumsum(share_BK, axis=-1) - share_BK
    needed_B = np.sum(before_BK < TOP_P * share_BK.sum(axis=-1, keepdims=True), axis=-1)
    smallest_B1 = np.take_along_axis(best_BK, needed_B[:, None] - 1, axis=-1)
    yield Part("top-k and top-p", _share(kept_BV != (logits_BV >= smallest_B1)), 0)

    choice = SamplingParams(np.float32(0.8), np.int32(TOP_K), np.float32(TOP_P))
    drawn, expected = (
        compute(jax.jit(partial(sample_tokens, form)), where, logits_BV, theirs[0], choice)
        for where, form in ((device, device_ops), (_cpu(), ops.get("xla")))
    )
    yield Part("tokens drawn", _share(drawn != expected), NEAR_TIE)


def _share(different: np.ndarray) -> float:
    return float(np.mean(different))


def _sampling(config: Config, device: jax.Device, state: TrainState) -> Iterator[Part]:
    """The run's texts, written greedily with a cache, against one pass over what was written."""
    model, B, V = config.model, config.sample.texts, config.model.vocab_size
    rng = np.random.default_rng(2)
    longest = min(PROMPT_BUCKET, model.context // 2)
    N = min(config.sample.tokens, LONGEST, model.context - longest)
    prompts = [rng.integers(0, V, 1 + i % longest) for i in range(B)]
    lengths_B = np.array([len(ids) for ids in prompts], np.int32)
    ids_BP = np.zeros((B, PROMPT_BUCKET), np.int32)
    for row, ids in zip(ids_BP, prompts, strict=True):
        row[PROMPT_BUCKET - len(ids) :] = ids

    def write_greedily(params: Any, ids_BP: jax.Array, lengths_B: jax.Array, keys_B: jax.Array) -> Any:
        weights = prepare_decode_params(model, params)
        texts = prefill(model, weights, ids_BP, lengths_B, keys_B, N)
        first_BV = np.asarray(texts.logits_BV)
        greedy = SamplingParams(np.float32(0))
        texts, tokens_BN = decode(model, weights, texts, greedy, np.int32(-1), N)
        return first_BV, tokens_BN, texts.logits_BV

    keys_B = np.zeros((B, 2), np.uint32)
    first_BV, tokens_BN, last_BV = compute(write_greedily, device, state.params, ids_BP, lengths_B, keys_B)

    plain = Decoder(_plain(config).model)
    whole_BT = np.zeros((B, longest + N), np.int32)
    for row, ids, tokens_N in zip(whole_BT, prompts, tokens_BN, strict=True):
        row[: len(ids) + N] = [*ids, *tokens_N]
    forward = jax.jit(lambda params, ids_BT: plain.apply({"params": params}, ids_BT))
    logits_BTV = compute(forward, _cpu(), state.params, whole_BT)
    after = lengths_B[:, None] - 1 + np.arange(N + 1)
    expected_BNV = np.take_along_axis(logits_BTV, after[:, :, None], axis=1)

    limit = allowed(device, model.matmul_dtype)
    yield Part("sampling: logits after the prompts", difference(first_BV, expected_BNV[:, 0]), limit)
    yield Part(f"sampling: logits after {N} more tokens", difference(last_BV, expected_BNV[:, N]), limit)
    chosen_BN1 = np.take_along_axis(expected_BNV[:, :N], np.clip(tokens_BN, 0, V - 1)[..., None], axis=-1)
    behind_BN = (expected_BNV[:, :N].max(axis=-1) - chosen_BN1[..., 0]) / expected_BNV[:, :N].std(axis=-1)
    yield Part("sampling: greedy tokens", float(behind_BN.max()), limit)


def _training(config: Config, device: jax.Device, state: TrainState) -> Iterator[Part]:
    """The losses, the gradients and the update."""
    rng, B = np.random.default_rng(3), config.batch_size
    some_2T = config.model.vocab_size * rng.random((2, config.model.context + 1)) ** 3  # as in text, few often
    ids_2T, row_B = some_2T.astype(np.int32), rng.permutation(np.arange(B) < B / 2).astype(int)
    expected_loss, expected_grads = _expected(config, state.params, ids_2T, np.bincount(row_B, minlength=2) / B)
    acc_grads = jax.tree.map(lambda g: BEFORE * g, expected_grads)
    second = state._replace(opt_state=state.opt_state._replace(mini_step=np.int32(1), acc_grads=acc_grads))
    loss, acc_grads, after, eval_loss = compute(partial(_two_micro_batches, config), device, second, ids_2T[row_B])

    limit = allowed(device, config.model.matmul_dtype)
    for name, value in (("training loss", loss), ("evaluation loss", eval_loss)):
        yield Part(name, abs(float(value) / float(expected_loss) - 1), LOSS_SHARE * limit)
    for name, ours, theirs in _by_parameter(acc_grads, expected_grads):
        yield Part(f"gradient of {name}", difference(2 * ours - BEFORE * theirs, theirs), limit)

    last = state.opt_state._replace(mini_step=np.int32(config.grad_accum_steps - 1), acc_grads=acc_grads)
    step = make_optimizer(_plain(config)).step
    params, opt_state = compute(jax.jit(step), _cpu(), acc_grads, last, state.params)
    has_products = config.optimizer.name == "muon"
    limit = allowed(device, "float32") if has_products else ALLOWED["float32"]
    updates: dict[str, list[float]] = {}
    for name, ours, theirs, before in _by_parameter(after.params, params, state.params):
        updates[name] = [difference(ours, theirs, before)]
    for name, ours, theirs in _by_parameter(after.opt_state.inner_opt_state, opt_state.inner_opt_state):
        counts = theirs.dtype == np.int32
        updates.setdefault(name, []).append(float(ours != theirs) if counts else difference(ours, theirs))
    for name, differences in updates.items():
        what = f"update of {name}" if name else "counters of the optimizer"
        yield Part(what, float(np.max(differences)), limit)


def _expected(config: Config, params: Any, ids_2T: np.ndarray, share_2: np.ndarray) -> tuple[Any, Any]:
    """The mean loss of a micro-batch that holds each of two sequences in a share of its rows, and its gradient."""
    model, scale = _plain(config).model, 1 / config.model.context

    @jax.jit
    def alone(params: Any, ids_BT: jax.Array) -> tuple[jax.Array, Any]:
        none = jax.tree.map(jnp.zeros_like, params)
        nats, grads = loss_and_gradient(model, params, ids_BT[:, :-1], ids_BT[:, 1:], scale, none)
        return nats * scale, grads

    each = [compute(alone, _cpu(), params, ids_2T[i : i + 1]) for i in np.flatnonzero(share_2)]
    shares = share_2[share_2 > 0].astype(np.float32)
    return jax.tree.map(lambda *leaves: sum(s * leaf for s, leaf in zip(shares, leaves, strict=True)), *each)


def _two_micro_batches(config: Config, state: TrainState, ids_BT: jax.Array) -> tuple[Any, Any, TrainState, Any]:
    """The second micro-batch of a step and, the same again, its last.

    Returns:
        The second's mean loss, and the mean gradient of the first two; the state after the last; and the second's mean
        loss by the evaluation step.
    """
    S, evaluate, step = config.chunk_size, make_eval_step(config), make_train_step(config)
    parts = [ids_BT[start : start + S] for start in range(0, config.batch_size, S)]
    nats = sum(evaluate(state.params, part_ST[:, :-1], part_ST[:, 1:]) for part_ST in parts)
    eval_loss = nats / (config.batch_size * config.model.context)
    state, _ = step(state, ids_BT)
    loss, acc_grads = jax.device_get((state.loss_sum, state.opt_state.acc_grads))
    to_the_last = state.opt_state.mini_step + (config.grad_accum_steps - 3)
    state, _ = step(state._replace(opt_state=state.opt_state._replace(mini_step=to_the_last)), ids_BT)
    return loss, acc_grads, state, eval_loss


def _by_parameter(*trees: Any) -> Iterator[tuple[Any, ...]]:
    """The name of each leaf's parameter (none: "") and the leaf of every tree."""
    flat = [jax.tree_util.tree_leaves_with_path(tree) for tree in trees]
    for leaves in zip(*flat, strict=True):
        keys = [entry.key for entry in leaves[0][0] if isinstance(entry, jax.tree_util.DictKey)]
        name = "/".join(key for key in keys if key not in ("adam", "muon"))
        yield name, *(leaf for _, leaf in leaves)
