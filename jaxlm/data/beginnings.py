"""Prompts that are the beginnings of the text's own paragraphs."""

import re

from jaxlm.config import PROMPTS
from jaxlm.data.token_files import TokenFiles
from jaxlm.data.tokenizer import END_OF_TEXT

WORDS, COUNT = 3, 20
LONGEST = 40  # characters
_READ = 200_000  # tokens of the validation text
_SEPARATORS = (r"\n\s*\n", r"\n", r"(?<=[.!?])\s")  # of paragraphs, lines, sentences


def beginnings(tokens: TokenFiles) -> tuple[str, ...]:
    """The first words of COUNT paragraphs of the validation text, evenly spaced and all different.

    Where it has fewer paragraphs, they are those of lines, or else of sentences, at most COUNT. PROMPTS, if there are
    none.
    """
    text = tokens.tokenizer.decode(tokens.val[:_READ]).replace(END_OF_TEXT, "\n\n")
    starts: list[str] = []
    for separator in _SEPARATORS:
        starts = list(dict.fromkeys(filter(None, map(_first_words, re.split(separator, text)[1:]))))
        if len(starts) >= COUNT:
            break
    count = min(len(starts), COUNT)
    return tuple(starts[i * len(starts) // count] for i in range(count)) or PROMPTS


def _first_words(paragraph: str) -> str:
    """The first words of a paragraph that has more words; "" if it has not, or if they are long or no text."""
    words = paragraph.split()
    start = " ".join(words[:WORDS])
    return start if len(words) > WORDS and len(start) <= LONGEST and start.isprintable() and start[0].isalpha() else ""
