"""What a run writes down."""

import json
import os

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import SessionLog

from configs import m2_60m
from jaxlm.config import from_config_dict
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.run.events import EvaluationEvent, SamplesEvent, StepEvent
from jaxlm.run.records import TOKEN_BYTES, Records, TensorBoard, append_session, record_bytes
from tests.storage.test_tensorboard import events
from tests.tiny_run import disk_room


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_records_continue_the_files_after_the_step(tmp_path):
    for name in ("metrics.jsonl", "samples.jsonl"):
        (tmp_path / name).write_text("".join(f'{{"step": {step}, "was": "here"}}\n' for step in (1, 2, 3)))
    records = Records(tmp_path, 2)
    records(StepEvent(3, 1.5, 3e-4, 0.5, 96, 32.0, 9.0, 1.0, 7.0, EvaluationEvent(3, 1.25, 2.5)))
    records(EvaluationEvent(3, 1.25, 2.5))
    records(SamplesEvent(3, (("é\n", "é\n\x1bcb"),)))
    metrics, samples = (read(tmp_path / name) for name in ("metrics.jsonl", "samples.jsonl"))  # before they are closed
    records.close()
    earlier = [{"step": 1, "was": "here"}, {"step": 2, "was": "here"}]
    row = {"step": 3, "loss": 1.5, "lr": 3e-4, "grad_norm": 0.5, "tokens": 96, "tokens_per_second": 32.0}
    assert metrics == [*earlier, row | {"seconds": 9.0, "val_loss": 1.25, "val_bits_per_byte": 2.5}]
    assert samples == [*earlier, {"step": 3, "prompt": "é\n", "text": "é\n\x1bcb"}]


def written(directory, config, steps, number, text):
    """Bytes that these steps write, with `number()` in each field and `text(prompt)` after each prompt."""
    directory.mkdir()
    records, tensorboard = Records(directory, 0), TensorBoard(directory, 0)
    prompts = config.sample.prompts
    for step in range(1, steps + 1):
        evaluation = EvaluationEvent(step, number(), number()) if step % config.eval_interval == 0 else None
        tokens = step * config.tokens_per_step
        numbers = [number() for _ in range(3)], [number(), number(), 1.0, 1.0]
        events = [StepEvent(step, *numbers[0], tokens, *numbers[1], evaluation)]
        if step % config.generation_interval == 0 or step == steps:
            chosen = [prompts[i % len(prompts)] for i in range(config.sample.texts)]
            events.append(SamplesEvent(step, tuple((prompt, prompt + text()) for prompt in chosen)))
        for event in events:
            records(event)
            tensorboard(event)
    records.close()
    tensorboard.close()
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("vocab_size", [257, 300, 4096, 50_257])
@pytest.mark.parametrize("tokens", [1, 60])
def test_random_texts_at_every_step_stay_below_the_room_for_records(tmp_path, vocab_size, tokens):
    sample = {"tokens": tokens, "prompts": ["a", '\x01"\\é 日本 \x1b[0m' * 3]}
    intervals = {"eval_interval": 1, "generation_interval": 1}
    config = from_config_dict({"model": {"vocab_size": vocab_size}, "sample": sample, **intervals})
    rng, tokenizer = np.random.default_rng(0), load_tokenizer(vocab_size)

    def text():
        return tokenizer.decode(rng.integers(0, vocab_size, tokens))

    assert written(tmp_path / "run", config, 50, lambda: -rng.random() * 1e-300, text) <= record_bytes(config, 50)


def test_the_room_for_the_records_of_the_preset_is_not_three_times_what_they_take(tmp_path):
    config, rng = from_config_dict(m2_60m.get_config()), np.random.default_rng(0)
    story = " and then the little girl saw a big dog in the park" * 5  # of 60 tokens
    size = written(tmp_path / "run", config, 1000, rng.random, lambda: story)
    assert size <= record_bytes(config, 1000) <= 3 * size


@pytest.mark.parametrize("interval", [1, 1000])  # with samples at each step, and at the last alone
def test_texts_of_the_assumed_length_and_long_numbers_fit_in_all_files(tmp_path, interval):
    config = from_config_dict({"eval_interval": 1, "generation_interval": interval, "sample": {"prompts": ["a"]}})
    text = "x" * (TOKEN_BYTES * config.sample.tokens)
    assert written(tmp_path / "run", config, 20, lambda: -1e-300 / 3, lambda: text) <= record_bytes(config, 20)


def test_sync_fails_while_the_rows_of_either_file_wait(tmp_path):
    for event in (StepEvent(1, 1.5, 3e-4, 0.5, 96, 32.0, 9.0, 1.0, 7.0), SamplesEvent(1, (("Once", "Once upon"),))):
        records = Records(tmp_path, 0)
        with disk_room(0):
            records(event)
            with pytest.raises(OSError):
                records.sync()
        records.sync()
        records.close()


def test_close_closes_both_files(tmp_path):
    before = os.listdir("/dev/fd")
    Records(tmp_path, 0).close()
    assert os.listdir("/dev/fd") == before


def test_tensorboard_replaces_events_after_the_step_only(tmp_path):
    TensorBoard(tmp_path, 7).close()
    _, start = events(tmp_path / "tensorboard")
    assert (start.step, start.session_log.status) == (8, SessionLog.START)  # the events of step 7 stay


def test_a_session_is_appended_after_one_that_was_cut_off(tmp_path):
    append_session(tmp_path, {"step": 0, "device": "a"})
    with (tmp_path / "sessions.jsonl").open("a") as file:
        file.write('{"step": 7, "dev')
    append_session(tmp_path, {"step": 5, "device": "é"})
    assert read(tmp_path / "sessions.jsonl") == [{"step": 0, "device": "a"}, {"step": 5, "device": "é"}]
