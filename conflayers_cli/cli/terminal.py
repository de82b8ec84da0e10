"""Commands' stdout: the answer alone. All else goes to stderr, see `utils.notices`."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

from conflayers_cli.cli.flags import in_flags
from conflayers_cli.errors import ConfLayersError
from conflayers_cli.utils.notices import VISIBLE, print_notice, terminal_safe
from conflayers_cli.utils.progress import is_terminal

if TYPE_CHECKING:
    from rich.console import RenderableType

PIPE_WIDTH = 160

# JSON can spell control characters; json.dumps does so only for what is below a space.
_SPELT = {code: f"\\u{code:04x}" for code in VISIBLE if code >= 0x20}


def emit(text: str) -> None:
    """Write a part of the answer to stdout and flush; on a terminal control characters are visible.

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


def emit_styled(parts: Iterable[tuple[str, str | None]]) -> None:
    """Write (text, Rich style) pairs; without styles where stdout is no terminal for colours."""
    if not is_terminal(sys.stdout):
        for text, _ in parts:
            emit(text)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    line = Text.assemble(*((terminal_safe(text), style or "") for text, style in parts))
    with console.capture() as captured:
        console.print(line, end="")
    _write(captured.get())


def emit_json(document: Any, *, indent: int | None = 2) -> None:
    """Write one JSON document to stdout; with ``indent`` None on one line."""
    text = json.dumps(
        document, ensure_ascii=not speaks_unicode(sys.stdout), allow_nan=False, indent=indent
    )
    emit(f"{text.translate(_SPELT) if is_terminal(sys.stdout) else text}\n")


def emit_rich(*parts: RenderableType) -> None:
    """Write tables and text to stdout; plain where it is no terminal. Raises as `emit`."""
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


def speaks_unicode(stream: TextIO | None) -> bool:
    """Whether any character can be written to the stream."""
    return stream is not None and (stream.encoding or "").lower().startswith("utf")


@contextmanager
def suppress_failures() -> Iterator[None]:
    """Within: a failure is printed, not raised; another error is being raised already."""
    try:
        yield
    except ConfLayersError as error:
        print_notice(f"error: {in_flags(error)}")


def discard(stream: TextIO | None) -> None:
    """Drop what is left in a stream that failed, or Python would complain when it exits."""
    with suppress(OSError, ValueError):
        if stream is not None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def _encodable(text: str, stream: TextIO) -> str:
    """The text with what the stream's encoding lacks escaped."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
