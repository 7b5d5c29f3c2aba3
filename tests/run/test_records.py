"""What a run writes down."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import SessionLog

from configs import m2_60m
from jaxlm.config import Config, OptimizerConfig, from_config_dict, to_dict
from jaxlm.core.parameters import leaves_by_path
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.run.events import EvaluationEvent, SamplesEvent, StepEvent
from jaxlm.run.records import (
    TOKEN_BYTES,
    Records,
    TensorBoard,
    append_session,
    flat_settings,
    record_bytes,
    step_scalars,
)
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
    records, tensorboard = Records(directory, 0), TensorBoard(directory, config, 0)
    prompts = config.sample.prompts
    for step in range(1, steps + 1):
        evaluation = EvaluationEvent(step, number(), number()) if step % config.eval_interval == 0 else None
        tokens = step * config.tokens_per_step
        numbers = [number() for _ in range(3)], [number(), number(), 1.0, 1.0]
        ratios = {kind: number() for kind in ("matrix", "embedding", "norm_scale")}
        events = [StepEvent(step, *numbers[0], tokens, *numbers[1], evaluation, ratios)]
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
    TensorBoard(tmp_path, Config(), 7).close()
    _, start, *_ = events(tmp_path / "tensorboard")
    assert (start.step, start.session_log.status) == (8, SessionLog.START)  # the events of step 7 stay


def test_a_session_is_appended_after_one_that_was_cut_off(tmp_path):
    append_session(tmp_path, {"step": 0, "device": "a"})
    with (tmp_path / "sessions.jsonl").open("a") as file:
        file.write('{"step": 7, "dev')
    append_session(tmp_path, {"step": 5, "device": "é"})
    assert read(tmp_path / "sessions.jsonl") == [{"step": 0, "device": "a"}, {"step": 5, "device": "é"}]


def test_the_settings_are_numbers_texts_and_switches():
    settings = flat_settings(Config())
    assert (settings["max_steps"], settings["model.qk_norm"], settings["optimizer.name"]) == (50_000, False, "adamw")
    assert "'The old man'" in settings["sample.prompts"]
    assert len(settings) == len(leaves_by_path(to_dict(Config())))


def test_the_learning_rate_of_muon_is_beside_that_of_adamw():
    event = StepEvent(3, 1.5, 3e-4, 0.5, 96, 32.0, 9.0, 1.0, 7.0, update_ratios={"matrix": 0.25})
    muon = OptimizerConfig(name="muon", learning_rate=6e-4, muon_learning_rate=0.02)
    assert "lr_muon" not in step_scalars(event, OptimizerConfig())
    row = step_scalars(event, muon)
    assert (row["lr"], row["lr_muon"], row["update_ratio_matrix"]) == (3e-4, pytest.approx(0.01), 0.25)


@pytest.mark.slow
def test_tensorboard_reads_a_resumed_run_without_double_points(tmp_path):
    """Through TensorBoard's own API: two sessions, the second from step 4, after the first was killed after step 6."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import TENSORS, EventAccumulator
    from tensorboard.plugins.hparams import metadata
    from tensorboard.util.tensor_util import make_ndarray

    config = from_config_dict(m2_60m.get_config())
    config = replace(config, optimizer=replace(config.optimizer, name="muon"))
    for first, last in ((1, 6), (5, 8)):
        listener = TensorBoard(tmp_path, config, first - 1)
        for step in range(first, last + 1):
            ratios = {"matrix": step / 100, "embedding": step / 200, "norm_scale": step / 300}
            listener(StepEvent(step, 10 / step, 3e-4, 0.5, 96 * step, 32.0, 9.0, 1.0, 7.0, None, ratios))
            if step % 2 == 0:
                listener(EvaluationEvent(step, 9 / step, 3 / step))
                listener(SamplesEvent(step, (("Once", f"Once {step}"), ("The", "The é"))))
        listener.close()
        os.rename(*event_file_and_older_name(tmp_path, first))
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={TENSORS: 0})
    accumulator.Reload()
    values = {
        tag: [(event.step, make_ndarray(event.tensor_proto)) for event in accumulator.Tensors(tag)]
        for tag in accumulator.Tags()["tensors"]
    }
    texts = values.pop("samples/text_summary")
    assert [(step, array.item().decode()) for step, array in texts] == [
        (step, f"Once {step}\n\nThe é") for step in (2, 4, 6, 8)
    ]
    values = {tag: points for tag, points in values.items() if not tag.startswith("_hparams_/")}
    keys = {"loss", "lr", "lr_muon", "grad_norm", "tokens", "tokens_per_second", "seconds"}
    keys |= {"val_loss", "val_bits_per_byte"} | {
        f"update_ratio_{kind}" for kind in ("matrix", "embedding", "norm_scale")
    }
    assert set(values) == keys
    for tag, points in values.items():
        assert [step for step, _ in points] == ([2, 4, 6, 8] if tag.startswith("val_") else list(range(1, 9))), tag
    assert values["loss"][7][1] == pytest.approx(10 / 8)
    assert values["update_ratio_embedding"][5][1] == pytest.approx(6 / 200)
    content = accumulator.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = metadata.parse_session_start_info_plugin_data(content).hparams
    assert settings["optimizer.name"].string_value == "muon"
    assert settings["model.width"].number_value == config.model.width
    content = accumulator.SummaryMetadata("_hparams_/experiment").plugin_data.content
    metrics = {info.name.tag for info in metadata.parse_experiment_plugin_data(content).metric_infos}
    assert metrics < keys


def event_file_and_older_name(workdir, number):
    """The newest event file, and a name under which it is one of an earlier second than the next."""
    newest = max((workdir / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    return newest, newest.with_name(f"events.out.tfevents.{number}.host.1")
