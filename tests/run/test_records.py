"""What a run writes down."""

import json

from jaxlm.run.events import EvaluationEvent, SamplesEvent, StepEvent
from jaxlm.run.records import Records


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
