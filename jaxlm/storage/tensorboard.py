"""TensorBoard's event file, as an append-only file: neither a kill nor a full disk leaves an incomplete record.

tensorboardX's SummaryWriter is not used: it hangs once its thread meets a full disk (tensorflow/tensorboard#6167).
"""

import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from jaxlm.storage.jsonl import AppendOnlyFile


class EventFile(AppendOnlyFile):
    """The events of one session."""

    def __init__(self, directory: Path, first_step: int):
        """Creates a file in `directory`. TensorBoard ignores events of earlier files from `first_step` on."""
        directory.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        super().__init__(directory / name)
        self.append(_record(Event(file_version="brain.Event:2")))
        self.append(_record(Event(step=first_step, session_log=SessionLog(status=SessionLog.START))))


def scalars(step: int, values: Mapping[str, float]) -> bytes:
    """The record of a step's scalars."""
    event = Event(step=step)
    for name, value in values.items():
        event.summary.MergeFrom(summary.scalar(name, value))
    return _record(event)


def text(step: int, tag: str, markdown: str) -> bytes:
    """The record of a text."""
    return _record(Event(step=step, summary=summary.text(tag, markdown)))


def hparams(step: int, settings: Mapping[str, float | str], metrics: Sequence[str]) -> bytes:
    """The records of a run's settings, for TensorBoard's table of hyperparameters, and of the scalars beside them."""
    summaries = summary.hparams(dict(settings), dict.fromkeys(metrics, 0.0))
    return b"".join(_record(Event(step=step, summary=part)) for part in summaries[:2])  # the third says: finished


def _record(event: Event) -> bytes:
    """A TFRecord: length, its checksum, data, their checksum."""
    event.wall_time = time.time()
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    length_crc, data_crc = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
    return length + length_crc + data + data_crc
