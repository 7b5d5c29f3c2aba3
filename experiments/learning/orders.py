"""Other orders of the training text than jaxlm's, which cuts it into windows and shuffles them.

`text` takes the windows in the order of the text, from a start that the seed draws. `documents` shuffles too, but cuts
each document from its own beginning, so that no window reaches into the next one; the rest of a document is dropped.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from jaxlm.data.token_files import Batch, Ids


def batches(order: str, ids: Ids, end_of_text: int, context: int, batch_size: int, seed: int) -> Iterator[Batch]:
    """An endless stream of batches [batch_size, context + 1] in this order.

    `end_of_text` is the mark between the documents of `ids`.
    """
    rng = np.random.default_rng(seed)
    starts_W = starts(order, ids, end_of_text, context)
    shift = rng.integers(len(starts_W))
    while True:
        epoch_W = np.roll(starts_W, -shift) if order == "text" else rng.permutation(starts_W)
        for first in range(0, len(epoch_W) - batch_size + 1, batch_size):
            rows = epoch_W[first : first + batch_size]
            yield np.stack([ids[start : start + context + 1] for start in rows]).astype(np.int32)


def starts(order: str, ids: Ids, end_of_text: int, context: int) -> npt.NDArray[np.int64]:
    """The first tokens of the windows, in the order of the text."""
    marks = np.flatnonzero(np.asarray(ids) == end_of_text) + 1 if order == "documents" else []
    bounds = [0, *marks, len(ids)]
    return np.concatenate([np.arange(begin, end - context, context) for begin, end in pairwise(bounds)])
