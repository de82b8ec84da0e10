"""Progress of long work: a callback, and a bar on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

from conflayers_cli.utils.notices import one_line, progress_enabled

if TYPE_CHECKING:
    from rich.console import Console


class ProgressCallback(Protocol):
    """Called with what is being done, and the share that is done, from 0 to 1."""

    def __call__(self, message: str, done: float) -> None: ...


def no_progress(message: str, done: float) -> None:
    """No-op callback."""


def is_terminal(stream: TextIO | None) -> bool:
    """Whether the stream is a terminal."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # a closed file object
        return False


def stderr_console() -> Console:
    """Rich's console for everything but the answer.

    It is a terminal only where that can redraw lines and progress is wanted: FORCE_COLOR alone must
    not fill a log with a bar's every move.
    """
    from rich.console import Console

    dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    return Console(
        stderr=True, force_terminal=is_terminal(sys.stderr) and not dumb and progress_enabled()
    )


@contextmanager
def progress_bar() -> Iterator[ProgressCallback]:
    """A bar on stderr while the block runs, where stderr is a terminal; else nothing is shown."""
    console = stderr_console()
    if not console.is_terminal:
        yield no_progress
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    # stdout is for answers: Rich must not redirect it to the bar's console
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as bar:
        task = bar.add_task("", total=1.0)

        def on_progress(message: str, done: float) -> None:
            bar.update(task, description=one_line(message), completed=done)

        yield on_progress
