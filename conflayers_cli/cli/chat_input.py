"""Where a chat's messages come from: a person at the terminal, or lines of standard input."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress

from conflayers_cli.errors import InputError
from conflayers_cli.utils.progress import is_terminal

PROMPT = "> "
CONTINUED = "… "

Line = Callable[[str], str | None]
"""Given a prompt, the next line without its end; None: there is none."""


def read_message(line: Line) -> str | None:
    r"""The next message; None at the end.

    A line that ends with ``\`` goes on in the next one. A paste comes as one line with line ends in
    it, where the terminal marks pastes.

    Raises:
        InputError: it is not UTF-8 text, or can't be read.
    """
    parts: list[str] = []
    while True:
        part = line(CONTINUED if parts else PROMPT)
        if part is None:
            return "\n".join(parts) if parts else None
        if not part.endswith("\\"):
            return "\n".join([*parts, part])
        parts.append(part.removesuffix("\\"))


def from_terminal() -> Line:
    """Lines typed at a terminal, with editing and this chat's history where Python has readline.

    Ctrl-D and Ctrl-C end the chat.
    """
    with suppress(ImportError):
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")

    def line(prompt: str) -> str | None:
        try:
            if is_terminal(sys.stdout):
                text = input(prompt)
            else:  # stdout is the answers' alone, and input() would write there
                print(prompt, end="", file=sys.stderr, flush=True)  # noqa: T201
                text = input()
        except (EOFError, KeyboardInterrupt):
            with suppress(OSError, ValueError):
                print(file=sys.stderr)  # noqa: T201 - the shell's prompt is to begin a line
            return None
        except UnicodeDecodeError:
            raise InputError("the message is not UTF-8 text") from None
        return _checked(text)

    return line


def from_stdin() -> Line:
    """The lines of standard input.

    Raises:
        InputError: it is closed.
    """
    if sys.stdin is None:
        raise InputError("standard input is closed")
    stream = sys.stdin.buffer

    def line(prompt: str) -> str | None:
        try:
            data = stream.readline()
        except OSError as error:
            raise InputError(f"standard input can't be read: {error.strerror or error}") from error
        if not data:
            return None
        try:
            return data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError:
            raise InputError("standard input is not UTF-8 text") from None

    return line


def _checked(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that were no text, as the terminal gave them
        raise InputError("the message is not UTF-8 text") from None
    return text
