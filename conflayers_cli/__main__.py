"""The command as a process of its own: ``conflayers``, or ``python -m conflayers_cli``."""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType

INTERRUPTED = 130


def _leave(number: int, frame: FrameType | None) -> None:
    """Nothing is begun yet, and what is being imported could make something else of an exception
    than an interruption."""
    with suppress(OSError):
        os.write(2, b"conflayers: interrupted\n")
    os._exit(INTERRUPTED)


def run() -> int:
    """The command line of this process; the exit code."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    from conflayers_cli.cli.interruptions import leave_at_once
    from conflayers_cli.cli.main import main

    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    code = main()
    leave_at_once(code)
    return code


if __name__ == "__main__":
    sys.exit(run())
