"""JSON values read one by one from a text that may be larger than memory."""

from __future__ import annotations

import json
from collections.abc import Callable

from conflayers_cli.errors import InputError
from conflayers_cli.utils.text_stream import TextStream

_Pairs = list[tuple[str, object]]
_LONGEST_TOKEN = 16
"""Characters: a syntax error so near to the end of what has been read may be for want of more."""


def quoted(value: str) -> str:
    """A text in one short line of ASCII."""
    shown = json.dumps(value)
    return shown if len(shown) <= 60 else f"{shown[:59]}…"


def decode_json(text: str, name: str, line: int, hint: str = "") -> object:
    """The one JSON value in a text that begins at this line of a file.

    Args:
        hint: what to do, for the end of an error.

    Raises:
        InputError: it is not JSON, repeats a key in one object, is nested too deeply or has a
            number with too many digits.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_keys(f"{name}:{line}"))
    except json.JSONDecodeError as error:
        place = line + error.lineno - 1, error.colno
        raise _syntax_error(name, place, error.msg, hint) from None
    except (RecursionError, ValueError) as error:
        raise _too_much(f"{name}:{line}", error) from None


class JsonReader:
    """Values and punctuation of JSON, as far as they are asked for.

    Errors are those of `decode_json`; a value is no longer than a row may be.

    Attributes:
        size: characters of the last value.
    """

    def __init__(self, stream: TextStream) -> None:
        self._stream = stream
        self.size = 0

    def peek(self) -> str:
        """The next character that is not blank; empty at the end."""
        return self._stream.peek()

    def take(self, expected: str) -> str:
        """Go past one of the characters, and give it."""
        found = self.peek()
        if not found or found not in expected:
            # ":" and "," are told as Python's own reader does, which is used within values
            what = f"'{expected[0]}' delimiter" if expected[0] in ":," else f"'{expected}'"
            raise self._error(f"expecting {what}")
        self._stream.advance(self._stream.at + 1)
        return found

    def end(self) -> None:
        """Raise InputError unless the text ends here."""
        if self.peek():
            raise self._error("extra data")

    def key(self) -> str:
        """The key of an object's next member, with its colon."""
        if self.peek() != '"':
            raise self._error("expecting property name enclosed in double quotes")
        key = self.value()
        self.take(":")
        return str(key)

    def value(self) -> object:
        """The next value."""
        stream = self._stream
        self.peek()
        where = f"{stream.name}:{stream.line}"
        decoder = json.JSONDecoder(object_pairs_hook=_unique_keys(where))
        while True:
            try:
                value, end = decoder.raw_decode(stream.text, stream.at)
            except json.JSONDecodeError as error:
                if _may_be_cut(error) and stream.grow():
                    continue
                place = stream.position(error.pos)
                raise _syntax_error(stream.name, place, error.msg) from None
            except (RecursionError, ValueError) as error:
                raise _too_much(where, error) from None
            number = isinstance(value, int | float)
            if number and len(stream.text) - end < _LONGEST_TOKEN and stream.grow():
                continue  # it may have more digits
            self.size = end - stream.at
            stream.check_size(self.size)
            stream.advance(end)
            return value

    def opens(self, marks: str) -> bool:
        """Whether the next value is a list whose first item begins with one of the marks."""
        stream = self._stream
        if self.peek() != "[":
            return False
        while True:
            begin = stream.text[stream.at + 1 :].lstrip(" \t\n\r")[:1]
            if begin or not stream.grow():
                return bool(begin) and begin in marks

    def _error(self, problem: str) -> InputError:
        return _syntax_error(self._stream.name, (self._stream.line, self._stream.column), problem)


def _unique_keys(where: str) -> Callable[[_Pairs], dict[str, object]]:
    """An ``object_pairs_hook``: of repeated keys Python takes the last, other readers the first."""

    def unique(pairs: _Pairs) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise InputError(f"{where}: has the key {quoted(key)} twice in one object")
                seen.add(key)
        return found

    return unique


def _may_be_cut(error: json.JSONDecodeError) -> bool:
    """Whether there may be no error once more of the text is there."""
    near_end = error.pos + _LONGEST_TOKEN >= len(error.doc)
    return near_end or error.msg.startswith("Unterminated string")


def _syntax_error(name: str, place: tuple[int, int], problem: str, hint: str = "") -> InputError:
    line, column = place
    said = f"{problem[:1].lower()}{problem[1:]} (column {column})"
    return InputError(f"{name}:{line}: is not valid JSON: {said}{hint}")


def _too_much(where: str, error: Exception) -> InputError:
    """For errors of Python's limits: on nesting, and on the digits of a number."""
    if isinstance(error, RecursionError):
        return InputError(f"{where}: is nested too deeply")
    return InputError(f"{where}: has a number with too many digits")
