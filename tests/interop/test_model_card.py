import dataclasses
import json
import re

import pytest

from jaxlm.config import Config, DataConfig, to_dict
from jaxlm.interop.model_card import model_card
from jaxlm.storage.jsonl import to_line

CONFIG = Config(max_steps=2000, data=DataConfig(corpus="", dir="tokens"))
ROWS = [
    {"step": 1100, "loss": 2.5, "val_loss": 3.0, "val_bits_per_byte": 1.25},
    {"step": 1101, "loss": 2.25},
    {"step": 1102, "loss": 9.0, "val_loss": 9.0, "val_bits_per_byte": 9.0},
]


TOKENS = {"train_sha256": "ab", "val_sha256": "cd"}
META = {"tokens": TOKENS, "source": {"text": "mine.txt,ours.txt", "sha256": "ef"}}


OTHERS = {  # than the model: settings and groups
    *("microbatch_chunks", "eval_interval", "save_interval", "save_minutes", "generation_interval", "max_checkpoints"),
    *("keep_every", "max_nonfinite_microbatches", "platform", "deterministic", "sample"),
    *("implementation", "remat", "exclude", "dir", "eval_sequences"),
}


def flat(settings, *groups):
    """The values by their names with those of their groups."""
    values = {}
    for name, value in settings.items():
        values |= flat(value, *groups, name) if isinstance(value, dict) else {(*groups, name): value}
    return values


def table_of(workdir, config, meta=META):
    card = model_card(workdir, config, 1101, meta, 59_294_720)
    assert "# A language model of 59,294,720 parameters\n" in card
    settings = json.loads(re.search("```json\n(.*?)```", card, re.DOTALL)[1])
    assert flat(settings) == {name: value for name, value in flat(to_dict(config)).items() if not OTHERS & set(name)}
    return dict(re.findall(r"(?m)^\| ([^|]+) \| ([^|]+) \|$", card))


def test_the_card_describes_the_training_up_to_its_step(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(map(to_line, ROWS)))
    assert table_of(tmp_path, CONFIG) == {
        "sizes": "8 layers, 8 heads, width 512, MLP width 2048, context 1024, vocabulary 50,257 (GPT-2's)",
        "initialised from": "random weights, seed 0",
        "text": "mine.txt,ours.txt (sha256 ef, train_sha256 ab, val_sha256 cd)",
        "trained": "1,101 of 2,000 steps, 72,155,136 tokens",
        "training loss": "2.2500 nats per token (step 1,101)",
        "validation loss": "3.0000 nats per token, 1.2500 bits per byte (step 1,100)",
    }


@pytest.mark.parametrize(("qk_norm", "architecture"), [(False, "Llama"), (True, "Qwen3")])
def test_the_card_names_the_architecture(tmp_path, qk_norm, architecture):
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, qk_norm=qk_norm))
    assert f"\n{architecture}'s architecture, trained" in model_card(tmp_path, config, 1101, META, 1)


def test_losses_without_metrics_are_not_recorded(tmp_path):
    table = table_of(tmp_path, CONFIG)
    assert (table["training loss"], table["validation loss"]) == ("not recorded", "not recorded")


@pytest.mark.parametrize(
    ("row", "changes", "expected"),
    [
        ("initialised from", {"init_from": "llama"}, "llama"),
        ("initialised from", {"seed": 7}, "random weights, seed 7"),
    ],
)
def test_the_card_names_the_first_weights(tmp_path, row, changes, expected):
    assert table_of(tmp_path, dataclasses.replace(CONFIG, **changes))[row] == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"text": "/home/john/ours.txt, ../b/*.txt", "sha256": "ef"}, "ours.txt,*.txt (sha256 ef, "),
        ({"text": r"/home/x, y.txt,a\,b/c\,d.txt", "sha256": "ef"}, r"x, y.txt,c\,d.txt (sha256 ef, "),
        ({"text": "novels", "sha256": "ef"}, "novels (sha256 ef, "),
        ({"tokens": "/home/john/tokens"}, "token files in tokens ("),
        (None, "not recorded ("),
    ],
)
def test_the_card_names_the_text_of_the_tokens_and_not_of_the_config(tmp_path, source, expected):
    meta = {"tokens": TOKENS} | ({"source": source} if source else {})
    assert table_of(tmp_path, CONFIG, meta)["text"] == f"{expected}train_sha256 ab, val_sha256 cd)"


def test_the_card_has_no_folders(tmp_path):
    data = DataConfig(corpus="/home/john/a.txt,/home/john/b/", exclude=("/home/john/c",), dir="/home/john/tokens")
    config = dataclasses.replace(CONFIG, data=data, init_from="/home/john/llama/")
    meta = {"tokens": TOKENS, "source": {"text": "/home/john/a.txt,/home/john/b/", "sha256": "ef"}}
    card = model_card(tmp_path, config, 1101, meta, 59_294_720)
    assert "john" not in card
    for name in ("| a.txt,b (", "| llama |", '"llama"'):
        assert name in card


def test_the_card_does_not_name_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/john")
    config = dataclasses.replace(CONFIG, data=DataConfig(corpus="/home/john"), init_from="/home/john/")
    card = model_card(tmp_path, config, 1101, {"tokens": TOKENS, "source": {"text": "/home/john", "sha256": "e"}}, 1)
    assert "john" not in card


def test_the_settings_name_the_corpus_only_if_its_tokens_were_read(tmp_path):
    for directory, corpus in (("tokens", ""), ("", "a.txt,b")):
        data = DataConfig(corpus="/home/john/a.txt,b/", dir=directory)
        card = model_card(tmp_path, dataclasses.replace(CONFIG, data=data), 1101, {"tokens": TOKENS}, 59_294_720)
        settings = json.loads(card.split("```json")[1].split("```")[0])
        assert settings["data"]["corpus"] == corpus
