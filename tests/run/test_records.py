"""What a run writes down."""

import json
import os

import pytest
from tensorboardX.proto.event_pb2 import SessionLog

from jaxlm.run.events import EvaluationEvent, SamplesEvent, StepEvent
from jaxlm.run.records import Records, TensorBoard
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
