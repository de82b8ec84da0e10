"""What `fuzz` is told of a reader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Reader:
    """What reads a kind of file.

    Attributes:
        read: raises an `InputError`, or gives what is checked by ``sound``.
        sound: what is wrong with something accepted; None: nothing.
        suffixes: of the files.
        corpus: files that are accepted.
        begins: an error begins with the file; else its folder is named somewhere.
        refused: what is wrong with an error, as ``sound``.
    """

    name: str
    read: Callable[[Path], object]
    sound: Callable[[object, Path], str | None]
    suffixes: tuple[str, ...]
    corpus: tuple[bytes, ...]
    begins: bool = True
    refused: Callable[[str, Path], str | None] | None = None
