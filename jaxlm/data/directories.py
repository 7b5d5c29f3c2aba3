"""Which directory of token files a run reads."""

import dataclasses
import difflib
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlm.config import Config
from jaxlm.data.corpus import same_corpus
from jaxlm.data.encode import prepare_command
from jaxlm.data.token_files import TRAIN, VAL, read_meta
from jaxlm.errors import UsageError


def data_directory(config: Config) -> Path:
    """The directory of the config's token files: `data.dir`, or one under data/ named after corpus, tokenizer and size.

    The name gets a hash of corpus and split if the corpus's is shortened, or if the directory without it holds another
    corpus or split. Raises UsageError if the meta.json of that directory is damaged.
    """
    data = config.data
    if data.dir:
        return Path(data.dir)
    name = re.sub(r"\W+", "-", data.corpus).strip("-")
    own = "own-" * (data.tokenizer == "own")
    directory = Path("data", f"{name[:60]}-{own}{config.model.vocab_size}")
    meta = read_meta(directory)
    if len(name) > 60 or (meta and not meta.is_of(data.corpus, data.val_fraction)):
        digest = hashlib.sha256(os.fsencode(f"{data.corpus} {data.val_fraction}")).hexdigest()
        return directory.with_name(f"{directory.name}-{digest[:8]}")
    return directory


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
        command = prepare_command(text, directory, config.model.vocab_size, data.val_fraction, data.tokenizer)
        raise UsageError(f"data.dir {directory} has no {' and no '.join(missing)}: {hint} them: {command}")
    if corpus_is_named and (meta := read_meta(directory)) and not same_corpus(meta.source, data.corpus):
        raise UsageError(
            f"data.dir {directory} has the tokens of {meta.source}, not of {data.corpus}: set only one of data.corpus"
            " and data.dir, or two that belong together"
        )


def own_directory(saved: Mapping[str, Any], config: Config) -> Path | None:
    """The directory of the tokens of a run with the `saved` settings; None if `config` names another corpus."""
    data = saved.get("data") or dataclasses.asdict(config.data)
    if not same_corpus(str(data.get("corpus")), config.data.corpus):
        return None
    as_saved = dataclasses.replace(config.data, corpus=data["corpus"], dir=str(data.get("dir", "")))
    return data_directory(dataclasses.replace(config, data=as_saved))
