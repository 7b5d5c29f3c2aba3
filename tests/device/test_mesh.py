"""The mesh of a run: its size, and the errors of a person's settings."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxlm.config import Config, MeshConfig, ModelConfig
from jaxlm.device import mesh
from jaxlm.device.mesh import local_rows, make_mesh, resolve_mesh
from jaxlm.errors import UsageError
from tests.tiny_run import is_one_line

CPU = jax.devices("cpu")[0]
MODEL = ModelConfig(vocab_size=257, context=16, layers=2, heads=3, width=24, mlp_width=40)


@pytest.fixture
def eight(monkeypatch):
    """Makes jax report eight devices; a Mesh is then the array of them."""
    devices = [SimpleNamespace(platform="cpu", device_kind="cpu", id=number) for number in range(8)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(mesh, "Mesh", lambda devices, axes: np.vectorize(lambda device: device.id)(devices).tolist())
    return devices[0]


def test_one_device_has_no_mesh():
    assert make_mesh(Config(), CPU) is None


def test_a_mesh_takes_the_devices_that_are_left_over(eight):
    def ids(data, fsdp):
        return make_mesh(Config(model=MODEL, mesh=MeshConfig(data, fsdp)), eight)

    assert ids(-1, 1) == [[number] for number in range(8)]
    assert ids(-1, 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert ids(2, 1) == [[0], [1]]
    assert ids(1, 1) is None


def test_what_does_not_divide_is_named(eight):
    def error(**settings):
        with pytest.raises(UsageError) as raised:
            make_mesh(Config(**{"model": MODEL, "batch_size": 24, **settings}), eight)
        assert is_one_line(raised.value)
        return str(raised.value)

    assert error(mesh=MeshConfig(-1, 3)) == "mesh.fsdp is 3, which does not divide the number of devices here, 8"
    assert "mesh.data 4 x mesh.fsdp 4 is 16 devices, and 8 are here" in error(mesh=MeshConfig(4, 4), batch_size=16)
    every = {"mesh": MeshConfig(8, 1)}
    assert "batch_size 12 is not divisible among 8 devices: choose a multiple of 8" in error(**every, batch_size=12)
    assert "in 2 microbatch_chunks: choose a multiple of 16" in error(**every, microbatch_chunks=2)
    wrong = error(mesh=MeshConfig(1, 5), batch_size=5)
    assert "mesh.fsdp 5 does not divide axis 1 of the parameter embedding, which is 24" in wrong
    assert "one device" in error(model=ModelConfig(implementation="apple"))


@pytest.mark.parametrize(("batch_size", "fsdp", "data"), [(12, 1, 6), (32, 1, 8), (7, 1, 7), (12, 2, 3), (11, 1, 1)])
def test_by_default_as_many_devices_train_as_divide_the_batch(eight, batch_size, fsdp, data):
    config = resolve_mesh(Config(model=MODEL, batch_size=batch_size, mesh=MeshConfig(-1, fsdp)), eight)
    assert config.mesh == MeshConfig(data, fsdp)


def test_devices_of_another_kind_are_left_alone(eight, monkeypatch):
    small = SimpleNamespace(platform="cpu", device_kind="small", id=8)
    monkeypatch.setattr(jax, "devices", lambda: [eight, small])
    assert make_mesh(Config(model=MODEL), eight) is None


def test_a_process_has_the_rows_of_its_devices():
    def rows(*slices):
        places = dict(enumerate((each,) for each in slices))
        return local_rows(SimpleNamespace(addressable_devices_indices_map=lambda shape: places), 8)

    assert rows(slice(None)) == slice(0, 8)
    assert rows(slice(6, None), slice(4, 6)) == slice(4, 8)
    assert rows(slice(2, 4), slice(2, 4)) == slice(2, 4)
    with pytest.raises(UsageError, match="not in one piece"):
        rows(slice(0, 2), slice(4, 6))


def test_a_mesh_has_devices():
    with pytest.raises(UsageError, match=r"mesh\.data is 0"):
        MeshConfig(data=0)
