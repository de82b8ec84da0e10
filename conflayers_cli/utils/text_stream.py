"""Text that comes in pieces, read by lines or with a look ahead."""

from __future__ import annotations

import re
from collections.abc import Iterable

from conflayers_cli.errors import InputError

MAX_ROW = 10_000_000
"""Characters of a line, or of whatever else is read as one row."""

_BLANK = re.compile(r"[ \t\n\r]*")  # white space of JSON


class TextStream:
    """A text of which as much is held as one row needs.

    Args:
        pieces: of the text, none of them empty.
        name: of the file, for errors.

    Attributes:
        text: what is held, the last row's rest in front.
        at: where in ``text`` the next row begins.
        line, column: the place of that in the file, counted from 1.
    """

    def __init__(self, pieces: Iterable[str], name: str) -> None:
        self._pieces = iter(pieces)
        self.name = name
        self.text = ""
        self.at = 0
        self.line = 1
        self.column = 1

    def grow(self) -> bool:
        """Hold more of the text, at least twice as much; False at its end, and nothing changes.

        Twice: who looks at all of a row whenever there is more of it takes linear time so.
        """
        pending = self.text[self.at :]
        self.check_size(len(pending))
        parts = [pending] if pending else []
        size = 0
        while size < max(1, len(pending)):
            piece = next(self._pieces, None)
            if piece is None:
                break
            parts.append(piece)
            size += len(piece)
        if size:
            self.text, self.at = "".join(parts), 0
        return size > 0

    def check_size(self, size: int) -> None:
        """Raise InputError for a row of more characters than `MAX_ROW`."""
        if size > MAX_ROW:
            raise InputError(
                f"{self.name}:{self.line}: is the start of a row of more than {MAX_ROW:,} "
                "characters, which are allowed"
            )

    def advance(self, end: int) -> None:
        """Go on at ``end`` in ``text``."""
        newlines = self.text.count("\n", self.at, end)
        if newlines:
            self.line += newlines
            self.column = end - self.text.rfind("\n", self.at, end)
        else:
            self.column += end - self.at
        self.at = end

    def position(self, index: int) -> tuple[int, int]:
        """(line, column) of a place in ``text`` that is not before ``at``."""
        newlines = self.text.count("\n", self.at, index)
        if newlines:
            return self.line + newlines, index - self.text.rfind("\n", self.at, index)
        return self.line, self.column + index - self.at

    def peek(self) -> str:
        """Go past blanks and line ends; the character behind them, empty at the end."""
        while True:
            found = _BLANK.match(self.text, self.at)
            self.advance(found.end() if found else self.at)
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.grow():
                return ""

    def peek_line(self, limit: int) -> str | None:
        """The rest of this line, which stays the next to be read; None: it is longer than that."""
        end = self._line_end(limit)
        return None if end is None else self.text[self.at : end]

    def take_line(self) -> str:
        """The rest of this line with its line feed; empty at the end of the text."""
        end = self._line_end(MAX_ROW)
        if end is None:
            self.check_size(MAX_ROW + 1)
        line = self.text[self.at : end]
        self.advance(self.at + len(line))
        return line

    def _line_end(self, limit: int) -> int | None:
        """Where in ``text`` the next line begins; None: more than ``limit`` characters on."""
        end = self.text.find("\n", self.at)
        while end < 0:
            pending = len(self.text) - self.at
            if pending > limit:
                return None
            if not self.grow():
                return len(self.text) if pending <= limit else None
            end = self.text.find("\n", pending)
        return end + 1 if end + 1 - self.at <= limit else None
