"""Byte-level BPE tokenizers. GPT-2's is in this package, and its first tokens are a smaller vocabulary."""

import base64
import copy
import dataclasses
import functools
import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Protocol

import numpy as np
import numpy.typing as npt
import tiktoken

from jaxlm.config import SMALLEST_VOCABULARY, TOKENIZERS, check_vocab_size
from jaxlm.errors import UsageError

END_OF_TEXT = "<|endoftext|>"
GPT2_VOCAB_SIZE = TOKENIZERS["gpt2"]
_VOCABULARY_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
# Equivalent to tiktoken's pattern for GPT-2, but faster: everything without a lookahead is one group, which the regex
# engine compiles to an automaton.
_WORD_PATTERN = r"""(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+$)|\s+(?!\S)|\s"""
_LONG_RUN = 1 << 18  # blanks in a row; tiktoken's regex engine fails on a million that precede other text
_BLANK = r"[^\S\x1c-\x1f]"  # the engine's \s, in Python's syntax
_INVISIBLE = [byte for byte in range(256) if byte == 0x20 or not chr(byte).isprintable()]
_BYTE_CHARACTERS = {byte: 0x100 + i for i, byte in enumerate(_INVISIBLE)}  # the other bytes are spelled in Latin-1
_CHARACTER_BYTES = {character: byte for byte, character in _BYTE_CHARACTERS.items()}


class TokenizerProtocol(Protocol):
    """What sampling needs of a tokenizer: jaxlm's own `Tokenizer`, or that of an imported model."""

    @property
    def end_of_text(self) -> int: ...

    def encode(self, text: str) -> npt.NDArray[np.integer]: ...

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str: ...


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A byte-level BPE tokenizer with GPT-2's pattern.

    `vocabulary[i]` holds the bytes of id i. The single bytes come first, then each merge of two tokens before it, in
    the order in which text is merged; the last id is END_OF_TEXT.
    """

    vocabulary: tuple[bytes, ...]
    encoding: tiktoken.Encoding

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary)

    @property
    def end_of_text(self) -> int:
        return len(self.vocabulary) - 1

    def copy(self) -> "Tokenizer":
        """A copy for another thread: threads that share an encoding wait for its regex engine's scratch memory."""
        return dataclasses.replace(self, encoding=copy.copy(self.encoding))

    def encode(self, text: str, marked: bool = False) -> npt.NDArray[np.uint16]:
        """Ids of `text`, [N]. END_OF_TEXT inside it is ordinary text, or the id `end_of_text` if `marked`.

        A lone surrogate, which UTF-8 does not allow, is encoded as "?". A text with a long run of blanks is encoded in
        parts, cut where the pattern splits it anyway, so that its ids are those of the whole.
        """
        special = {END_OF_TEXT} if marked else set()
        if cuts := _cuts(text, marked):
            parts = itertools.pairwise([0, *cuts, len(text)])
            return np.concatenate([self.encode(text[start:end], marked) for start, end in parts])
        try:
            ids = self.encoding.encode_to_numpy(text, allowed_special=special, disallowed_special=())
        except UnicodeEncodeError:
            return self.encode(text.encode(errors="replace").decode(), marked)
        return ids.astype(np.uint16)

    def decode_bytes(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> bytes:
        """The bytes of `ids`, [N]. Raises IndexError for an id outside the vocabulary."""
        return b"".join([self.vocabulary[i] for i in ids])

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        """The text of `ids`, [N]; invalid or incomplete UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def names(self) -> list[str]:
        """Each token as GPT-2's vocab.json spells it, with one printable character for each byte."""
        names = [token.decode("latin-1").translate(_BYTE_CHARACTERS) for token in self.vocabulary[:-1]]
        return [*names, END_OF_TEXT]

    def merges(self) -> list[str]:
        """The lines of GPT-2's merges.txt: the names of two tokens that are merged into the next one."""
        names = self.names()
        ids = {token: index for index, token in enumerate(self.vocabulary[:-1])}
        return [" ".join([names[ids[part]] for part in merged_from(token, ids)]) for token in ids if len(token) > 1]

    def to_bytes(self) -> bytes:
        """The vocabulary as tiktoken's text format has it: a line for each id but the last, its bytes in base64."""
        return _to_text(self.vocabulary[:-1])


def _cuts(text: str, marked: bool) -> list[int]:
    """Where to cut `text`: before the last blank of each long run. The pattern joins that blank to what follows.

    Blanks at the end, or before a marked END_OF_TEXT, are one match, and the regex engine does not backtrack there.
    """
    block = _LONG_RUN // 2  # each long run contains a whole block; blocks are faster to test
    if not any(text[start : start + block].isspace() for start in range(0, len(text), block)):
        return []
    runs = re.finditer(rf"(?<!{_BLANK}){_BLANK}{{{_LONG_RUN},}}(?={_BLANK}(?!{_BLANK}).)", text, re.DOTALL)
    return [run.end() for run in runs if not (marked and text.startswith(END_OF_TEXT, run.end() + 1))]


def merged_from(token: bytes, ids: Mapping[bytes, int]) -> list[bytes]:
    """The two tokens that merge into `token`, its byte-pair encoding by the tokens before it; empty if there are none.

    `ids` are the tokens before it, or all tokens of a vocabulary that has it.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        ranks = [ids.get(left + right, len(ids)) for left, right in itertools.pairwise(parts)]
        first = ranks.index(min(ranks))
        if ranks[first] == len(ids):
            return []
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts


@functools.cache
def load_tokenizer(vocab_size: int = GPT2_VOCAB_SIZE) -> Tokenizer:
    """GPT-2's tokenizer, reduced to its first `vocab_size - 1` tokens and END_OF_TEXT.

    Raises UsageError if `vocab_size` is not 257 to 50257 or the packaged vocabulary is damaged.
    """
    check_vocab_size("gpt2", vocab_size, "vocab_size")
    return make_tokenizer(_gpt2_tokens()[: vocab_size - 1])


def make_tokenizer(tokens: Sequence[bytes]) -> Tokenizer:
    """The tokenizer of these tokens, which are those of `Tokenizer.vocabulary` but for END_OF_TEXT."""
    encoding = tiktoken.Encoding(
        f"jaxlm-{len(tokens) + 1}",
        pat_str=_WORD_PATTERN,
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens={END_OF_TEXT: len(tokens)},
    )
    return Tokenizer((*tokens, END_OF_TEXT.encode()), encoding)


def token_of(name: str) -> bytes:
    """The token that `Tokenizer.names` spells so. Raises ValueError if `name` has a character above them."""
    return name.translate(_CHARACTER_BYTES).encode("latin-1")


def from_bytes(raw: bytes) -> Tokenizer:
    """The tokenizer whose `to_bytes` is `raw`. Raises ValueError if there is none."""
    tokens = _from_text(raw)
    if len(tokens) < SMALLEST_VOCABULARY - 1 or _to_text(tokens) != raw:
        raise ValueError("it is not a vocabulary as jaxlm writes it")
    return make_tokenizer(tokens)


def _to_text(tokens: Sequence[bytes]) -> bytes:
    return b"".join([b"%b %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)])


def _from_text(raw: bytes) -> list[bytes]:
    return [base64.b64decode(line.partition(b" ")[0]) for line in raw.splitlines()]


def _gpt2_tokens() -> list[bytes]:
    """GPT-2's 50,256 mergeable tokens in the order of their ids, which is the order of the merges."""
    packaged = resources.files("jaxlm.data").joinpath("gpt2.tiktoken")
    raw = packaged.read_bytes() if packaged.is_file() else b""
    if hashlib.sha256(raw).hexdigest() != _VOCABULARY_SHA256:
        raise UsageError(f"the vocabulary {packaged} is missing or damaged: reinstall jaxlm")
    return _from_text(raw)


def encode_prompts(tokenizer: TokenizerProtocol, prompts: Sequence[str], context: int) -> list[list[int]]:
    """The token ids of each prompt. An empty prompt becomes the end-of-text token, which precedes every document.

    Raises UsageError if a prompt fills the whole context, or is not UTF-8 (shells pass any bytes).
    """
    encoded = []
    for prompt in prompts:
        if prompt != prompt.encode(errors="replace").decode():
            raise UsageError(f"the prompt {prompt[:20]!r}... is not UTF-8 text: check the terminal's encoding")
        encoded.append([int(i) for i in tokenizer.encode(prompt)] or [tokenizer.end_of_text])
        if (length := len(encoded[-1])) >= context:
            raise UsageError(
                f"the prompt {prompt[:20]!r}... is {length} tokens long: this model's context of {context} tokens"
                f" has room for at most {context - 1}"
            )
    return encoded
