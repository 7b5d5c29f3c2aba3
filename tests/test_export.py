"""The folder of the trained model."""

import json
import resource

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_run import listing

from jaxlm.config import ModelConfig
from jaxlm.export import write_model
from jaxlm.model import init_params

CONFIG = ModelConfig(vocab_size=300, context=16, layers=3, heads=2, width=16, hidden=24, dtype="float32")


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


def test_tensors_are_the_parameters(tmp_path, params):
    folder = write_model(tmp_path / "final_model", CONFIG, params)
    tensors = load_file(folder / "model.safetensors")
    assert tensors.keys() == {"embedding", "norm"} | {f"blocks.{name}" for name in params["blocks"]}
    for name, tensor in tensors.items():
        expected = params["blocks"][name.removeprefix("blocks.")] if "." in name else params[name]
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, expected)


def test_sizes_and_tokenizer_lie_beside_them(tmp_path, params):
    folder = write_model(tmp_path / "final_model", CONFIG, params)
    assert ModelConfig(**json.loads((folder / "config.json").read_text())) == CONFIG
    assert (folder / "gpt2.tiktoken").read_bytes().startswith(b"IQ== 0\n")


def test_a_folder_is_replaced_as_a_whole(tmp_path, params):
    folder = write_model(tmp_path / "final_model", CONFIG, params)
    (folder / "stale.txt").write_text("of an earlier version")
    doubled = jax.tree.map(lambda leaf: leaf * 2, params)
    assert write_model(folder, CONFIG, doubled) == folder
    assert not (folder / "stale.txt").exists()
    np.testing.assert_array_equal(load_file(folder / "model.safetensors")["norm"], params["norm"] * 2)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("room", [100, 20_000])
def test_on_a_full_disk_the_folder_stays_as_it_was(tmp_path, params, room):
    folder = write_model(tmp_path / "final_model", CONFIG, params)
    before = listing(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(Exception, match=r"(?i)too large"):
            write_model(folder, CONFIG, jax.tree.map(lambda leaf: leaf * 2, params))
        with pytest.raises(Exception, match=r"(?i)too large"):
            write_model(tmp_path / "new_model", CONFIG, params)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert listing(folder) == before
    assert not (tmp_path / "new_model").exists()
    write_model(tmp_path / "new_model", CONFIG, params)
    assert sorted(path.name for path in (tmp_path / "new_model").iterdir()) == sorted(p.name for p in folder.iterdir())
