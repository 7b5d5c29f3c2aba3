"""How arrays are spread over a mesh of devices. Every function takes None for one device alone.

A mesh has the axes DATA and FSDP. A micro-batch is split by its rows over both. Parameters, and all that is like them
in the state, are split over FSDP along the axis that the table of parameters declares. A device gathers what it needs
of them, block by block, and the gradients are summed over FSDP and split again. Over DATA the gradients of the
micro-batches of an optimizer step are summed once, by the optimizer: until then, each index of DATA has its own.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.config import ModelConfig
from jaxlm.core.parameters import Parameter, Params, by_path, tree_of

DATA, FSDP = "data", "fsdp"
ROWS = PartitionSpec((DATA, FSDP))  # of a batch

Blocks = Mapping[str, jax.Array]  # the parameters of one block
Gradient = Callable[[Params, Params], tuple[jax.Array, Params]]  # params, accumulator -> loss_sum, accumulator


def device_count(mesh: Mesh | None) -> int:
    """Devices of a mesh."""
    return mesh.size if mesh else 1


def replica_count(mesh: Mesh | None) -> int:
    """Parts of a step's gradients that are summed once a step: the size of DATA."""
    return mesh.shape[DATA] if mesh else 1


def fsdp_size(mesh: Mesh | None) -> int:
    """Parts of each parameter."""
    return mesh.shape[FSDP] if mesh else 1


def over_devices(function: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """`jax.shard_map` over all axes: `function` sees the part of one device, and may use collectives."""
    if hasattr(jax, "shard_map"):
        return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    from jax.experimental.shard_map import shard_map  # of jax 0.4.34

    return shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_rep=False)


def param_specs(config: ModelConfig, *leading: str) -> Params:
    """How each parameter is split; `leading` names the mesh axes of axes in front of its own."""
    return tree_of(config, lambda parameter: PartitionSpec(*leading, *[None] * parameter.fsdp_axis, FSDP))


def state_shardings(config: ModelConfig, mesh: Mesh, state: Any) -> Any:
    """The sharding of each array of a training state (or of its shapes). What is not like a parameter is replicated."""
    table = by_path(config)

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        parameter = table.get(names[-2:]) or table.get(names[-1:])
        return NamedSharding(mesh, _spec_like(parameter, leaf.shape) if parameter else PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, state)


def _spec_like(parameter: Parameter, shape: tuple[int, ...]) -> PartitionSpec:
    """Of an array like a parameter; one with an axis more holds the gradients of each index of DATA."""
    leading = [DATA] * (len(shape) - len(parameter.shape))
    is_split = shape[len(leading) + parameter.fsdp_axis] == parameter.shape[parameter.fsdp_axis]
    return PartitionSpec(*leading, *[None] * parameter.fsdp_axis, *[FSDP] * is_split)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(part: jax.Array, axis: int, dtype: Any) -> jax.Array:
    """The whole of an array that is split over FSDP along `axis`, rounded to `dtype`. Its gradient is summed and split,
    in the dtype of the array."""
    return jax.lax.all_gather(part.astype(dtype), FSDP, axis=axis, tiled=True).astype(part.dtype)


_gather.defvjp(
    lambda part, axis, dtype: (_gather(part, axis, dtype), None),
    lambda axis, dtype, _, d_whole: (jax.lax.psum_scatter(d_whole, FSDP, scatter_dimension=axis, tiled=True),),
)


def gather_block(config: ModelConfig, p: Blocks) -> Blocks:
    """The whole parameters of one block, on a device that has its part of them."""
    return {name: _gather_parameter(config, by_path(config)["blocks", name], leaf) for name, leaf in p.items()}


def gather_others(config: ModelConfig, others: Params) -> Params:
    """The whole parameters that are in no block."""
    return {name: _gather_parameter(config, by_path(config)[name,], leaf) for name, leaf in others.items()}


def _gather_parameter(config: ModelConfig, parameter: Parameter, leaf: jax.Array) -> jax.Array:
    """Gathered in the dtype of the matmuls, if nothing else reads it: half the bytes, and no other result."""
    only_matmuls = parameter.kind == "matrix" or (
        parameter.kind == "embedding" and config.activation_dtype == config.matmul_dtype
    )
    dtype = config.matmul_dtype if only_matmuls else jnp.float32
    return _gather(leaf, parameter.fsdp_axis - parameter.stacked, dtype)


def gather_gradient(config: ModelConfig, gradient: Gradient, params: Params, accumulator: Params) -> Any:
    """`gradient(params, accumulator)`, for the parts of one device.

    `gradient` gets the parts of the blocks, which it gathers one by one, and all else whole.
    """
    others, sums = ({name: leaf for name, leaf in tree.items() if name != "blocks"} for tree in (params, accumulator))
    whole, scatter = jax.vjp(partial(gather_others, config), others)
    loss_sum, grads = gradient(params | whole, accumulator | jax.tree.map(jnp.zeros_like, whole))
    (parts,) = scatter({name: grads[name] for name in others})
    return loss_sum, grads | jax.tree.map(jnp.add, sums, parts)
