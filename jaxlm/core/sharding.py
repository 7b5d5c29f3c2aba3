"""How arrays are spread over a mesh of devices. Every function takes None for one device alone.

A mesh has the axes DATA and FSDP. A micro-batch is split by its rows over both. Parameters, and all that is like them
in the state, are split over FSDP along the axis that the table of parameters declares. A device gathers what it needs
of them, block by block, and the gradients are summed over FSDP and split again. Over DATA the gradients of the
micro-batches of an optimizer step are summed once, by the optimizer: until then, each index of DATA has its own.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

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


def state_specs(config: ModelConfig, state: Any) -> Any:
    """How each array of a training state (or of its shapes) is split. What is not like a parameter is replicated."""
    table = by_path(config)

    def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        parameter = table.get(names[-2:]) or table.get(names[-1:])
        return _spec_like(parameter, leaf.shape) if parameter else PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, state)


def state_shardings(config: ModelConfig, mesh: Mesh, state: Any) -> Any:
    """The sharding of each array of a training state (or of its shapes)."""
    specs = state_specs(config, state)
    return jax.tree.map(lambda _, spec: NamedSharding(mesh, spec), state, specs)


def _spec_like(parameter: Parameter, shape: tuple[int, ...]) -> PartitionSpec:
    """Of an array like a parameter; one with an axis more holds the gradients of each index of DATA."""
    leading = [DATA] * (len(shape) - len(parameter.shape))
    is_split = shape[len(leading) + parameter.fsdp_axis] == parameter.shape[parameter.fsdp_axis]
    return PartitionSpec(*leading, *[None] * parameter.fsdp_axis, *([FSDP] if is_split else []))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(part: jax.Array, axis: int, dtype: Any, sums_data: bool) -> jax.Array:
    """The whole of an array that is split over FSDP along `axis`, rounded to `dtype`.

    Its gradient is summed over FSDP and split, with `sums_data` also summed over DATA, in the dtype of the array.
    """
    if jax.lax.psum(1, FSDP) == 1:
        return part
    return jax.lax.all_gather(part.astype(dtype), FSDP, axis=axis, tiled=True).astype(part.dtype)


def _gather_backward(axis, dtype, sums_data, _, d_part):
    if jax.lax.psum(1, FSDP) > 1:
        d_part = jax.lax.psum_scatter(d_part, FSDP, scatter_dimension=axis, tiled=True)
    return (jax.lax.psum(d_part, DATA) if sums_data else d_part,)


_gather.defvjp(lambda part, *static: (_gather(part, *static), None), _gather_backward)


class Gather(NamedTuple):
    """Makes whole parameters on a device from its part of them. Their gradients become parts again."""

    config: ModelConfig
    sums_data: bool = False  # whether the gradients are summed over DATA too, each as soon as it is computed

    def block(self, p: Blocks) -> Blocks:
        """The parameters of one block."""
        return {name: self._parameter(by_path(self.config)["blocks", name], leaf) for name, leaf in p.items()}

    def others(self, params: Params) -> Params:
        """Those of `params` that are in no block."""
        table = by_path(self.config)
        return {name: self._parameter(table[name,], leaf) for name, leaf in params.items() if name != "blocks"}

    def _parameter(self, parameter: Parameter, leaf: jax.Array) -> jax.Array:
        """Gathered in the dtype of the matmuls, if nothing else reads it: half the bytes, and no other result."""
        c = self.config
        of_rows = parameter.kind == "embedding" and c.activation_dtype == c.matmul_dtype
        dtype = c.matmul_dtype if parameter.kind == "matrix" or of_rows else jnp.float32
        return _gather(leaf, parameter.fsdp_axis - parameter.stacked, dtype, self.sums_data)

    def gradient(self, gradient: Gradient, params: Params, accumulator: Params) -> tuple[jax.Array, Params]:
        """`gradient(params, accumulator)`, for parts. It is given those of the blocks, and all else whole."""
        whole, scatter = jax.vjp(self.others, params)
        loss_sum, grads = gradient(params | whole, accumulator | jax.tree.map(jnp.zeros_like, whole))
        (parts,) = scatter({name: grads[name] for name in whole})
        sums = {name: accumulator[name] + parts[name] for name in whole}
        return loss_sum, grads | sums
