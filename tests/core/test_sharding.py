"""Training on a mesh of devices: the tests of sharding_on_eight.py, in a process that has eight."""

import pytest

from jaxlm.config import ModelConfig
from jaxlm.core.parameters import parameter_table
from tests.eight_devices import run_tests

FILE = "core/sharding_on_eight.py"


@pytest.mark.slow
def test_a_mesh_trains_as_one_device():
    run_tests(FILE)


@pytest.mark.slow
def test_every_kind_of_mesh_trains_as_one_device():
    run_tests(FILE, "-m", "slow")


def test_neither_the_layers_nor_the_vocabulary_are_split():
    for parameter in parameter_table(ModelConfig(qk_norm=True, tied=False)):
        assert parameter.fsdp_axis == (0 if parameter.path == ("norm",) else 1)
