"""The optimizer: the learning-rate schedule, AdamW or Muon, and gradient accumulation.

SCHEDULES and OPTIMIZERS are the functions that the settings `optimizer.lr_schedule` and `optimizer.name` choose from.
The transformations are optax's where optax has them. The masks come from the table of parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.config import Config, OptimizerConfig
from jaxlm.core import ops
from jaxlm.core.parameters import Params, tree_of

SCHEDULES: dict[str, Callable[[float, int], optax.Schedule]] = {  # (end value, steps) -> from 1 down to the end value
    "cosine": lambda end, steps: optax.cosine_decay_schedule(1.0, steps, alpha=end),
    "linear": lambda end, steps: optax.linear_schedule(1.0, end, steps),
}


def make_schedule(config: OptimizerConfig, max_steps: int) -> optax.Schedule:
    """The learning rate after so many completed optimizer steps, as a fraction of its peak.

    It rises linearly from 1 / (warmup_steps + 1) to 1 over the warm-up and stays there. Over the last
    `lr_decay_fraction` of the steps after the warm-up it falls to `min_lr_ratio`, as `lr_schedule` says.

    Raises KeyError if SCHEDULES has no `lr_schedule`.
    """
    decay_steps = max(1, round((max_steps - config.warmup_steps) * config.lr_decay_fraction))
    warmup = optax.linear_schedule(1 / (config.warmup_steps + 1), 1.0, config.warmup_steps)
    decay = SCHEDULES[config.lr_schedule](config.min_lr_ratio, decay_steps)
    phases = [warmup, optax.constant_schedule(1.0), decay]
    return optax.join_schedules(phases, [config.warmup_steps, max_steps - decay_steps])


def _decay_and_scale(
    config: Config, direction: optax.GradientTransformation, peak_lr: float
) -> optax.GradientTransformation:
    """`direction`, then decoupled weight decay, then the scheduled learning rate."""
    mask = tree_of(config.model, lambda parameter: parameter.weight_decay)
    schedule = make_schedule(config.optimizer, config.max_steps)
    return optax.chain(
        direction,
        optax.add_decayed_weights(config.optimizer.weight_decay, mask=mask),
        optax.scale_by_learning_rate(lambda step: peak_lr * schedule(step)),
    )


def adamw(config: Config) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101)."""
    c = config.optimizer
    return _decay_and_scale(config, optax.scale_by_adam(c.b1, c.b2), c.learning_rate)


def muon(config: Config) -> optax.GradientTransformation:
    """Muon (Jordan 2024, kellerjordan.github.io/posts/muon) on the blocks' matrices, AdamW on the rest."""
    c = config.optimizer
    scale_by_muon = optax.chain(optax.trace(c.b1, nesterov=True), orthogonalize())
    # checkpoints hold the states of the two under these labels
    transformations = {"adam": adamw(config), "muon": _decay_and_scale(config, scale_by_muon, c.muon_learning_rate)}
    labels = tree_of(config.model, lambda parameter: "muon" if parameter.optimizer == "muon" else "adam")
    return optax.multi_transform(transformations, labels)


OPTIMIZERS: dict[str, Callable[[Config], optax.GradientTransformation]] = {"adamw": adamw, "muon": muon}


def make_transformation(config: Config) -> optax.GradientTransformation:
    """From averaged gradients to one optimizer step: records the global norm, clips by it, then `optimizer.name`.

    Raises KeyError if OPTIMIZERS has no such name.
    """
    clip = clip_by_global_norm(config.optimizer.clip_norm)
    return optax.chain(record_grad_norm(), clip, OPTIMIZERS[config.optimizer.name](config))


class Optimizer(NamedTuple):
    """`init` makes a state for parameters. `step` (grads, state, params) -> (params, state) applies one micro-batch."""

    init: Callable[[Params], optax.MultiStepsState]
    step: Callable[[Params, optax.MultiStepsState, Params], tuple[Params, optax.MultiStepsState]]


def make_optimizer(config: Config) -> Optimizer:
    """`make_transformation` applied to the mean gradient of `grad_accum_steps` micro-batches.

    A micro-batch whose gradient norm is not finite is skipped: the state and the parameters stay as they are.
    """
    cond = ops.get(config.model.implementation).cond
    return multi_steps(make_transformation(config), config.grad_accum_steps, cond)


def multi_steps(inner: optax.GradientTransformation, every: int, cond: Callable = jax.lax.cond) -> Optimizer:
    """`optax.MultiSteps(inner, every, should_skip_update_fn=optax.skip_not_finite)`, in place.

    The state and, up to rounding, the numbers are those of optax, with four differences. Gradients whose norm
    overflows are skipped too. The update is computed only when it is due, if `cond` (as `jax.lax.cond`) branches. It is
    applied to the parameters directly, so there is no tree of updates. With `every` 1 there is no accumulator.
    """

    def init(params: Params) -> optax.MultiStepsState:
        state = optax.MultiSteps(inner, every, should_skip_update_fn=optax.skip_not_finite).init(params)
        acc_grads = () if every == 1 else state.acc_grads
        return state._replace(acc_grads=acc_grads, skip_state={"should_skip": state.skip_state["should_skip"]})

    def apply(params: Params, inner_state: Any, mean: Params) -> tuple[Params, Any, Params]:
        updates, inner_state = inner.update(mean, inner_state, params)
        return optax.apply_updates(params, updates), inner_state, jax.tree.map(jnp.zeros_like, mean)

    def step(grads: Params, state: optax.MultiStepsState, params: Params) -> tuple[Params, optax.MultiStepsState]:
        skip = ~jnp.isfinite(optax.tree_utils.tree_norm(grads))
        due = ~skip & (state.mini_step == every - 1)
        mean = grads
        if every > 1:
            weight = 1 / (state.mini_step + 1)
            mean = jax.tree.map(lambda a, g: jnp.where(skip, a, a + (g - a) * weight), state.acc_grads, grads)
        operands = params, state.inner_opt_state, mean
        params, inner_state, acc_grads = cond(due, apply, lambda *operands: operands, *operands)
        state = optax.MultiStepsState(
            mini_step=jnp.where(skip, state.mini_step, (state.mini_step + 1) % every),
            gradient_step=state.gradient_step + due,
            inner_opt_state=inner_state,
            acc_grads=() if every == 1 else acc_grads,
            skip_state={"should_skip": skip},
        )
        return params, state

    return Optimizer(init, step)


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


def orthogonalize() -> optax.GradientTransformation:
    """Replaces each matrix of stacks [L, D, F] by `newton_schulz` of it, scaled to the RMS of Adam's updates.

    The scale is 0.2 sqrt(max(D, F)) (Liu et al. 2025, arXiv 2502.16982).
    """

    def direction(m_LDF: jax.Array) -> jax.Array:
        return jax.vmap(newton_schulz)(m_LDF) * (0.2 * max(m_LDF.shape[1:]) ** 0.5)

    return optax.stateless(lambda updates, params: jax.tree.map(direction, updates))


def newton_schulz(m_DF: jax.Array) -> jax.Array:
    """Five Newton-Schulz iterations towards the nearest orthogonal matrix, with the coefficients of Jordan (2024).

    Returns:
        [D, F]: the singular vectors of m, with singular values between about 0.7 and 1.2.
    """
    transpose = m_DF.shape[0] > m_DF.shape[1]  # the Gram matrix of the shorter side is the smaller one
    x = m_DF.T if transpose else m_DF
    x = x / (jnp.linalg.norm(x) + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if transpose else x
