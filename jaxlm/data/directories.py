"""Which directory of token files a run reads."""

import dataclasses
import difflib
import glob
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlm.config import Config
from jaxlm.data.corpus import same_corpus, source_sha256
from jaxlm.data.encode import TRAINING_FLAGS, find_prepared, prepare_command
from jaxlm.data.token_files import TRAIN, VAL, read_meta
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UsageError


def data_directory(config: Config, vocabulary: Tokenizer | None = None) -> Path:
    """The directory of the config's token files: `data.dir`, or one under data/ named after corpus, tokenizer and size.

    The name gets a hash of text, split and `vocabulary` (see `find_prepared`) if the corpus's is shortened, or if the
    directory without it holds other tokens, which stay. Raises UsageError if the text cannot be read.
    """
    data, (directory, is_shortened) = config.data, plain_directory(config)
    if data.dir:
        return Path(data.dir)
    if not is_shortened and _fits(directory, config, vocabulary):
        return directory
    text = source_sha256(data.corpus, data.exclude)
    parts = [data.corpus, str(data.val_fraction), text, *(vocabulary.names() if vocabulary else [])]
    digest = hashlib.sha256(os.fsencode(" ".join(parts))).hexdigest()
    return directory.with_name(f"{directory.name}-{digest[:8]}")


def plain_directory(config: Config) -> tuple[Path, bool]:
    """The directory under data/ without a hash, and whether the name of the corpus is shortened in it."""
    name = re.sub(r"\W+", "-", config.data.corpus).strip("-")
    own = "own-" * (config.data.tokenizer == "own")
    return Path("data", f"{name[:60]}-{own}{config.model.vocab_size}"), len(name) > 60


def _fits(directory: Path, config: Config, vocabulary: Tokenizer | None) -> bool:
    """Whether a directory holds exactly the tokens of the config, or none and is for a vocabulary learnt from them."""
    data, size = config.data, config.model.vocab_size
    request = data.corpus, directory, size, data.val_fraction, TRAINING_FLAGS, data.tokenizer, data.exclude, vocabulary
    try:
        return find_prepared(*request) is not None or vocabulary is None
    except UsageError:
        return False


def check_named_directory(config: Config, corpus_is_named: bool) -> None:
    """Raises UsageError if `data.dir` lacks a token file, or if the corpus is named and the files are of another.

    Files without meta.json may be of any corpus.
    """
    data, directory = config.data, Path(config.data.dir)
    if missing := [name for name in (TRAIN, VAL) if not os.path.isfile(directory / name)]:
        parent = directory.parent
        siblings = [path.parent.name for path in parent.glob(f"*/{TRAIN}")] if os.path.isdir(parent) else []
        nearest = difflib.get_close_matches(directory.name, siblings, 1)
        hint = f"did you mean {parent / nearest[0]}? This command prepares" if nearest else "prepare"
        text = data.corpus or "TEXT"
        size = config.model.vocab_size
        command = prepare_command(text, directory, size, data.val_fraction, data.tokenizer, data.exclude)
        raise UsageError(f"data.dir {directory} has no {' and no '.join(missing)}: {hint} them: {command}")
    if corpus_is_named and (meta := read_meta(directory)) and not same_corpus(meta.source, data.corpus):
        raise UsageError(
            f"data.dir {directory} has the tokens of {meta.source}, not of {data.corpus}: set only one of data.corpus"
            " and data.dir, or two that belong together"
        )


def own_directory(saved: Mapping[str, Any], config: Config, train_sha256: str | None = None) -> Path | None:
    """The directory of the tokens of a run with the `saved` settings; None if `config` names another corpus.

    Under data/, it is the one with a train.bin of this hash, or if there is none, the one that `data_directory` gives.
    """
    data = saved.get("data") or dataclasses.asdict(config.data)
    if not same_corpus(str(data.get("corpus")), config.data.corpus):
        return None
    as_saved = dataclasses.replace(config.data, corpus=data["corpus"], dir=str(data.get("dir", "")))
    config = dataclasses.replace(config, data=as_saved)
    directory = plain_directory(config)[0]
    hashed = directory.parent.glob(f"{glob.escape(directory.name)}-{'[0-9a-f]' * 8}")
    places = [] if as_saved.dir else [directory, *sorted(hashed)]
    return next((place for place in places if _train_sha256(place) == train_sha256), None) or data_directory(config)


def _train_sha256(directory: Path) -> str:
    """The hash of train.bin that meta.json says; empty without it."""
    try:
        meta = read_meta(directory)
    except UsageError:
        return ""
    return meta.train.sha256 if meta else ""
