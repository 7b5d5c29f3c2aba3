"""TensorBoard's event file, written through a journal: neither a kill nor a full disk leaves a torn record in it.

A SummaryWriter hangs the program once its thread has met a full disk (tensorflow/tensorboard#6167).
"""

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from jaxlm.storage.jsonl import Journal


class EventFile:
    """The events of one session."""

    def __init__(self, directory: Path, first_step: int):
        """Begins a file in `directory`; TensorBoard drops what earlier files say of `first_step` and later."""
        directory.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._journal = Journal(directory / name)
        self._append(Event(file_version="brain.Event:2"))
        self._append(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the numbers of a step."""
        parts = [summary.scalar(name, value) for name, value in values.items()]
        for part in parts[1:]:
            parts[0].MergeFrom(part)
        self._append(Event(step=step, summary=parts[0]))

    def text(self, step: int, tag: str, text: str) -> None:
        """Adds a text in Markdown."""
        self._append(Event(step=step, summary=summary.text(tag, text)))

    def sync(self) -> None:
        """Returns once the disk holds every event for good. Raises OSError while it cannot."""
        self._journal.sync()

    def close(self) -> None:
        """Closes the file."""
        self._journal.close()

    def _append(self, event: Event) -> None:
        """Adds a record as TensorFlow frames it: length, its checksum, bytes, their checksum."""
        event.wall_time = time.time()
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        checks = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
        self._journal.append(length + checks[0] + data + checks[1])
