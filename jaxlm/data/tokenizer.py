"""GPT-2's byte-pair encoding, read from the vocabulary file in this package; a prefix of it is a small vocabulary."""

import base64
import copy
import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from importlib import resources
from typing import Protocol

import numpy as np
import numpy.typing as npt
import tiktoken

from jaxlm.errors import UsageError

END_OF_TEXT = "<|endoftext|>"
GPT2_VOCAB_SIZE = 50257
_SMALLEST_VOCAB_SIZE = 257  # the 256 bytes and END_OF_TEXT
_VOCABULARY_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
# The words of tiktoken's pattern for GPT-2. Here all that needs no look ahead is one group, which the engine then runs
# as an automaton instead of trying its parts in turn.
_WORD_PATTERN = r"""(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+$)|\s+(?!\S)|\s"""


class TokenizerProtocol(Protocol):
    """Text to token ids and back: jaxlm's own Tokenizer, or another model's."""

    @property
    def end_of_text(self) -> int: ...

    def encode(self, text: str) -> npt.NDArray[np.integer]: ...

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str: ...


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back. `vocabulary[i]` is the bytes of id i; the last id is END_OF_TEXT."""

    vocabulary: tuple[bytes, ...]
    encoding: tiktoken.Encoding

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary)

    @property
    def end_of_text(self) -> int:
        return len(self.vocabulary) - 1

    def copy(self) -> "Tokenizer":
        """The same, for one thread: those that share an encoding wait for the memory that its pattern is matched in."""
        return dataclasses.replace(self, encoding=copy.copy(self.encoding))

    def encode(self, text: str, marked: bool = False) -> npt.NDArray[np.uint16]:
        """Ids of `text`, [N]. END_OF_TEXT inside it is ordinary text, or the id `end_of_text` if `marked`.

        A lone surrogate, which UTF-8 cannot hold, becomes "?".
        """
        special = {END_OF_TEXT} if marked else set()
        try:
            ids = self.encoding.encode_to_numpy(text, allowed_special=special, disallowed_special=())
        except UnicodeEncodeError:
            return self.encode(text.encode(errors="replace").decode(), marked)
        return ids.astype(np.uint16)

    def decode_bytes(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> bytes:
        """The bytes that `ids`, [N], stand for. Raises IndexError for an id outside the vocabulary."""
        return b"".join([self.vocabulary[i] for i in ids])

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        """The text of `ids`, [N]; bytes that are not whole UTF-8 characters become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def names(self) -> list[str]:
        """Each token in the characters that GPT-2's vocab.json and all that descend from it write bytes with."""
        spelling = _byte_characters()
        return ["".join([spelling[byte] for byte in token]) for token in self.vocabulary[:-1]] + [END_OF_TEXT]

    def merges(self) -> list[tuple[int, int]]:
        """The pairs of ids that byte-pair encoding joins, the first first; each makes the next token's id."""
        ids = {token: index for index, token in enumerate(self.vocabulary[:-1])}
        return [_parents(token, ids) for token in ids if len(token) > 1]


def _parents(token: bytes, ids: dict[bytes, int]) -> tuple[int, int]:
    """The two tokens that `token` was made of: what byte-pair encoding with the tokens before it leaves of it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ids.get(parts[i] + parts[i + 1], len(ids)) for i in range(len(parts) - 1)]
        first = pairs.index(min(pairs))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return ids[parts[0]], ids[parts[1]]


def _byte_characters() -> dict[int, str]:
    """GPT-2's character for each byte: its Latin-1 one where that can be seen, else one from U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {byte: chr(0x100 + i) for i, byte in enumerate(unseen)}


@functools.cache
def load_tokenizer(vocab_size: int = GPT2_VOCAB_SIZE) -> Tokenizer:
    """GPT-2's tokenizer, or the one its first `vocab_size - 1` tokens make.

    Raises UsageError when `vocab_size` is not 257 to 50257 or the packaged vocabulary is damaged.
    """
    if not _SMALLEST_VOCAB_SIZE <= vocab_size <= GPT2_VOCAB_SIZE:
        raise UsageError(f"vocab_size is {vocab_size}: choose one from {_SMALLEST_VOCAB_SIZE} to {GPT2_VOCAB_SIZE}")
    tokens = _read_vocabulary()[: vocab_size - 1]
    encoding = tiktoken.Encoding(
        f"gpt2-{vocab_size}",
        pat_str=_WORD_PATTERN,
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens={END_OF_TEXT: vocab_size - 1},
    )
    return Tokenizer((*tokens, END_OF_TEXT.encode()), encoding)


def _read_vocabulary() -> list[bytes]:
    """GPT-2's 50,256 mergeable tokens in the order of their ids, which is the order of the merges."""
    packaged = resources.files("jaxlm.data").joinpath("gpt2.tiktoken")
    raw = packaged.read_bytes() if packaged.is_file() else b""
    if hashlib.sha256(raw).hexdigest() != _VOCABULARY_SHA256:
        raise UsageError(f"the vocabulary {packaged} is missing or damaged: reinstall jaxlm")
    return [base64.b64decode(line.split()[0]) for line in raw.splitlines()]


def encode_prompts(tokenizer: TokenizerProtocol, prompts: Sequence[str], context: int) -> list[list[int]]:
    """The token ids of each prompt; an empty one is the end-of-text token, behind which a text begins.

    Raises:
        UsageError: a prompt leaves no room in the context, or is not UTF-8 (a shell hands on any bytes).
    """
    for prompt in prompts:
        if prompt != prompt.encode(errors="replace").decode():
            raise UsageError(f"the prompt {prompt[:20]!r}... is not UTF-8 text: check the terminal's encoding")
    encoded = [[int(i) for i in tokenizer.encode(prompt)] or [tokenizer.end_of_text] for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if len(ids) >= context:
            raise UsageError(
                f"the prompt {prompt[:20]!r}... is {len(ids)} tokens long: this model's context of {context} tokens"
                f" leaves room for {context - 1} and a token to write"
            )
    return encoded
