"""The disk: advice by what it said, one writer, and who takes a lock that another let go."""

import errno
import os

import pytest

from lapilli.disk import advice_on, take_lock


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "Make room"),
        (errno.EDQUOT, "Make room within your quota"),
        (errno.EFBIG, "Raise the limit on the size of a file"),
        (errno.EROFS, "Mount that file system writable"),
        (errno.EACCES, "Change the permissions"),
        (errno.EIO, "See what is wrong"),
    ],
)
def test_advice_is_that_of_what_the_disk_said(number, says):
    assert advice_on(OSError(number, os.strerror(number))).startswith(says)


def test_a_lock_is_taken_once(tmp_path):
    path = tmp_path / "lock"
    with path.open("wb") as one, path.open("ab") as other:
        assert take_lock(one.fileno())
        assert not take_lock(other.fileno())
        one.close()
        assert take_lock(other.fileno())
