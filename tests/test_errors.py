import errno
import os

import pytest

from jaxlm.errors import disk_advice


@pytest.mark.parametrize("number", [number for number in errno.errorcode if number not in (errno.ENOSPC, errno.EDQUOT)])
def test_only_a_full_disk_needs_room(number):
    advice = disk_advice(OSError(number, os.strerror(number)))
    assert advice and "room" not in advice


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_needs_room(number):
    assert "make room" in disk_advice(OSError(number, os.strerror(number)))


def test_an_error_without_a_number_has_advice():
    assert "check the disk" in disk_advice(OSError("lost"))
