"""Files that only one process at a time may have: told by the system, not by what lies about.

A lock goes with the process that has it, however that one ends. Where a file system knows no locks
(some network ones) nobody is kept out.
"""

from __future__ import annotations

import errno
import sys
from typing import IO

_TAKEN = frozenset({errno.EACCES, errno.EAGAIN, errno.EDEADLK})

if sys.platform == "win32":
    import msvcrt

    _BEHIND_ALL = 1 << 62
    """The byte that is locked: others can't read locked ones there, so none that a file has."""

    def _lock(file: IO[bytes]) -> None:
        place = file.tell()
        try:
            file.seek(_BEHIND_ALL)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        finally:
            file.seek(place)

else:
    import fcntl

    def _lock(file: IO[bytes]) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def try_lock(file: IO[bytes]) -> bool | None:
    """Take an open file for this process alone, until it is closed; does not wait.

    Args:
        file: open for writing, unbuffered.

    Returns:
        False: somebody else has it. None: there are no locks here.
    """
    try:
        _lock(file)
    except OSError as error:
        return False if error.errno in _TAKEN else None
    return True
