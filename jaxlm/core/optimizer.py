"""The optimizer: the learning-rate schedule, AdamW or Muon, and gradient accumulation.

SCHEDULES and OPTIMIZERS are the functions that the settings `optimizer.lr_schedule` and `optimizer.name` choose from.
The transformations are optax's where optax has them. The masks come from the table of parameters.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from jaxlm.config import Config, ModelConfig, OptimizerConfig
from jaxlm.core import ops
from jaxlm.core.average import average_step
from jaxlm.core.parameters import Params, tree_of
from jaxlm.core.sharding import FSDP, over_devices

SCHEDULES: dict[str, Callable[[float, int], optax.Schedule]] = {  # (end value, steps) -> from 1 down to the end value
    "cosine": lambda end, steps: optax.cosine_decay_schedule(1.0, steps, alpha=end),
    "linear": lambda end, steps: optax.linear_schedule(1.0, end, steps),
}

MOMENTUM_START = 0.85  # of Muon, where it has a warm-up
MIN_MEAN_SQUARE = 1e-10  # in place of a smaller mean square


def make_schedule(config: OptimizerConfig, max_steps: int) -> optax.Schedule:
    """The learning rate after so many completed optimizer steps, as a fraction of its peak.

    It rises linearly from 1 / (warmup_steps + 1) to 1 over the warm-up and stays there. Over the last
    `lr_decay_fraction` of the steps after the warm-up it falls to `min_lr_ratio`, as `lr_schedule` says.

    With `lr_restart_step`, this takes place before that step, and once more after it, from there to the same end but
    with the peak `lr_restart_ratio`.

    Raises KeyError if SCHEDULES has no `lr_schedule`.
    """
    if not (start := config.lr_restart_step):
        return _rise_and_fall(config, max_steps, config.min_lr_ratio)
    peak = config.lr_restart_ratio
    first = _rise_and_fall(config, start, config.min_lr_ratio)
    second = _rise_and_fall(config, max_steps - start, config.min_lr_ratio / peak)
    return optax.join_schedules([first, lambda step: peak * second(step)], [start])


def _rise_and_fall(config: OptimizerConfig, steps: int, end: float) -> optax.Schedule:
    """A schedule of so many steps, which rises to 1 and falls to `end`."""
    decay_steps = max(1, round((steps - config.warmup_steps) * config.lr_decay_fraction))
    warmup = optax.linear_schedule(1 / (config.warmup_steps + 1), 1.0, config.warmup_steps)
    decay = SCHEDULES[config.lr_schedule](end, decay_steps)
    phases = [warmup, optax.constant_schedule(1.0), decay]
    return optax.join_schedules(phases, [config.warmup_steps, steps - decay_steps])


def _decay_and_scale(
    config: Config, direction: optax.GradientTransformation, decay: float, peak_lr: float
) -> optax.GradientTransformation:
    """`direction`, then decoupled weight decay, then the scheduled learning rate, which scales both."""
    mask = tree_of(config.model, lambda parameter: parameter.weight_decay)
    schedule = make_schedule(config.optimizer, config.max_steps)
    add_decay = cautious_decay(decay, mask) if config.optimizer.cautious else optax.add_decayed_weights(decay, mask)
    return optax.chain(direction, add_decay, optax.scale_by_learning_rate(lambda step: peak_lr * schedule(step)))


def cautious_decay(decay: float, mask: Params) -> optax.GradientTransformation:
    """`optax.add_decayed_weights`, but only where the update moves a weight towards zero (arXiv 2510.12402)."""

    def add_decay(updates: Params, params: Params) -> Params:
        return jax.tree.map(lambda u, p: jnp.where(u * p >= 0, u + decay * p, u), updates, params)

    return optax.masked(optax.stateless(add_decay), mask)


def adamw(config: Config, mesh: Mesh | None = None) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101)."""
    c = config.optimizer
    return _decay_and_scale(config, optax.scale_by_adam(c.b1, c.b2), c.weight_decay, c.learning_rate)


def muon(config: Config, mesh: Mesh | None = None) -> optax.GradientTransformation:
    """Muon (Jordan 2024, kellerjordan.github.io/posts/muon) on the blocks' matrices, AdamW on the rest.

    With `muon_b2` it is NorMuon (Li et al. 2025, arXiv 2510.05491).
    """
    c = config.optimizer
    normalize = normalize_neurons(c.muon_b2) if c.muon_b2 else optax.identity()
    direction = optax.chain(orthogonalized_momentum(config, mesh), normalize)
    by_muon = _decay_and_scale(config, direction, c.muon_weight_decay, c.muon_learning_rate)
    # checkpoints hold the states of the two under these labels
    labels = tree_of(config.model, lambda parameter: parameter.optimizer)
    return optax.multi_transform({"adam": adamw(config), "muon": by_muon}, labels)


OPTIMIZERS: dict[str, Callable[[Config, Mesh | None], optax.GradientTransformation]] = {"adamw": adamw, "muon": muon}


def make_transformation(config: Config, mesh: Mesh | None = None) -> optax.GradientTransformation:
    """From averaged gradients to one optimizer step: records the global norm, clips by it, then `optimizer.name`.

    Raises KeyError if OPTIMIZERS has no such name.
    """
    clip = clip_by_global_norm(config.optimizer.clip_norm)
    return optax.chain(record_grad_norm(), clip, OPTIMIZERS[config.optimizer.name](config, mesh))


class Optimizer(NamedTuple):
    """The functions that start and update what the optimizer carries.

    `init` makes a state for parameters. `step` (grads, state, params, average) -> (params, state, average, measured)
    applies one micro-batch; the average is that of `average_start`, or None.
    """

    init: Callable[[Params], optax.MultiStepsState]
    step: Callable[..., tuple[Params, optax.MultiStepsState, Params | None, Any]]


def make_optimizer(config: Config, replicas: int = 1, mesh: Mesh | None = None) -> Optimizer:
    """`make_transformation` applied to the mean gradient of `grad_accum_steps` micro-batches.

    A micro-batch whose gradient norm is not finite is skipped: the state and the parameters stay as they are.
    `replicas` is that of `multi_steps`, and `mesh` has the arrays.
    """
    cond, every = ops.get(config.model.implementation).cond, config.grad_accum_steps
    measure = partial(update_ratios, config.model)
    return multi_steps(make_transformation(config, mesh), every, cond, config.optimizer.average, measure, replicas)


def multi_steps(
    inner: optax.GradientTransformation,
    every: int,
    cond: Callable = jax.lax.cond,
    average_decay: float = 0.0,
    measure: Callable[[Params, Params], Any] = lambda updates, params: (),
    replicas: int = 1,
) -> Optimizer:
    """`optax.MultiSteps(inner, every, should_skip_update_fn=optax.skip_not_finite)`, in place.

    The state and, up to rounding, the numbers are those of optax, with four differences. Gradients whose norm
    overflows are skipped too. The update is computed only when it is due, if `cond` (as `jax.lax.cond`) branches. It is
    applied to the parameters directly, so there is no tree of updates. With `every` 1 there is no accumulator.

    `inner` may take the number of optimizer steps done as the extra argument `step`. `step` also returns what `measure`
    makes of the updates and the parameters before them, and zeros where no update is due.

    With several `replicas`, the gradients and the accumulator have a leading axis of so many parts of the gradient.
    They are summed only when an update is due.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Params) -> optax.MultiStepsState:
        leading = (replicas,) if replicas > 1 else ()
        zeros = jax.tree.map(lambda leaf: jnp.zeros((*leading, *leaf.shape), leaf.dtype), params)
        return optax.MultiStepsState(
            mini_step=jnp.int32(0),
            gradient_step=jnp.int32(0),
            inner_opt_state=inner.init(params),
            acc_grads=() if every == 1 else zeros,
            skip_state={"should_skip": jnp.bool_(False)},
        )

    def step(
        grads: Params, state: optax.MultiStepsState, params: Params, average: Params | None = None
    ) -> tuple[Params, optax.MultiStepsState, Params | None, Any]:
        skip = ~jnp.isfinite(optax.tree_utils.tree_norm(grads))
        due = ~skip & (state.mini_step == every - 1)
        mean = grads
        if every > 1:
            weight = 1 / (state.mini_step + 1)
            mean = jax.tree.map(lambda a, g: jnp.where(skip, a, a + (g - a) * weight), state.acc_grads, grads)

        def apply(
            params: Params, average: Params | None, inner_state: Any, mean: Params, measured: Any
        ) -> tuple[Any, ...]:
            whole = jax.tree.map(partial(jnp.sum, axis=0), mean) if replicas > 1 else mean
            updates, inner_state = inner.update(whole, inner_state, params, step=state.gradient_step)
            if average is not None:
                average = average_step(average_decay, state.gradient_step, average, updates)
            measured = measure(updates, params)
            return optax.apply_updates(params, updates), average, inner_state, _zeros_after(measured, mean), measured

        unmeasured = jax.tree.map(jnp.zeros_like, jax.eval_shape(measure, params, params))
        operands = params, average, state.inner_opt_state, mean, unmeasured
        params, average, inner_state, acc_grads, measured = cond(due, apply, lambda *operands: operands, *operands)
        state = optax.MultiStepsState(
            mini_step=jnp.where(skip, state.mini_step, (state.mini_step + 1) % every),
            gradient_step=state.gradient_step + due,
            inner_opt_state=inner_state,
            acc_grads=() if every == 1 else acc_grads,
            skip_state={"should_skip": skip},
        )
        return params, state, average, measured

    return Optimizer(init, step)


def _zeros_after(norms: Any, tree: Params) -> Params:
    """Zeros like `tree`, which XLA can write only when it knows the norms: then it has freed the updates."""
    total = sum(jax.tree.leaves(norms))
    zero = jnp.where(total < 0, total, 0.0)  # no norm is negative
    return jax.tree.map(lambda leaf: jnp.broadcast_to(zero, leaf.shape), tree)


def update_ratios(model: ModelConfig, updates: Params, params: Params) -> dict[str, jax.Array]:
    """||updates|| / ||params|| of each kind in the table of parameters: [] float32, with Euclidean norms."""
    squares: dict[str, list[tuple[jax.Array, jax.Array]]] = {}

    def add(kind: str, update: jax.Array, parameter: jax.Array) -> None:
        squares.setdefault(kind, []).append((jnp.sum(update * update), jnp.sum(parameter * parameter)))

    jax.tree.map(add, tree_of(model, lambda parameter: parameter.kind), updates, params)
    sums = {kind: map(sum, zip(*pairs, strict=True)) for kind, pairs in squares.items()}
    return {kind: jnp.sqrt(update / parameter) for kind, (update, parameter) in sums.items()}


class NormState(NamedTuple):
    """The global norm of the last mean gradient, before clipping."""

    grad_norm: jax.Array


def record_grad_norm() -> optax.GradientTransformation:
    """Changes no gradient; its state holds their global norm."""
    return optax.GradientTransformation(
        lambda params: NormState(jnp.float32(0)),
        lambda updates, state, params=None: (updates, NormState(optax.tree_utils.tree_norm(updates))),
    )


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` as one multiplication, which XLA fuses; optax's division makes a copy."""

    def clip(grads: Params, params: Params) -> Params:
        scale = max_norm / jnp.maximum(optax.tree_utils.tree_norm(grads), max_norm)
        return jax.tree.map(lambda g: g * scale, grads)

    return optax.stateless(clip)


def orthogonalized_momentum(config: Config, mesh: Mesh | None = None) -> optax.GradientTransformationExtraArgs:
    """Nesterov's momentum of each stack [L, D, F], each matrix by `newton_schulz`, scaled to the RMS of Adam's updates.

    The momentum's decay rises linearly over the warm-up, from MOMENTUM_START or less to `muon_momentum`. The scale is
    0.2 sqrt(max(D, F)) (Liu et al. 2025, arXiv 2502.16982).
    """
    c, model = config.optimizer, config.model
    start = min(MOMENTUM_START, c.muon_momentum)
    decay_at = optax.linear_schedule(start, c.muon_momentum, c.muon_momentum_warmup)
    map_matrices = ops.get(model.implementation).map_matrices
    if mesh and mesh.shape[FSDP] > 1 and model.layers % mesh.shape[FSDP] == 0:  # else each device computes all layers
        map_matrices = partial(_map_matrices_on_mesh, map_matrices, mesh)

    def direction(m_LDF: jax.Array) -> jax.Array:
        return newton_schulz(m_LDF, model.matmul_dtype) * (0.2 * max(m_LDF.shape[1:]) ** 0.5)

    def update(grads: Params, state: optax.TraceState, params: Any = None, *, step: jax.Array) -> tuple[Params, Any]:
        decay = decay_at(step) if c.muon_momentum_warmup else c.muon_momentum
        trace = jax.tree.map(lambda m, g: g + decay * m, state.trace, grads)
        stacks, structure = jax.tree.flatten(jax.tree.map(lambda m, g: g + decay * m, trace, grads))
        return jax.tree.unflatten(structure, map_matrices(direction, stacks)), optax.TraceState(trace)

    return optax.GradientTransformationExtraArgs(optax.trace(0.0).init, update)


def _map_matrices_on_mesh(map_matrices: Callable, mesh: Mesh, function: Callable, stacks: list[jax.Array]) -> Any:
    """`map_matrices` where each device of FSDP has whole layers."""
    layers = [PartitionSpec(FSDP)] * len(stacks)
    return over_devices(partial(map_matrices, function), mesh, (layers,), layers)(stacks)


def newton_schulz(m_LDF: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """Five Newton-Schulz iterations towards the nearest orthogonal matrices, with the coefficients of Jordan (2024).

    Matmuls read and write `dtype`, and what is between them is added in float32.

    Returns:
        [L, D, F] float32: the singular vectors of each m, with singular values between about 0.7 and 1.2.
    """
    x, transpose = m_LDF.astype(dtype), m_LDF.shape[1] > m_LDF.shape[2]
    identity = jnp.eye(min(m_LDF.shape[1:]))
    for iteration in range(5):
        gram = jnp.einsum("LDF,LDE->LFE" if transpose else "LDF,LEF->LDE", x, x)  # that of the shorter side is smaller
        if iteration == 0:  # m / |m|, by its gram matrix, whose trace is the square of the norm
            scale = jax.lax.rsqrt(jnp.trace(gram.astype(jnp.float32), axis1=1, axis2=2) + 1e-14)[:, None, None]
            gram = (gram * scale**2).astype(dtype)
        polynomial = 3.4445 * identity - 4.7750 * gram.astype(jnp.float32) + 2.0315 * (gram @ gram).astype(jnp.float32)
        polynomial = (polynomial * scale if iteration == 0 else polynomial).astype(dtype)
        x = x @ polynomial if transpose else polynomial @ x
    return x.astype(jnp.float32)


class NeuronState(NamedTuple):
    """For each output neuron, an exponential average of the mean square of its updates."""

    nu: Params  # [L, 1, F] for each [L, D, F]


def normalize_neurons(b2: float) -> optax.GradientTransformation:
    """Divides the update of each output neuron by the root of its mean square, averaged over the steps with decay b2.

    The Frobenius norm of each matrix stays the same (Li et al. 2025, arXiv 2510.05491), so a debiased average would
    give the same update.
    """

    def init(params: Params) -> NeuronState:
        return NeuronState(jax.tree.map(lambda p: jnp.zeros_like(p[:, :1]), params))

    def update(updates: Params, state: NeuronState, params: Any = None) -> tuple[Params, NeuronState]:
        square = jax.tree.map(lambda u: jnp.mean(u * u, axis=1, keepdims=True), updates)
        nu = jax.tree.map(lambda v, s: b2 * v + (1 - b2) * s, state.nu, square)
        return jax.tree.map(_normalized, updates, square, nu), NeuronState(nu)

    return optax.GradientTransformation(init, update)


def _normalized(u_LDF: jax.Array, square_L1F: jax.Array, nu_L1F: jax.Array) -> jax.Array:
    """u / sqrt(nu), scaled to the Frobenius norm of u, whose columns have the mean squares `square`."""
    nu_L1F = jnp.maximum(nu_L1F, MIN_MEAN_SQUARE)
    before, after = (jnp.sum(s, axis=2, keepdims=True) for s in (square_L1F, square_L1F / nu_L1F))
    return u_LDF * jnp.sqrt(before / jnp.maximum(after, MIN_MEAN_SQUARE) / nu_L1F)
