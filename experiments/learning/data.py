"""The texts of the study, split once and for all: ten whole novels are held out.

The files hold novels between `<|endoftext|>` marks. The ten whose sha256 is smallest are the validation text. That
rule looks at nothing but the texts, and was fixed before the first run.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from jaxlm.config import Config
from jaxlm.data.corpus import Corpus, files_sha256, open_corpus
from jaxlm.data.encode import write_token_files
from jaxlm.data.readers import TextChunk, read_chunks
from jaxlm.data.token_files import TokenFiles, open_tokens, read_meta
from jaxlm.errors import UsageError

STUDY = "study"  # the name of the corpus
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

    return Corpus(STUDY, tuple(files), partial(read, False), partial(read, True))


def prepare_tokens(config: Config, files: Sequence[Path] | None, directory: Path) -> TokenFiles:
    """The tokens of `files`, or (None) of the config's own corpus, in a part of `directory`; written if missing.

    Raises UsageError if that part holds the tokens of other files.
    """
    data, vocab_size = config.data, config.model.vocab_size
    source = STUDY if files else open_corpus(data.corpus).source
    part = directory / f"{source}-{data.tokenizer}-{vocab_size}"
    meta = read_meta(part)
    if meta and files and meta.source_sha256 != files_sha256(files):
        raise UsageError(f"{part} has the tokens of other texts: choose another --data")
    if not meta:
        corpus = held_out_corpus(files) if files else open_corpus(data.corpus)
        write_token_files(corpus, part, vocab_size, data.val_fraction, tokenizer=data.tokenizer)
    return open_tokens(part, vocab_size, config.model.context, data.tokenizer)
