"""Prompts to new tokens, for prompts of any lengths."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.core import ops
from jaxlm.core.parameters import Params
from jaxlm.core.sampling import NOT_FINITE, SamplingParams, decode, prefill, sequence_keys

PROMPT_BUCKET = 16  # prompts are padded to a multiple of this, so that few lengths are compiled


def generate(
    config: ModelConfig,
    weights: Params,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    key: jax.Array,
    tokens: int,
    end_of_text: int,
    chunk: int | None = None,
    indices: Sequence[int] | None = None,
) -> Iterator[np.ndarray]:
    """Continues all prompts at once.

    Args:
        config, weights, params: as for `prefill` and `decode`.
        prompts: token ids, each shorter than the context.
        key: random key; each sequence derives its own from it and its index.
        tokens: new tokens of each sequence, at most. A sequence also ends where it fills the context.
        end_of_text: its id.
        chunk: yields so many tokens at a time; None: all at once.
        indices: of the sequences; None: 0, 1, 2 and so on.

    Yields:
        [len(prompts), chunk] int32, `end_of_text` from the end of each sequence on. It stops when all have ended.
    """
    lengths = np.array([len(ids) for ids in prompts], np.int32)
    shortest, longest = int(lengths.min()), int(lengths.max())
    count = min(tokens, config.context - shortest)
    # the same for all prompts of a bucket, so that they share a program
    max_count = min(tokens, config.context - 1 - (shortest - 1) // PROMPT_BUCKET * PROMPT_BUCKET)
    width = -(-longest // PROMPT_BUCKET) * PROMPT_BUCKET
    chunk = chunk or max_count
    rows = len(prompts) + -len(prompts) % ops.get(config.implementation).row_multiple
    ids_BP = np.zeros((rows, width), np.int32)
    for row, ids in zip(ids_BP, prompts, strict=False):
        row[width - len(ids) :] = ids
    lengths_B = np.pad(lengths, (0, rows - len(prompts)))
    indices_B = np.resize(indices or range(len(prompts)), rows).astype(np.int32)
    new_slots = -(-max_count // chunk) * chunk
    state = prefill(config, weights, ids_BP, lengths_B, sequence_keys(key, indices_B), new_slots)
    for start in range(0, count, chunk):
        state, tokens_BN = decode(config, weights, state, params, np.int32(end_of_text), chunk)
        new_tokens = np.asarray(tokens_BN)[: len(prompts), : count - start]
        yield new_tokens
        if (new_tokens[:, -1] == end_of_text).all():
            return


def up_to_end(ids: np.ndarray, end_of_text: int) -> np.ndarray:
    """The ids before the first `end_of_text`. Raises FloatingPointError if the logits were not finite."""
    ends = np.flatnonzero(ids == end_of_text)
    new_tokens = ids[: ends[0]] if len(ends) else ids
    if NOT_FINITE in new_tokens:
        raise FloatingPointError("the model's logits are not finite")
    return new_tokens
