"""What decoders of the tokenizers package do to tokens, piece by piece.

A stage takes pieces (tokens' texts, or parts of a text) and gives pieces; put together, what it has
given and what `Stage.end` gives is what the decoder makes of all at once. What a later piece may
still change is held back, and no more: half a character, bytes that count only as a whole run, the
end that may begin a text to be replaced.
"""

from __future__ import annotations

import codecs
import copy
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Stage(Protocol):
    """Its state is plain values, so that `copy.copy` gives one that goes on by itself."""

    def feed(self, piece: str) -> Sequence[str]:
        """The pieces that are certain now."""

    def end(self) -> Sequence[str]:
        """The rest, where nothing more comes; nothing is fed after that."""


class Stages:
    """Stages one behind the other."""

    def __init__(self, stages: Iterable[Stage]) -> None:
        self._stages = list(stages)

    def feed(self, piece: str) -> str:
        """The text that is certain now."""
        return "".join(_through(self._stages, [piece]))

    def peek(self, last: str = "") -> str:
        """The rest of the text, if this were its last piece; others may be fed all the same."""
        pieces: list[str] = [last] if last else []
        for stage in map(copy.copy, self._stages):
            pieces = [*_through([stage], pieces), *stage.end()]
        return "".join(pieces)

    def append(self, stage: Stage) -> None:
        self._stages.append(stage)


def _through(stages: Iterable[Stage], pieces: Sequence[str]) -> Sequence[str]:
    for stage in stages:
        pieces = [out for piece in pieces for out in stage.feed(piece)]
    return pieces


class PerToken:
    """Each token by itself, but for the first."""

    def __init__(self, first: Callable[[str], str], later: Callable[[str], str]) -> None:
        self._now, self._later = first, later

    def feed(self, piece: str) -> Sequence[str]:
        text, self._now = self._now(piece), self._later
        return (text,)

    def end(self) -> Sequence[str]:
        return ()


class LastDiffers:
    """Each token by itself, but for the last: what both readings begin with is certain."""

    def __init__(self, last: Callable[[str], str], earlier: Callable[[str], str]) -> None:
        self._last, self._earlier = last, earlier
        self._rest_if_last = self._rest = ""

    def feed(self, piece: str) -> Sequence[str]:
        before, last, earlier = self._rest, self._last(piece), self._earlier(piece)
        same = common_prefix(last, earlier)
        self._rest_if_last, self._rest = last[same:], earlier[same:]
        return (before + last[:same],)

    def end(self) -> Sequence[str]:
        return (self._rest_if_last,)


class WithoutRepeats:
    """Each token by itself, of equal ones in a row the first."""

    def __init__(self, each: Callable[[str], str]) -> None:
        self._each = each
        self._previous: str | None = None

    def feed(self, piece: str) -> Sequence[str]:
        previous, self._previous = self._previous, piece
        text = "" if piece == previous else self._each(piece)
        return (text,) if text else ()

    def end(self) -> Sequence[str]:
        return ()


class ByteLevel:
    """Tokens whose letters are bytes; a token with another letter is text. Gives one text."""

    def __init__(self) -> None:
        self._values = _byte_letters()
        self._pending = b""

    def feed(self, piece: str) -> Sequence[str]:
        try:
            data = bytes(map(self._values.__getitem__, piece))
        except KeyError:
            data = piece.encode()
        data = self._pending + data
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return (text,)

    def end(self) -> Sequence[str]:
        return (self._pending.decode(errors="replace"),)


class ByteFallback:
    """Tokens ``<0x..>`` as bytes: a run of them is a text, or each of them an unknown character.

    So a run is certain where another token ends it, or where it can't be a text any more.
    """

    def __init__(self) -> None:
        self._run = ""
        self._half = b""  # bytes behind ``_run``, the beginning of a character
        self._invalid = False

    def feed(self, piece: str) -> Sequence[str]:
        found = _BYTE.fullmatch(piece)
        if found is None:
            rest = self.end()
            self._run, self._half, self._invalid = "", b"", False
            return (*rest, piece)
        if self._invalid:
            return (REPLACEMENT,)
        data = self._half + bytes.fromhex(found[1])
        try:
            text, used = codecs.utf_8_decode(data, "strict", False)
        except UnicodeDecodeError:
            self._invalid = True
            count = len(self._run.encode()) + len(data)
            self._run, self._half = "", b""
            return (REPLACEMENT,) * count
        self._run, self._half = self._run + text, data[used:]
        return ()

    def end(self) -> Sequence[str]:
        if self._half:
            return (REPLACEMENT,) * (len(self._run.encode()) + len(self._half))
        return (self._run,) if self._run else ()


class Replace:
    """A text in place of another in the whole text, as `str.replace`."""

    def __init__(self, old: str, new: str) -> None:
        self._old, self._new = old, new
        self._pending = ""

    def feed(self, piece: str) -> Sequence[str]:
        *parts, rest = (self._pending + piece).split(self._old)
        held = prefix_length(rest, self._old)
        self._pending = rest[len(rest) - held :]
        return (self._new.join([*parts, rest[: len(rest) - held]]),)

    def end(self) -> Sequence[str]:
        return (self._pending,)


class StripLeft:
    """The whole text without so many of a character at its beginning."""

    def __init__(self, character: str, count: int) -> None:
        self._character, self._count = character, count

    def feed(self, piece: str) -> Sequence[str]:
        while self._count and piece:
            if not piece.startswith(self._character):
                self._count = 0
                break
            piece = piece[1:]
            self._count -= 1
        return (piece,)

    def end(self) -> Sequence[str]:
        return ()


class Without:
    """The text without what it has in common with the beginning of another."""

    def __init__(self, beginning: str) -> None:
        self._beginning = beginning

    def feed(self, piece: str) -> Sequence[str]:
        if not self._beginning:
            return (piece,)
        same = common_prefix(piece, self._beginning)
        self._beginning = self._beginning[same:] if same == len(piece) else ""
        return (piece[same:],)

    def end(self) -> Sequence[str]:
        return ()


def common_prefix(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    if other.startswith(one):
        return len(one)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))


def prefix_length(text: str, wanted: str) -> int:
    """Length of the longest end of a text that ``wanted`` begins with, and is not all of it."""
    for length in range(min(len(wanted) - 1, len(text)), 0, -1):
        if text.endswith(wanted[:length]):
            return length
    return 0


def _byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, others for 256 and up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {
        chr(256 + i): value for i, value in enumerate(others)
    }
