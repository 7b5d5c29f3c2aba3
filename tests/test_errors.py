import errno
import os

import pytest

from jaxlm.errors import disk_advice, disk_error


@pytest.mark.parametrize("number", [number for number in errno.errorcode if number not in (errno.ENOSPC, errno.EDQUOT)])
def test_only_a_full_disk_needs_room(number):
    advice = disk_advice(OSError(number, os.strerror(number)))
    assert advice and "room" not in advice


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_needs_room(number):
    assert "make room" in disk_advice(OSError(number, os.strerror(number)))


def test_an_error_without_a_number_has_advice():
    assert "check the disk" in disk_advice(OSError("lost"))


TEXTS = [
    "RESOURCE_EXHAUSTED: Failed to write 3 bytes to \"/a\": {} [os_error_code='']",
    'Error while serializing: IoError(Os {{ code: 0, kind: Other, message: "{}" }})',
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EACCES", "EFBIG", "EIO", "EMFILE", "ENFILE", "ENODEV"])
def test_an_error_that_a_library_gives_as_text_is_that_of_the_disk(text, name):
    number = getattr(errno, name)
    error = ValueError(text.format(os.strerror(number)))
    assert disk_error(error).errno == number
    assert disk_advice(error) == disk_advice(OSError(number, ""))


def test_another_error_is_not_of_the_disk():
    assert disk_error(ValueError("shapes differ")) is None
    assert disk_error(OSError("lost")) is None
