"""Prompts to new tokens, for prompts of any lengths."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.core import ops
from jaxlm.core.parameters import Params
from jaxlm.core.sampling import NOT_FINITE, SamplingParams, decode, next_window_keys, prefill, sequence_keys

PROMPT_BUCKET = 16  # prompts are padded to a multiple of this, so that few lengths are compiled
SLIDING_CHUNK = 64  # tokens that one program decodes if the window may slide


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

    The model reads a window of each sequence. When the window fills the context, it slides (see `window_start`): the
    cache is filled again with the window's last half, at the positions from 0 on.

    Args:
        config, weights, params: as for `prefill` and `decode`.
        prompts: token ids, at least one each.
        key: random key; each sequence derives its own from it and its index.
        tokens: new tokens of each sequence, at most.
        end_of_text: its id.
        chunk: yields the tokens that all sequences have, after each `chunk` tokens; None: all at once.
        indices: of the sequences; None: 0, 1, 2 and so on.

    Yields:
        [len(prompts), N] int32, `end_of_text` from the end of each sequence on. It stops when all have ended.
    """
    sequences = [_Sequence(list(ids), len(ids), window_start(len(ids), config.context), tokens) for ids in prompts]
    indices_N = np.array(indices or range(len(prompts)), np.int32)
    yielded = 0
    for _ in _extend(config, weights, sequences, params, key, indices_N, end_of_text, chunk):
        new = [sequence.ids[sequence.prompt :] for sequence in sequences]
        open_lengths = [len(ids) for ids, sequence in zip(new, sequences, strict=True) if sequence.left]
        ready = min(open_lengths, default=max(map(len, new)))
        if not open_lengths or (chunk and ready > yielded):
            columns = [ids[yielded:ready] + [end_of_text] * (ready - max(len(ids), yielded)) for ids in new]
            yield np.array(columns, np.int32)
            yielded = ready


def window_start(length: int, context: int) -> int:
    """Where the window of a sequence of `length` tokens starts.

    It follows from the slides: each time the window has `context` tokens, it becomes its last context // 2.
    """
    shift = context - context // 2
    return 0 if length < context else ((length - context) // shift + 1) * shift


@dataclass
class _Sequence:
    """A sequence that is continued."""

    ids: list[int]  # the prompt and the new tokens
    prompt: int  # tokens of the prompt
    start: int  # of the window
    left: int  # tokens that it may still get; 0 once it has ended

    @property
    def window(self) -> list[int]:
        return self.ids[self.start :]

    def room(self, context: int) -> int:
        """How many tokens it may get before the window slides."""
        return min(self.left, context - len(self.window))

    def add(self, new: list[int], end_of_text: int) -> None:
        """Appends tokens, up to the end of the sequence."""
        ends = [i for i, token in enumerate(new, 1) if token in (end_of_text, NOT_FINITE)]
        self.ids += new[: ends[0]] if ends else new
        self.left = 0 if ends else self.left - len(new)


def _extend(
    config: ModelConfig,
    weights: Params,
    sequences: Sequence[_Sequence],
    params: SamplingParams,
    key: jax.Array,
    indices_N: np.ndarray,
    end_of_text: int,
    chunk: int | None,
) -> Iterator[None]:
    """Adds tokens to the sequences until they have ended; yields after each call of `decode`.

    A sequence whose window is full waits for the others, so that the windows slide together: from then on they have one
    length. Where the first windows end depends on the prompts, so this changes no token.
    """
    context, lengths = config.context, [len(sequence.window) for sequence in sequences]
    longest_new = max(sequence.left for sequence in sequences)
    width, half_width = _bucket(max(lengths)), _bucket(context // 2)
    # the same for all prompts of a bucket, so that they share a program
    count = min(longest_new, context + PROMPT_BUCKET - 1 - _bucket(min(lengths)))
    slides = width + longest_new > context
    step = chunk or (min(count, SLIDING_CHUNK) if slides else count)
    slots = max(width + -(-count // step) * step, slides * (half_width + context - context // 2))
    rows = len(sequences) + -len(sequences) % ops.get(config.implementation).row_multiple
    keys_B = sequence_keys(key, np.resize(indices_N, rows))
    while True:
        windows = [sequence.window if sequence.left else [] for sequence in sequences]
        state = prefill(config, weights, *_aligned(windows, rows, width), keys_B, slots - width)
        while any(sequence.room(context) for sequence in sequences):
            state, tokens_BN = decode(config, weights, state, params, np.int32(end_of_text), step)
            for sequence, row in zip(sequences, np.asarray(tokens_BN).tolist(), strict=False):
                sequence.add(row[: sequence.room(context)], end_of_text)
            yield
        if not any(sequence.left for sequence in sequences):
            return
        for sequence in sequences:
            sequence.start = window_start(len(sequence.ids), context)
        keys_B, width = next_window_keys(keys_B, np.int32(context)), half_width


def _bucket(length: int) -> int:
    return -(-length // PROMPT_BUCKET) * PROMPT_BUCKET


def _aligned(windows: Sequence[Sequence[int]], rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The ids at the right ends of `rows` rows of `width`, and the length of each."""
    ids_BP, lengths_B = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
    for row, ids in enumerate(windows):
        ids_BP[row, width - len(ids) :], lengths_B[row] = ids, len(ids)
    return ids_BP, lengths_B


def up_to_end(ids: np.ndarray, end_of_text: int) -> np.ndarray:
    """The ids before the first `end_of_text`. Raises FloatingPointError if the logits were not finite."""
    ends = np.flatnonzero(ids == end_of_text)
    new_tokens = ids[: ends[0]] if len(ends) else ids
    if NOT_FINITE in new_tokens:
        raise FloatingPointError("the model's logits are not finite")
    return new_tokens
