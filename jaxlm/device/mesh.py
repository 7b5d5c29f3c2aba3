"""The mesh: which devices a run is spread over, and where its arrays are."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxlm.config import Config, MeshConfig
from jaxlm.core.parameters import parameter_table
from jaxlm.core.sharding import DATA, FSDP, ROWS, state_shardings
from jaxlm.errors import UsageError


def resolve_mesh(config: Config, device: jax.Device) -> Config:
    """Replaces `mesh.data` -1 by the number of groups that the devices of one kind with `device` make.

    A run of one process leaves devices unused if the batch does not divide among all. Any other number stays, also if
    there are fewer devices. Raises UsageError if the devices, the batch or a parameter do not divide as the settings
    say.
    """
    data, fsdp, here = config.mesh.data, config.mesh.fsdp, len(_alike(device))
    if data == -1:
        data = here // fsdp
        if data * fsdp != here:
            raise UsageError(f"mesh.fsdp is {fsdp}, which does not divide the number of devices here, {here}")
        if jax.process_count() == 1:
            parts = config.batch_size // (config.microbatch_chunks or 1)
            data = next((fewer for fewer in range(data, 0, -1) if parts % (fewer * fsdp) == 0), data)
    config = dataclasses.replace(config, mesh=MeshConfig(data, fsdp))
    if config.mesh.devices > 1:
        _check_divides(config, config.mesh.devices)
    return config


def is_here(config: Config, device: jax.Device) -> bool:
    """Whether there are as many devices as `resolve_mesh` says."""
    return config.mesh.devices <= len(_alike(device))


def make_mesh(config: Config, device: jax.Device) -> Mesh | None:
    """The mesh of a run on the devices of one kind with `device`; None if that is one device.

    A run of one process may leave devices unused. Raises UsageError as `resolve_mesh`, or if there are other devices.
    """
    mesh, devices = resolve_mesh(config, device).mesh, _alike(device)
    count = mesh.devices
    if count > len(devices) or (count < len(devices) and jax.process_count() > 1):
        raise UsageError(
            f"mesh.data {mesh.data} x mesh.fsdp {mesh.fsdp} is {_devices(count)}, and {len(devices)} are here: set"
            " mesh.data to -1"
        )
    if mesh.fsdp > 1 and device.platform == "cpu" and jax.process_count() > 1:
        raise UsageError("mesh.fsdp of several processes needs GPUs, as gloo mixes up what CPUs gather: set it to 1")
    return Mesh(np.array(devices[:count]).reshape(mesh.data, mesh.fsdp), (DATA, FSDP)) if count > 1 else None


def share(config: Config) -> Config:
    """A resolved run as one of its devices would do it alone: with its rows of a micro-batch, and all parameters."""
    return dataclasses.replace(config, batch_size=config.batch_size // config.mesh.devices, mesh=MeshConfig(1, 1))


def _alike(device: jax.Device) -> list[jax.Device]:
    """The devices of one kind with `device`, of all processes."""
    here = [each for each in jax.devices() if each.platform == device.platform]
    return [each for each in here if each.device_kind == device.device_kind] if len(here) > 1 else [device]


def _check_divides(config: Config, count: int) -> None:
    chunks, fsdp = config.microbatch_chunks or 1, config.mesh.fsdp
    if config.batch_size % (count * chunks):
        parts = f" in {chunks} microbatch_chunks" if chunks > 1 else ""
        raise UsageError(
            f"batch_size {config.batch_size} is not divisible among {_devices(count)}{parts}: choose a multiple of"
            f" {count * chunks}, or fewer devices with mesh.data"
        )
    for parameter in parameter_table(config.model):
        if (size := parameter.shape[parameter.fsdp_axis]) % fsdp:
            raise UsageError(
                f"mesh.fsdp {fsdp} does not divide axis {parameter.fsdp_axis} of the parameter"
                f" {'/'.join(parameter.path)}, which is {size}: choose a divisor"
            )
    if config.model.implementation == "apple":
        raise UsageError("model.implementation apple is for one device: set mesh.data to 1")


def _devices(count: int) -> str:
    return f"{count} device{'s' * (count != 1)}"


def shardings(config: Config, mesh: Mesh | None, device: jax.Device, state: Any) -> Any:
    """Where each array of a training state (or of its shapes) is: on the mesh, or without one on `device`."""
    if mesh:
        return state_shardings(config.model, mesh, state)
    return jax.tree.map(lambda _: SingleDeviceSharding(device), state)


def batch_sharding(mesh: Mesh | None, device: jax.Device) -> Sharding:
    """Where a batch is: its rows are split over all devices, in order."""
    return NamedSharding(mesh, ROWS) if mesh else SingleDeviceSharding(device)


def local_rows(sharding: Sharding, rows: int) -> slice:
    """Which of the `rows` of a batch this process holds. Raises UsageError if they are not in one piece."""
    places = sharding.addressable_devices_indices_map((rows,)).values()
    parts = {index[0].indices(rows)[:2] for index in places if index}
    start, stop = min(first for first, _ in parts), max(last for _, last in parts)
    if stop - start != sum(last - first for first, last in parts):
        raise UsageError("the rows of this process are not in one piece: start the processes of a machine side by side")
    return slice(start, stop)


def place_rows(rows: np.ndarray, sharding: Sharding) -> jax.Array:
    """A batch on the devices of `batch_sharding`, from this process's rows of it."""
    if isinstance(sharding, SingleDeviceSharding):
        return jax.device_put(rows, sharding)
    return jax.make_array_from_process_local_data(sharding, rows)


def on_one_device(tree: Any) -> Any:
    """The whole arrays, each on one device of this process. All processes of a run call it together."""
    leaves = jax.tree.leaves(tree)
    if all(isinstance(leaf.sharding, SingleDeviceSharding) for leaf in leaves):
        return tree
    gathered = _gather_everywhere(leaves[0].sharding.mesh)(tree)
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), gathered)


@functools.cache
def _gather_everywhere(mesh: Mesh) -> jax.stages.Wrapped:
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))
