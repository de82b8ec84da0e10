"""A lock on an open file, for one process at a time.

The operating system drops it with the file, however the process ends.
"""

from __future__ import annotations

from typing import IO

from filelock import lock_descriptor


def try_lock(file: IO[bytes]) -> bool | None:
    """Lock a file that is open for writing, unbuffered, until it is closed; does not wait.

    Returns:
        False: another process has it. None: the file system has no locks (some network ones).
    """
    try:
        return lock_descriptor(file.fileno(), blocking=False)
    except OSError:
        return None
