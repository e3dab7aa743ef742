"""Disk: what is on it for good, who writes there, and what to do when it refuses.

Knows files by path and number; knows nothing of what is in them.
"""

import errno
import os
import sys
from pathlib import Path
from typing import Final

FULL_DISK: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the errors of a disk, quota or limit on the size of files that is reached."""


def flush_path(path: Path) -> None:
    """Flush a file, or a folder: a rename is on the disk only when its folder is."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def take_lock(number: int) -> bool:
    """Lock an open file or folder for this process; return False where another one holds it.

    The system lets go of the lock when the process ends, however it ends. Where the system or the
    file system has no locks, everybody gets one.
    """
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


def advice_on(error: OSError | None) -> str:
    """Return what to do before the same command is started again, by what the disk said."""
    number = None if error is None else error.errno
    if number == errno.ENOSPC:
        return "Make room"
    if number == errno.EDQUOT:
        return "Make room within your quota on that disk, or have it raised,"
    if number == errno.EFBIG:
        return "Raise the limit on the size of a file (ulimit -f), or choose another file system,"
    if number == errno.EROFS:
        return "Mount that file system writable (making room does not help)"
    if number in (errno.EACCES, errno.EPERM):
        return "Change the permissions there"
    return "See what is wrong with that disk"
