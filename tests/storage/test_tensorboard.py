"""The event file, read back as TFRecords of TensorBoard's messages."""

import struct
import time

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jaxlm.storage.tensorboard import EventFile, scalars, text
from tests.tiny_run import disk_room


def crc32c(data):
    """Castagnoli's CRC, bit by bit (RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data):
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def events(directory):
    """Every record of the only file in `directory`; checks their checksums."""
    (path,) = directory.iterdir()
    assert ".tfevents." in path.name
    data, records = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        body, end = data[12 : 12 + length], 12 + length
        assert struct.unpack("<I", data[8:12])[0] == masked(data[:8])
        assert struct.unpack("<I", data[end : end + 4])[0] == masked(body)
        records.append(Event.FromString(body))
        data = data[end + 4 :]
    return records


def test_crc32c_is_that_of_the_standard():
    assert crc32c(b"123456789") == 0xE3069283


def test_a_session_has_its_first_step_scalars_and_texts(tmp_path):
    file = EventFile(tmp_path / "tensorboard", 7)
    file.append(scalars(7, {"loss": 1.5, "lr": 0.25}))
    file.append(text(8, "samples", "Once é"))
    file.close()
    version, start, losses, samples = events(tmp_path / "tensorboard")
    assert version.file_version == "brain.Event:2"
    assert abs(losses.wall_time - time.time()) < 3600
    assert (start.step, start.session_log.status) == (7, SessionLog.START)
    assert losses.step == 7
    assert {value.tag: value.simple_value for value in losses.summary.value} == {"loss": 1.5, "lr": 0.25}
    (value,) = samples.summary.value
    assert (samples.step, value.tag, value.tensor.string_val[0].decode()) == (8, "samples/text_summary", "Once é")
    assert value.metadata.plugin_data.plugin_name == "text"


@pytest.mark.parametrize("room", [60, 150, 200])
def test_a_full_disk_leaves_no_incomplete_record(tmp_path, room):
    file = EventFile(tmp_path, 1)
    with disk_room(room):
        for step in range(1, 6):
            file.append(scalars(step, {"loss": step}))
            assert len(events(tmp_path)) < 2 + 5
    file.sync()
    assert [event.step for event in events(tmp_path)[2:]] == [1, 2, 3, 4, 5]
    file.close()
