"""GPT-2's byte-pair encoding, read from the vocabulary file in this package; a prefix of it is a small vocabulary."""

import base64
import copy
import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from importlib import resources

import numpy as np
import numpy.typing as npt
import tiktoken

from jaxlm.errors import RequestError

END_OF_TEXT = "<|endoftext|>"
GPT2_VOCAB_SIZE = 50257
_SMALLEST_VOCAB_SIZE = 257  # the 256 bytes and END_OF_TEXT
_VOCABULARY_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
# The words of tiktoken's pattern for GPT-2. Here all that needs no look ahead is one group, which the engine then runs
# as an automaton instead of trying its parts in turn.
_WORD_PATTERN = r"""(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+$)|\s+(?!\S)|\s"""


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


@functools.cache
def load_tokenizer(vocab_size: int = GPT2_VOCAB_SIZE) -> Tokenizer:
    """GPT-2's tokenizer, or the one its first `vocab_size - 1` tokens make.

    Raises RequestError when `vocab_size` is not 257 to 50257 or the packaged vocabulary is damaged.
    """
    if not _SMALLEST_VOCAB_SIZE <= vocab_size <= GPT2_VOCAB_SIZE:
        raise RequestError(f"vocab_size is {vocab_size}: choose one from {_SMALLEST_VOCAB_SIZE} to {GPT2_VOCAB_SIZE}")
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
    packaged = resources.files("jaxlm").joinpath("gpt2.tiktoken")
    raw = packaged.read_bytes() if packaged.is_file() else b""
    if hashlib.sha256(raw).hexdigest() != _VOCABULARY_SHA256:
        raise RequestError(f"the vocabulary {packaged} is missing or damaged: reinstall jaxlm")
    return [base64.b64decode(line.split()[0]) for line in raw.splitlines()]
