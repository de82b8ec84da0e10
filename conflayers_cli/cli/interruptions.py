"""Ctrl-C and SIGTERM: raised as KeyboardInterrupt, with an exit code each."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from conflayers_cli.errors import InputError
from conflayers_cli.utils.distributed import world

INTERRUPTED = 130
TERMINATED = 143
ONCE_MORE_S = 0.02


class Interruptions:
    """Within: Ctrl-C and SIGTERM raise KeyboardInterrupt, as often as they come.

    A Ctrl-C that is ignored (in a shell's background job) stays ignored, and handlers of another
    program stay. Under torchrun SIGTERM ends a process at once: one that waits for a failed rank
    would not see the exception.

    Attributes:
        number: the first signal that came; None: none did.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._over = False
        self._before: dict[int, Any] = {}
        self._hook = sys.unraisablehook

    @property
    def code(self) -> int:
        """The exit code after an interruption."""
        return TERMINATED if self.number == signal.SIGTERM else INTERRUPTED

    def __enter__(self) -> Interruptions:
        if threading.current_thread() is not threading.main_thread():
            return self
        ours = {signal.SIGINT: signal.default_int_handler}
        if _alone():
            ours[signal.SIGTERM] = signal.SIG_DFL  # type: ignore[assignment]
        for number, usual in ours.items():
            if signal.getsignal(number) == usual:
                self._before[number] = signal.signal(number, self._arrived)
        self._hook, sys.unraisablehook = sys.unraisablehook, self._lost
        return self

    def __exit__(self, *of_error: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        if threading.current_thread() is threading.main_thread():
            sys.unraisablehook = self._hook

    def over(self) -> None:
        """The work is over: a further signal ends the process at once."""
        self._over = True

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        if self._over:
            os._exit(self.code)
        raise KeyboardInterrupt

    def _lost(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Raise an interruption once more that came where Python can't raise it, in a finaliser."""
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            number = signal.Signals(self.number or signal.SIGINT)
            later = threading.Timer(ONCE_MORE_S, _thread.interrupt_main, (number,))
            later.daemon = True
            later.start()
        else:
            self._hook(unraisable)


def leave_at_once(code: int) -> None:
    """From now on Ctrl-C ends the process without a traceback: it is ending already."""
    if threading.current_thread() is not threading.main_thread():
        return

    def leave(number: int, frame: FrameType | None) -> None:
        os._exit(code)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            signal.signal(number, leave)


def _alone() -> bool:
    try:
        return world().size == 1
    except InputError:  # raised again by the next caller
        return True
