"""The training state, the jitted micro-step that updates it, and the jitted evaluation."""

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.config import Config
from jaxlm.core import ops, sharding
from jaxlm.core.average import average_start, averaged
from jaxlm.core.decoder import init_params
from jaxlm.core.model import loss, loss_and_gradient
from jaxlm.core.optimizer import make_optimizer, make_schedule
from jaxlm.core.parameters import Params


class TrainState(NamedTuple):
    """All that training carries from one micro-batch to the next."""

    params: Params
    opt_state: optax.MultiStepsState
    batches: jax.Array  # [] int32: micro-batches read, with the skipped ones; the index of the next one
    skipped_in_a_row: jax.Array  # [] int32: micro-batches skipped since the last one with finite gradients
    loss_sum: jax.Array  # [] float32: sum of the mean losses of the micro-batches since the last optimizer step
    average: Params | None  # of the weights, as `average.average_step` keeps it; None: none is kept

    @property
    def step(self) -> jax.Array:
        """[] int32: optimizer steps done."""
        return self.opt_state.gradient_step

    @property
    def weights(self) -> Params:
        """The parameters to evaluate and to publish: their average, or without one the last ones."""
        return averaged(self.params, self.average)


class Metrics(NamedTuple):
    """What one micro-step reports; loss, lr, grad_norm and update_ratios are of the optimizer step when `updated`."""

    updated: jax.Array  # [] bool: this micro-batch completed an optimizer step
    step: jax.Array  # [] int32: optimizer steps done
    loss: jax.Array  # [] float32: nats per token, mean over the micro-batches of the step
    lr: jax.Array  # [] float32
    grad_norm: jax.Array  # [] float32: of the averaged gradient, before clipping
    skipped: jax.Array  # [] int32: micro-batches skipped since the start
    skipped_in_a_row: jax.Array  # [] int32
    update_ratios: dict[str, jax.Array]  # [] float32: ||update|| / ||weights|| of each kind of parameter


def init_state(config: Config, mesh: Mesh | None = None) -> TrainState:
    """Draws the parameters from the seed and initialises the optimizer for them; counters are zero.

    On a mesh each device draws its part only.
    """
    program, seed = _init_program(replace(config, seed=0), mesh), np.int32(config.seed)
    if mesh:
        shapes = jax.eval_shape(program, seed)
        program = jax.jit(program, out_shardings=sharding.state_shardings(config.model, mesh, shapes))
    return program(seed)


@lru_cache(8)
def _init_program(config: Config, mesh: Mesh | None) -> Any:
    """seed -> state, jitted, so that one trace gives the shapes of the state and the state of any seed."""

    def init(seed: jax.Array) -> TrainState:
        params = init_params(config.model, jax.random.key(seed))
        opt_state = make_optimizer(config, sharding.replica_count(mesh)).init(params)
        state = TrainState(params, opt_state, jnp.int32(0), jnp.int32(0), jnp.float32(0), average_start(config, params))
        return jax.tree.map(jnp.copy, state)  # each leaf its own array: a donated state may not hold one buffer twice

    return jax.jit(init)


class GradAccumulator(NamedTuple):
    """Sums over the first chunks of a micro-batch."""

    chunks: jax.Array  # [] int32: how many
    loss: jax.Array  # [] float32: their part of the mean loss
    grads: Params  # their part of its gradient


def make_train_step(config: Config, mesh: Mesh | None = None) -> Any:
    """Builds the jitted micro-step.

    On a mesh, each device computes the gradient of its rows, in the same number of chunks. The optimizer sees the state
    as one device does.

    Returns:
        (state, ids [B, T + 1] int32) -> (state, metrics), with `lower` as `jax.jit` has it. The state is donated: its
        buffers are reused, except on an Apple GPU. Every `grad_accum_steps` micro-batches with finite gradients make
        one optimizer step.
    """
    devices, chunks = sharding.device_count(mesh), config.batch_size // config.chunk_size
    # with one gradient a step, its sum over the replicas can begin while the rest of it is computed
    sums_at_once = sharding.replica_count(mesh) > 1 and config.grad_accum_steps == chunks == 1
    gathers = sharding.fsdp_size(mesh) > 1 or sums_at_once
    gather = sharding.Gather(config.model, sums_at_once) if gathers else None
    replicas = 1 if sums_at_once else sharding.replica_count(mesh)
    optimizer = make_optimizer(config, replicas, mesh)
    schedule = make_schedule(config.optimizer, config.max_steps)

    def start(params: Params) -> GradAccumulator:
        return GradAccumulator(jnp.int32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, params))

    def accumulate_chunk(params: Params, accumulator: GradAccumulator, ids_BT: jax.Array) -> GradAccumulator:
        tokens, rows = (ids_BT.size - len(ids_BT)) * devices, config.chunk_size // devices
        chunk_BT = jax.lax.dynamic_slice_in_dim(ids_BT, accumulator.chunks * rows, rows)
        inputs_BT, targets_BT = chunk_BT[:, :-1], chunk_BT[:, 1:]

        def gradient(params: Params, grads: Params) -> tuple[jax.Array, Params]:
            gather_block = (gather.block,) if gather else ()
            return loss_and_gradient(config.model, params, inputs_BT, targets_BT, 1 / tokens, grads, *gather_block)

        run = partial(gather.gradient, gradient) if gather else gradient
        loss_sum, grads = run(params, accumulator.grads)
        return GradAccumulator(accumulator.chunks + 1, accumulator.loss + loss_sum / tokens, grads)

    def update(state: TrainState, accumulator: GradAccumulator) -> tuple[TrainState, Metrics]:
        params, opt_state, average, ratios = optimizer.step(
            accumulator.grads, state.opt_state, state.params, state.average
        )
        skipped_now = opt_state.skip_state["should_skip"]
        updated, batches = opt_state.gradient_step > state.step, state.batches + 1
        loss_sum = state.loss_sum + jnp.where(skipped_now, 0, accumulator.loss)
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
            update_ratios=ratios,
        )
        return TrainState(params, opt_state, batches, in_a_row, jnp.where(updated, 0, loss_sum), average), metrics

    device_ops = ops.get(config.model.implementation)
    if not mesh:
        return device_ops.train_step(start, accumulate_chunk, update, chunks)
    shapes = jax.eval_shape(partial(init_state, config, mesh))
    shardings = sharding.state_shardings(config.model, mesh, shapes), NamedSharding(mesh, PartitionSpec())
    spread = partial(_spread, config, mesh, replicas)
    return device_ops.train_step(start, accumulate_chunk, update, chunks, spread=spread, out_shardings=shardings)


def _spread(config: Config, mesh: Mesh, replicas: int, accumulate: Any) -> Any:
    """Runs `accumulate` (params, ids) -> GradAccumulator on each device, for its part of the parameters and its rows.

    The loss is that of all devices. With several replicas, the gradients have a leading axis for the part of each.
    """
    leading = [sharding.DATA] * (replicas > 1)

    def local(params: Params, ids_BT: jax.Array) -> GradAccumulator:
        chunks, loss, grads = accumulate(params, ids_BT)
        grads = jax.tree.map(lambda leaf: leaf[None], grads) if leading else grads
        return GradAccumulator(chunks, jax.lax.psum(loss, mesh.axis_names), grads)

    in_specs = sharding.param_specs(config.model), sharding.ROWS
    out_specs: Any = PartitionSpec(), PartitionSpec(), sharding.param_specs(config.model, *leading)
    return sharding.over_devices(local, mesh, in_specs, GradAccumulator(*out_specs))


def make_eval_step(config: Config, mesh: Mesh | None = None) -> jax.stages.Wrapped:
    """Builds the jitted evaluation step: (params, inputs [B, T], targets [B, T]) -> `model.loss`.

    On a mesh, each device computes the loss of its rows.
    """
    if not mesh:
        return jax.jit(partial(loss, config.model))

    gather = sharding.Gather(config.model)

    def local(params: Params, inputs_BT: jax.Array, targets_BT: jax.Array) -> jax.Array:
        loss_sum = loss(config.model, params | gather.others(params), inputs_BT, targets_BT, gather.block)
        return jax.lax.psum(loss_sum, mesh.axis_names)

    specs = sharding.param_specs(config.model), sharding.ROWS, sharding.ROWS
    return jax.jit(sharding.over_devices(local, mesh, specs, PartitionSpec()))
