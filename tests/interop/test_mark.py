"""The marks of files that jaxlm wrote, which tell them from those that a person changed."""

import numpy as np
import pytest

from jaxlm.interop.mark import CARD_SEAL, Mark, is_sealed, seal, tensors_sha256

TENSORS = {"a": np.zeros((2, 3), np.float32), "b": np.ones(4, np.float32)}


def sha256(tensors):
    return tensors_sha256(tensors, tensors.__getitem__)


def test_the_order_and_the_layout_in_memory_do_not_matter():
    assert sha256(TENSORS) == sha256(dict(reversed(TENSORS.items())))
    assert sha256({"a": np.eye(3, 2).T}) == sha256({"a": np.ascontiguousarray(np.eye(3, 2).T)})


@pytest.mark.parametrize(
    "other",
    [
        {"a": TENSORS["a"].reshape(3, 2), "b": TENSORS["b"]},
        {"a": TENSORS["a"], "b": TENSORS["b"].view(np.int32)},
        {"a": TENSORS["a"], "c": TENSORS["b"]},
        {"a": TENSORS["a"], "b": TENSORS["b"] * np.float32(1 + 2**-23)},
        {"a": TENSORS["a"]},
    ],
)
def test_any_other_tensors_have_another_hash(other):
    assert sha256(other) != sha256(TENSORS)


def test_a_mark_is_sound_if_it_is_there_and_fits():
    assert [Mark(*pair).sound for pair in (("a", "a"), ("a", "b"), (None, "a"), ("a", None), (None, None))] == [
        True,
        *[False] * 4,
    ]


def test_a_card_is_sealed_and_any_edit_breaks_the_seal():
    for line in (CARD_SEAL, "# {}"):
        data = seal("# A card  \n\n", line)
        assert data.startswith(b"# A card\n" + line[:1].encode())
        assert is_sealed(data, line)
        for index in range(len(data)):
            assert not is_sealed(data[:index] + b"~" + data[index + 1 :], line)
            assert not is_sealed(data[:index], line)
