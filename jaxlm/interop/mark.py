"""How jaxlm knows a file that it wrote and nobody changed: weights and texts by the metadata of the weights, a model
card or a Modelfile by its last line.

Each holds the SHA-256 of the rest. A file that lacks it, or whose rest has another, is a person's.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

CARD_SEAL = "<!-- written by jaxlm, which keeps an edited card; sha256 {} -->"  # the last line of a model card
KEY, TEXTS_KEY = "jaxlm.sha256", "jaxlm.texts_sha256"  # in the metadata


class Mark(NamedTuple):
    """The hash in the metadata of a weights file and that of its tensors; None: absent or unreadable.

    `texts` are the hashes of the texts that jaxlm wrote beside the weights.
    """

    recorded: str | None = None
    actual: str | None = None
    texts: Sequence[str] = ()

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


def seal(text: str, line: str = CARD_SEAL) -> bytes:
    """The bytes of the text's file. Its last line has the hash of the rest, so an edit is recognised."""
    body = f"{text.rstrip()}\n".encode(errors="replace")  # it may name any file
    return body + _seal_line(body, line)


def is_sealed(data: bytes, line: str = CARD_SEAL) -> bool:
    """Whether the file is as `seal` wrote it."""
    body = data[: data.rfind(b"\n", 0, -1) + 1]
    return data == body + _seal_line(body, line)


def _seal_line(body: bytes, line: str) -> bytes:
    return f"{line.format(hashlib.sha256(body).hexdigest())}\n".encode()
