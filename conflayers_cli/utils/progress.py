"""How far work is: a callback that whoever does it calls, and a bar on stderr for people."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

from conflayers_cli.utils.notices import bars_wanted, one_line

if TYPE_CHECKING:
    from rich.console import Console


class ProgressCallback(Protocol):
    """Called with what is being done, and how much of the whole is done, from 0 to 1."""

    def __call__(self, message: str, done: float) -> None: ...


def no_progress(message: str, done: float) -> None:
    """No-op callback."""


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person sits before the stream."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # a closed file object
        return False


def stderr_console() -> Console:
    """The console for everything that is not the answer.

    A terminal to Rich only where it is one that can redraw lines, and a person wants to see them:
    FORCE_COLOR alone must not fill a log with a bar's every move.
    """
    from rich.console import Console

    dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    return Console(
        stderr=True, force_terminal=is_terminal(sys.stderr) and not dumb and bars_wanted()
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
    # stdout is the answer's: Rich must not lead it to the bar's console
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as bar:
        task = bar.add_task("", total=1.0)

        def on_progress(message: str, done: float) -> None:
            bar.update(task, description=one_line(message), completed=done)

        yield on_progress
