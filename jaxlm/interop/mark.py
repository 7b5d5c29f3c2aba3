"""The mark of a weights file that jaxlm wrote: its metadata hold the SHA-256 of its tensors.

A file whose tensors have the recorded hash is jaxlm's and may be replaced. Any other is a person's.
"""

import hashlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

KEY = "jaxlm.sha256"  # in the metadata


class Mark(NamedTuple):
    """The hash in the metadata of a weights file and that of its tensors; None: absent or unreadable."""

    recorded: str | None = None
    actual: str | None = None

    @property
    def sound(self) -> bool:
        """Whether jaxlm wrote the file and nobody changed its tensors."""
        return self.recorded is not None and self.recorded == self.actual


def tensors_sha256(names: Iterable[str], read: Callable[[str], np.ndarray]) -> str:
    """The SHA-256 of the tensors `read(name)` with their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name in sorted(names):
        tensor = np.ascontiguousarray(read(name))
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        digest.update(tensor.data)
    return digest.hexdigest()
