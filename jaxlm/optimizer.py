"""The learning-rate schedule and the optax chain, accumulated by MultiSteps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.config import Config, OptimizerConfig


def make_schedule(config: OptimizerConfig, max_steps: int) -> optax.Schedule:
    """The learning rate over optimizer steps, as a share of its peak.

    Linear from 1 / (warmup_steps + 1) to 1 over the warm-up, constant, then over the last `decay_fraction` of the
    remaining steps down to `floor`, along half a cosine or a line.

    Returns:
        A function of the number of steps already done ([] int) to a share ([] float32).
    """
    decay_steps = max(1, round((max_steps - config.warmup_steps) * config.decay_fraction))
    if config.decay == "cosine":
        decay = optax.cosine_decay_schedule(1.0, decay_steps, alpha=config.floor)
    else:
        decay = optax.linear_schedule(1.0, config.floor, decay_steps)
    warmup = optax.linear_schedule(1 / (config.warmup_steps + 1), 1.0, config.warmup_steps)
    hold = optax.constant_schedule(1.0)
    return optax.join_schedules([warmup, hold, decay], [config.warmup_steps, max_steps - decay_steps])


def make_optimizer(config: Config) -> optax.MultiSteps:
    """Clip by the global norm, then AdamW (or Muon for the blocks' matrices), each `grad_accum_steps` micro-batches.

    The gradients of the micro-batches are averaged. A micro-batch whose gradients are not all finite is skipped:
    nothing advances. Weight decay is decoupled and on matrices only.
    """
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
    inner = optax.chain(_record_norm(), optax.clip_by_global_norm(c.clip_norm), update)
    return optax.MultiSteps(inner, config.grad_accum_steps, should_skip_update_fn=optax.skip_not_finite)


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
