"""The training state and the jitted steps that take it forward and measure it."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.config import Config
from jaxlm.core.model import Decoder, init_params, loss_and_gradient
from jaxlm.core.optimizer import make_optimizer, make_schedule


class TrainState(NamedTuple):
    """All that training carries from one micro-batch to the next."""

    params: Any
    opt_state: optax.MultiStepsState
    batches: jax.Array  # [] int32: micro-batches read, those skipped included; the next one's index
    skipped_in_a_row: jax.Array  # [] int32: since the last micro-batch that counted
    loss_sum: jax.Array  # [] float32: mean losses of the micro-batches since the last optimizer step, added up

    @property
    def step(self) -> jax.Array:
        """[] int32: optimizer steps done."""
        return self.opt_state.gradient_step


class Metrics(NamedTuple):
    """What one micro-step reports; loss, lr and grad_norm are of the optimizer step when `updated`."""

    updated: jax.Array  # [] bool: this micro-batch completed an optimizer step
    step: jax.Array  # [] int32: optimizer steps done
    loss: jax.Array  # [] float32: nats per token, mean over the micro-batches of the step
    lr: jax.Array  # [] float32
    grad_norm: jax.Array  # [] float32: of the averaged gradient, before clipping
    skipped: jax.Array  # [] int32: micro-batches skipped since the start
    skipped_in_a_row: jax.Array  # [] int32


def init_state(config: Config) -> TrainState:
    """Draws the parameters from the seed; moments and counters are zero."""
    params = init_params(config.model, jax.random.key(config.seed))
    # each its own array: a donated state may not name one buffer twice
    opt_state = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(make_optimizer(config).init, params))
    return TrainState(params, opt_state, jnp.int32(0), jnp.int32(0), jnp.float32(0))


class Total(NamedTuple):
    """What the slices of a micro-batch have added up."""

    chunks: jax.Array  # [] int32: how many
    loss: jax.Array  # [] float32: their part of the mean loss
    grads: Any  # and of its gradient


@dataclass(frozen=True)
class HostLoopStep:
    """A micro-step of several programs, which the host calls: none of them loops over the slices.

    The host waits for each slice: where no buffer is reused, the next one would take its memory before this one has
    given back its own.
    """

    microbatch_chunks: int
    start: Any  # params -> an empty Total
    accumulate_chunk: Any  # params, Total, ids [B, T + 1] -> Total
    update: Any  # TrainState, Total -> TrainState, Metrics

    def __call__(self, state: TrainState, ids_BT: jax.Array) -> tuple[TrainState, Metrics]:
        total = self.start(state.params)
        for _ in range(self.microbatch_chunks):
            total = jax.block_until_ready(self.accumulate_chunk(state.params, total, ids_BT))
        return self.update(state, total)

    def lower(self, state: Any, ids_BT: Any) -> "HostLoopStep":
        """Lowers the programs for these arrays or shapes, as `jax.jit` does one."""
        total = jax.eval_shape(self.start, state.params)
        return HostLoopStep(
            self.microbatch_chunks,
            self.start.lower(state.params),
            self.accumulate_chunk.lower(state.params, total, ids_BT),
            self.update.lower(state, total),
        )

    def compile(self) -> "HostLoopStep":
        """Compiles what `lower` gave."""
        return HostLoopStep(
            self.microbatch_chunks, self.start.compile(), self.accumulate_chunk.compile(), self.update.compile()
        )


def make_train_step(config: Config) -> HostLoopStep | jax.stages.Wrapped:
    """Builds the jitted micro-step.

    Returns:
        (state, ids [B, T + 1] int32) -> (state, metrics). The state is donated: its buffers are reused, but not where
        loops are unrolled. Every `grad_accum_steps` micro-batches with finite gradients make one optimizer step.
    """
    optimizer = make_optimizer(config)
    schedule = make_schedule(config.optimizer, config.max_steps)
    slices = config.batch_size // config.chunk_size

    def start(params: Any) -> Total:
        return Total(jnp.int32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, params))

    def accumulate_chunk(params: Any, total: Total, ids_BT: jax.Array) -> Total:
        tokens = ids_BT.size - len(ids_BT)
        slice_BT = jax.lax.dynamic_slice_in_dim(ids_BT, total.chunks * config.chunk_size, config.chunk_size)
        inputs_BT, targets_BT = slice_BT[:, :-1], slice_BT[:, 1:]
        nats, grads = loss_and_gradient(config.model, params, inputs_BT, targets_BT, 1 / tokens, total.grads)
        return Total(total.chunks + 1, total.loss + nats / tokens, grads)

    def update(state: TrainState, total: Total) -> tuple[TrainState, Metrics]:
        params, opt_state = optimizer.step(total.grads, state.opt_state, state.params)
        skipped_now = opt_state.skip_state["should_skip"]
        updated = opt_state.gradient_step > state.step
        batches = state.batches + 1
        loss_sum = state.loss_sum + jnp.where(skipped_now, 0, total.loss)
        in_a_row = jnp.where(skipped_now, state.skipped_in_a_row + 1, 0)
        used = opt_state.gradient_step * config.grad_accum_steps + opt_state.mini_step
        metrics = Metrics(
            updated=updated,
            step=opt_state.gradient_step,
            loss=loss_sum / config.grad_accum_steps,
            lr=config.optimizer.learning_rate * schedule(state.step),
            grad_norm=optax.tree_utils.tree_get(opt_state, "grad_norm"),
            skipped=batches - used,
            skipped_in_a_row=in_a_row,
        )
        return TrainState(params, opt_state, batches, in_a_row, jnp.where(updated, 0, loss_sum)), metrics

    def train_step(state: TrainState, ids_BT: jax.Array) -> tuple[TrainState, Metrics]:
        total = start(state.params)
        if slices == 1:
            total = accumulate_chunk(state.params, total, ids_BT)
        else:
            total, _ = jax.lax.scan(
                lambda t, _: (accumulate_chunk(state.params, t, ids_BT), None), total, length=slices
            )
        return update(state, total)

    if config.model.unrolled:
        return HostLoopStep(slices, jax.jit(start), jax.jit(accumulate_chunk), jax.jit(update))
    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(config: Config) -> jax.stages.Wrapped:
    """Builds the jitted evaluation step: (params, inputs [B, T], targets [B, T]) -> [] float32, nats in all.

    Targets below 0 count nothing.
    """
    model = Decoder(config.model)
    return jax.jit(lambda params, inputs, targets: model.apply({"params": params}, inputs, targets, method="loss"))
