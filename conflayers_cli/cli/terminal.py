"""What goes to the terminal: the answer alone to stdout, everything else to stderr."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from conflayers_cli.errors import ConfLayersError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

PROGRAM = "conflayers"
PIPE_WIDTH = 160

_QUIET: ContextVar[bool] = ContextVar("quiet", default=False)

MOST_TOLD = 1000
"""Characters of a message: what is told of may come out of a file."""

# Overrides, embeddings and isolates of writing direction, which can make a line read otherwise than
# it is (CVE-2021-42574). The marks that Arabic and Hebrew texts need are others, and so are the
# joiners of emoji.
_DIRECTIONS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
# Shown as Unicode's pictures of them. C1 controls and directions have none.
_VISIBLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_VISIBLE |= {0x7F: 0x2421} | dict.fromkeys((*range(0x80, 0xA0), *_DIRECTIONS), 0xFFFD)
# JSON can spell them; json.dumps does so only for what is below a space.
_SPELT = {code: f"\\u{code:04x}" for code in _VISIBLE if code >= 0x20}


_listener: ContextVar[Callable[[str], None] | None] = ContextVar("listener", default=None)


class Tell(Protocol):
    """Told what is being done, and how much of the whole is done, from 0 to 1."""

    def __call__(self, message: str, done: float) -> None: ...


def terminal_safe(text: str) -> str:
    """The text with control characters made visible, so that it can't steer a terminal.

    Character by character: what begins in one piece of a text and ends in the next is caught, too.
    """
    return text.translate(_VISIBLE)


def one_line(text: object) -> str:
    """A message fit for one line on a terminal; of a very long one the middle is left out."""
    line = terminal_safe(" ".join(str(text).split()))
    if len(line) <= MOST_TOLD:
        return line
    half = MOST_TOLD // 2
    return f"{line[:half]} … {line[-half:]}"


@contextmanager
def notes_to(listener: Callable[[str], None]) -> Iterator[None]:
    """Within: notes go to the listener and no bar is shown, for callers that are no terminal's."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def quiet(wanted: bool) -> Iterator[None]:
    """Within, if wanted: no notes and no progress; failures are told all the same."""
    before = _QUIET.set(wanted)
    try:
        yield
    finally:
        _QUIET.reset(before)


def note(message: str) -> None:
    """Say something to the user that a result can do without: one line on stderr."""
    if (listener := _listener.get()) is not None:
        listener(one_line(message))
    elif not _QUIET.get():
        say(message)


def say(message: str) -> None:
    """Say what has to be heard, a failure for one: one line on stderr."""
    if sys.stderr is None:  # closed by the caller; print() would turn to stdout then
        return
    # Where stderr is gone too there is nobody left to tell.
    with suppress(OSError, ValueError):
        print(f"{PROGRAM}: {one_line(message)}", file=sys.stderr, flush=True)  # noqa: T201


def emit(text: str) -> None:
    """Write a part of the answer to stdout, at once.

    Control characters are made visible where stdout is a terminal; files and pipes get the text
    as it is.

    Raises:
        ConfLayersError: stdout is closed or can't be written.
    """
    _write(terminal_safe(text) if is_terminal(sys.stdout) else text)


def _write(text: str) -> None:
    stdout = sys.stdout
    if stdout is None:
        raise ConfLayersError("standard output is closed")
    try:
        stdout.write(_encodable(text, stdout))
        stdout.flush()
    except BrokenPipeError:
        raise ConfLayersError("standard output was closed before all was written") from None
    except (OSError, ValueError) as error:  # ValueError: a closed file object
        reason = getattr(error, "strerror", None) or error
        raise ConfLayersError(f"standard output can't be written: {reason}") from error


def emit_json(document: Any, *, indent: int | None = 2) -> None:
    """Write one JSON document and a line end to stdout; with ``indent`` None on one line.

    On a terminal control characters are spelt as JSON spells them: it is the same document.
    """
    text = json.dumps(
        document, ensure_ascii=not speaks_unicode(sys.stdout), allow_nan=False, indent=indent
    )
    emit(f"{text.translate(_SPELT) if is_terminal(sys.stdout) else text}\n")


def emit_rich(*parts: RenderableType) -> None:
    """Write tables and text for people to stdout; plain where it is no terminal.

    Raises:
        ConfLayersError: as `emit`.
    """
    from rich.console import Console

    from conflayers_cli.cli.tables import fitting

    if is_terminal(sys.stdout):
        console = Console(file=sys.stdout)
    else:  # a pipe has no width: tables must not be squeezed to fit one
        console = Console(file=io.StringIO(), width=PIPE_WIDTH, color_system=None)
    with console.capture() as captured:
        for part in parts:
            console.print(fitting(part, console))
    _write("\n".join(line.rstrip(" ") for line in captured.get().split("\n")))


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person sits before the stream."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # a closed file object
        return False


def speaks_unicode(stream: TextIO | None) -> bool:
    """Whether any character can be written to the stream."""
    return stream is not None and (stream.encoding or "").lower().startswith("utf")


def stderr_console() -> Console:
    """The console for everything that is not the answer.

    A terminal to Rich only where it is one that can redraw lines, and a person wants to see them:
    FORCE_COLOR alone must not fill a log with a bar's every move.
    """
    from rich.console import Console

    dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    alive = is_terminal(sys.stderr) and not dumb and not _QUIET.get()
    return Console(stderr=True, force_terminal=alive)


@contextmanager
def progress_bar() -> Iterator[Tell]:
    """A bar on stderr while the block runs, where stderr is a terminal; else nothing is shown."""
    console = stderr_console()
    if _listener.get() is not None or not console.is_terminal:
        yield _silent
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    # stdout is the answer's: Rich must not lead it to the bar's console
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as bar:
        task = bar.add_task("", total=1.0)

        def tell(message: str, done: float) -> None:
            bar.update(task, description=one_line(message), completed=done)

        yield tell


@contextmanager
def suppress_failures() -> Iterator[None]:
    """Within: a failure is told and no more; something else is on its way to the user already."""
    try:
        yield
    except ConfLayersError as error:
        say(f"error: {error}")


def discard(stream: TextIO | None) -> None:
    """Send what is left in a stream that failed to nowhere.

    Python flushes the standard streams once more as it ends, and would say then.
    """
    with suppress(OSError, ValueError):
        if stream is not None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def _silent(message: str, done: float) -> None:
    """Progress that nobody watches."""


def _encodable(text: str, stream: TextIO) -> str:
    """The text with what the stream's encoding lacks escaped."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
