"""The learning-rate schedule and the optax chain, accumulated by MultiSteps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.config import Config, OptimizerConfig


def make_schedule(config: OptimizerConfig, max_steps: int) -> optax.Schedule:
    """The learning rate over optimizer steps, as a share of its peak.

    Linear from 1 / (warmup_steps + 1) to 1 over the warm-up, constant, then over the last `lr_decay_fraction` of the
    remaining steps down to `min_lr_ratio`, along half a cosine or a line.

    Returns:
        A function of the number of steps already done ([] int) to a share ([] float32).
    """
    decay_steps = max(1, round((max_steps - config.warmup_steps) * config.lr_decay_fraction))
    if config.lr_schedule == "cosine":
        decay = optax.cosine_decay_schedule(1.0, decay_steps, alpha=config.min_lr_ratio)
    else:
        decay = optax.linear_schedule(1.0, config.min_lr_ratio, decay_steps)
    warmup = optax.linear_schedule(1 / (config.warmup_steps + 1), 1.0, config.warmup_steps)
    hold = optax.constant_schedule(1.0)
    return optax.join_schedules([warmup, hold, decay], [config.warmup_steps, max_steps - decay_steps])


class Optimizer(NamedTuple):
    """What makes a state for parameters, and what takes both a micro-batch further."""

    init: Callable[[Any], optax.MultiStepsState]
    step: Callable[[Any, optax.MultiStepsState, Any], tuple[Any, optax.MultiStepsState]]


def make_optimizer(config: Config) -> Optimizer:
    """Clip by the global norm, then AdamW (or Muon for the blocks' matrices), each `grad_accum_steps` micro-batches.

    The gradients of the micro-batches are averaged. A micro-batch whose gradients have no finite norm is skipped:
    nothing advances.
    """
    return accumulate(make_inner(config), config.grad_accum_steps, conditional=not config.model.unrolled)


def make_inner(config: Config) -> optax.GradientTransformation:
    """The chain of one optimizer step. Weight decay is decoupled and on matrices only."""
    c = config.optimizer
    schedule = make_schedule(c, config.max_steps)

    def descend(scale: optax.GradientTransformation, peak: float) -> optax.GradientTransformation:
        return optax.chain(
            scale,
            optax.add_decayed_weights(c.weight_decay, mask=_matrices),
            optax.scale_by_learning_rate(lambda step: peak * schedule(step)),
        )

    adam = descend(optax.scale_by_adam(c.b1, c.b2), c.learning_rate)
    if c.name == "muon":
        muon = descend(optax.chain(optax.trace(c.b1, nesterov=True), _orthogonalize()), c.muon_learning_rate)
        update = optax.multi_transform({"adam": adam, "muon": muon}, _muon_labels)
    else:
        update = adam
    return optax.chain(_record_norm(), clip_by_norm(c.clip_norm), update)


def accumulate(inner: optax.GradientTransformation, every: int, conditional: bool = True) -> Optimizer:
    """`optax.MultiSteps(inner, every, should_skip_update_fn=optax.skip_not_finite)`, updating in place.

    The same state and, to the bit or nearly, the same numbers. But gradients whose norm overflows are skipped too, the
    update is computed only when it is due, it is applied to the parameters where they lie, without a second set of
    them, and where every micro-batch is a step nothing is kept to add to. Without `conditional` the update is computed
    each time and chosen where it is due: the program has no branches.
    """
    reference = optax.MultiSteps(inner, every, should_skip_update_fn=optax.skip_not_finite)

    def init(params: Any) -> optax.MultiStepsState:
        state = reference.init(params)
        acc = () if every == 1 else state.acc_grads
        return state._replace(acc_grads=acc, skip_state={"should_skip": state.skip_state["should_skip"]})

    def step(grads: Any, state: optax.MultiStepsState, params: Any) -> tuple[Any, optax.MultiStepsState]:
        skip = ~jnp.isfinite(optax.tree_utils.tree_norm(grads))
        due = ~skip & (state.mini_step == every - 1)
        mean = grads
        if every > 1:
            share = 1 / (state.mini_step + 1)
            mean = jax.tree.map(lambda a, b: jnp.where(skip, a, a + (b - a) * share), state.acc_grads, grads)

        def update(params: Any, inner_state: Any, mean: Any) -> tuple[Any, Any, Any]:
            updates, inner_state = inner.update(mean, inner_state, params)
            return optax.apply_updates(params, updates), inner_state, jax.tree.map(jnp.zeros_like, mean)

        before = params, state.inner_opt_state, mean
        if conditional:
            after = jax.lax.cond(due, update, lambda *before: before, *before)
        else:
            after = jax.tree.map(lambda new, old: jnp.where(due, new, old), update(*before), before)
        params, inner_state, acc = after
        state = optax.MultiStepsState(
            mini_step=jnp.where(skip, state.mini_step, (state.mini_step + 1) % every),
            gradient_step=state.gradient_step + due,
            inner_opt_state=inner_state,
            acc_grads=() if every == 1 else acc,
            skip_state={"should_skip": skip},
        )
        return params, state

    return Optimizer(init, step)


def _matrices(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: not path[-1].key.endswith("norm"), params)


def _muon_labels(params: Any) -> Any:
    def label(path, is_matrix):
        return "muon" if is_matrix and path[0].key == "blocks" else "adam"

    return jax.tree_util.tree_map_with_path(label, _matrices(params))


class NormState(NamedTuple):
    """The global norm of the last averaged gradient, before clipping."""

    grad_norm: jax.Array


def _record_norm() -> optax.GradientTransformation:
    return optax.GradientTransformation(
        lambda params: NormState(jnp.float32(0)),
        lambda updates, state, params=None: (updates, NormState(optax.tree_utils.tree_norm(updates))),
    )


def clip_by_norm(largest: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` by one multiplication, which XLA fuses where that one's division makes a copy."""

    def clip(grads: Any, params: Any) -> Any:
        scale = largest / jnp.maximum(optax.tree_utils.tree_norm(grads), largest)
        return jax.tree.map(lambda g: g * scale, grads)

    return optax.stateless(clip)


def _orthogonalize() -> optax.GradientTransformation:
    return optax.stateless(
        lambda updates, params: jax.tree.map(lambda m: jax.vmap(orthogonalize)(m) * muon_scale(m.shape[1:]), updates)
    )


def orthogonalize(m_DF: jax.Array) -> jax.Array:
    """Five Newton-Schulz steps towards the nearest orthogonal matrix (Jordan 2024, kellerjordan.github.io/posts/muon).

    Args:
        m_DF: any matrix.

    Returns:
        [D, F]: the singular vectors of m, with singular values between about 0.7 and 1.2.
    """
    tall = m_DF.shape[0] > m_DF.shape[1]
    x = m_DF.T if tall else m_DF
    x = x / (jnp.linalg.norm(x) + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


def muon_scale(shape: tuple[int, int]) -> float:
    """0.2 sqrt(larger side): gives a Muon update the RMS of Adam's (Liu et al. 2025, arXiv 2502.16982)."""
    return 0.2 * max(shape) ** 0.5
