"""The texts of the study, split once and for all: ten whole novels are held out.

The files hold novels between `<|endoftext|>` marks. The ten whose sha256 is smallest are the validation text. That
rule looks at nothing but the texts, and was fixed before the first run.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from jaxlm.data.corpus import Corpus
from jaxlm.data.encode import write_token_files
from jaxlm.data.readers import TextChunk, read_chunks
from jaxlm.data.token_files import TokenFiles, open_tokens, read_meta

HELD_OUT = 10


def held_out_corpus(files: Sequence[Path], held_out: int = HELD_OUT) -> Corpus:
    """The documents of `files`, with those of the `held_out` smallest sha256 as validation text."""
    documents: list[list[TextChunk]] = []
    for chunk in read_chunks(files):
        if chunk.starts_document:
            documents.append([])
        documents[-1].append(chunk)
    hashes = [hashlib.sha256("".join(chunk.text for chunk in document).encode()).hexdigest() for document in documents]
    validation = set(sorted(hashes)[:held_out])

    def read(is_validation: bool) -> Iterator[TextChunk]:
        return chain.from_iterable(
            document
            for document, sha256 in zip(documents, hashes, strict=True)
            if (sha256 in validation) == is_validation
        )

    return Corpus("study", tuple(files), partial(read, False), partial(read, True))


def prepare(files: Sequence[Path], directory: Path, tokenizer: str, vocab_size: int, context: int) -> TokenFiles:
    """The token files of the study in `directory`, which are written if they are missing."""
    if read_meta(directory) is None:
        write_token_files(held_out_corpus(files), directory, vocab_size, 0.5)
    return open_tokens(directory, vocab_size, context)
