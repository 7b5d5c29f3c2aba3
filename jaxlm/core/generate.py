"""Prompts to texts: the tokenizer around the sampling loop."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.core.sampling import SamplingParams, decode, prefill, sequence_keys

GPU_MULTIPLE = 8

PROMPT_BUCKET = 16  # prompts are padded to multiples of this, so that few lengths are ever compiled


def generate(
    config: ModelConfig,
    weights: Any,
    prompts: Sequence[Sequence[int]],
    choice: SamplingParams,
    key: jax.Array,
    tokens: int,
    end_of_text: int,
    chunk: int | None = None,
) -> Iterator[np.ndarray]:
    """Continues all prompts at once.

    Args:
        config: the model's sizes, its dtype resolved.
        weights: its parameters, as `model.prepare_decode_params` gives them.
        prompts: token ids, each shorter than the context.
        choice: how tokens are drawn.
        key: random key; each text draws from its own part of it.
        tokens: at most so many new ones a text; fewer where the context is full for the longest prompt.
        end_of_text: its id.
        chunk: hand out so many tokens at a time; None: all at once.

    Yields:
        [texts, chunk] int32, `end_of_text` from each text's end on.
    """
    lengths = np.array([len(ids) for ids in prompts], np.int32)
    longest = int(lengths.max())
    room = min(tokens, config.context - longest)
    width = -(-longest // PROMPT_BUCKET) * PROMPT_BUCKET
    # what the shortest prompts of this width have: one program for all of them
    most = min(tokens, config.context - 1 - (width - PROMPT_BUCKET))
    chunk = chunk or most
    rows = len(prompts) + (-len(prompts) % GPU_MULTIPLE if jax.default_backend() == "gpu" else 0)
    ids_BP = np.zeros((rows, width), np.int32)
    for row, ids in zip(ids_BP, prompts, strict=False):
        row[width - len(ids) :] = ids
    lengths_B = np.pad(lengths, (0, rows - len(prompts)))
    texts = prefill(config, weights, ids_BP, lengths_B, sequence_keys(key, rows), -(-most // chunk) * chunk)
    for index in range(-(-room // chunk)):
        texts, tokens_BN = decode(config, weights, texts, choice, np.int32(end_of_text), chunk)
        written = np.asarray(tokens_BN)[: len(prompts), : room - index * chunk]
        yield written
        if (written[:, -1] == end_of_text).all():
            return


def up_to_end(ids: np.ndarray, end_of_text: int) -> np.ndarray:
    """The ids before the first `end_of_text`."""
    ends = np.flatnonzero(ids == end_of_text)
    return ids[: ends[0]] if len(ends) else ids
