"""The model card of an exported model."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlm.config import Config, to_dict
from jaxlm.storage.jsonl import rows_up_to

# settings that say how the run was computed, watched and saved, not what the model is
_NOT_OF_THE_MODEL = (
    *("microbatch_chunks", "eval_interval", "save_interval", "save_minutes", "generation_interval"),
    *("max_checkpoints", "keep_every", "max_nonfinite_microbatches", "platform", "deterministic", "sample"),
    *("model.implementation", "model.remat", "data.exclude", "data.dir", "data.eval_sequences"),
)
_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- jaxlm
---

# A language model of {parameters:,} parameters

{architecture}'s architecture, trained with jaxlm. Load this folder with `transformers`:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

| | |
|---|---|
| sizes | {model.layers} layers, {model.heads} heads, width {model.width}, MLP width {model.mlp_width}, \
context {model.context}, vocabulary {model.vocab_size:,} ({tokenizer}) |
| initialised from | {start} |
| text | {text} |
| trained | {step:,} of {steps:,} steps, {tokens:,} tokens |
| training loss | {loss} |
| validation loss | {val_loss} |

The model continues texts like those it was trained on. It does not follow instructions, and its statements may be
false.

The settings that it was trained with:

```json
{settings}
```
"""


def model_card(workdir: Path, config: Config, step: int, meta: Mapping[str, Any], parameters: int) -> str:
    """The card, in Markdown, of the model after `step` of the run in `workdir`; `meta` is that of its checkpoint.

    A card may be published, so it has only the last part of each path, and not that of a home directory.
    """
    rows = list(rows_up_to(workdir / "metrics.jsonl", step))
    corpus = "" if config.data.dir else base_names(config.data.corpus)  # `dir` may be of another
    data = dataclasses.replace(config.data, corpus=corpus)
    config = dataclasses.replace(config, data=data, init_from=base_name(config.init_from))
    return _CARD.format(
        parameters=parameters,
        architecture="Qwen3" if config.model.qk_norm else "Llama",
        config=config,
        model=config.model,
        tokenizer="GPT-2's" if config.data.tokenizer == "gpt2" else "learnt from the text",
        start=config.init_from or f"random weights, seed {config.seed}",
        text=_text(meta),
        step=step,
        steps=max(step, config.max_steps),  # a run may end early, by a smaller max_steps
        tokens=step * config.tokens_per_step,
        loss=_last(rows, {"loss": "nats per token"}),
        val_loss=_last(rows, {"val_loss": "nats per token", "val_bits_per_byte": "bits per byte"}),
        settings=json.dumps(_settings(config), indent=2, ensure_ascii=False),
    )


def _settings(config: Config) -> dict[str, Any]:
    settings = to_dict(config)
    for name in _NOT_OF_THE_MODEL:
        group, _, last = name.rpartition(".")
        del (settings[group] if group else settings)[last]
    return settings


def text_name(meta: Mapping[str, Any]) -> str:
    """What the model was trained on, without the folders of files. Checkpoints of earlier versions lack it."""
    source = meta.get("source", {})
    if "text" in source:
        return base_names(source["text"])
    return f"token files in {base_name(source['tokens'])}" if source else "not recorded"


def _text(meta: Mapping[str, Any]) -> str:
    """`text_name` with hashes."""
    hashes = {key: value for key, value in meta.get("source", {}).items() if key == "sha256"} | meta.get("tokens", {})
    return f"{text_name(meta)} ({', '.join(f'{key} {value}' for key, value in hashes.items())})"


def base_names(corpus: str) -> str:
    """The names of a corpus's files without their folders."""
    return ",".join(base_name(path) for path in re.split(r"(?<!\\),", corpus))


def base_name(path: str) -> str:
    """The last part of a path; ~ for a home directory, which may be a person's name."""
    absolute = os.path.abspath(path)
    return path and ("~" if absolute == os.path.expanduser("~") else os.path.basename(absolute))


def _last(rows: Sequence[Mapping[str, Any]], units: Mapping[str, str]) -> str:
    """The last recorded values of these keys with their units, and the step at which they were recorded."""
    last = next((row for row in reversed(rows) if row.keys() >= units.keys()), None)
    if last is None:
        return "not recorded"
    values = [f"{last[key]:.4f} {unit}" for key, unit in units.items()]
    return f"{', '.join(values)} (step {last['step']:,})"
