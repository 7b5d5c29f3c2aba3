"""Runs on a mesh of devices: the tests of mesh_on_eight.py, in a process that has eight."""

import pytest

from tests.eight_devices import run_tests


@pytest.mark.slow
def test_runs_on_meshes_are_those_on_one_device():
    run_tests("run/mesh_on_eight.py")
