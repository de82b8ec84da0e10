"""Reading text and JSON files of users, with errors of one line."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any, BinaryIO

from conflayers_cli.errors import InputError

MAX_BYTES = 100_000_000
"""Limit of a file or of standard input. Hostile JSON takes some 25 times as much memory."""
_CHUNK = 1 << 20


def read_text(path: Path, limit: int = MAX_BYTES) -> str:
    """A text file as a string; a byte order mark is dropped.

    Raises:
        InputError: there is no such file, it is a folder, unreadable, larger than ``limit`` bytes,
            not UTF-8, or has NUL bytes.
    """
    try:
        with path.open("rb") as file:
            return read_stream(file, str(path), limit)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder, a file is needed") from None
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror or error}") from error


def read_stream(file: BinaryIO, name: str, limit: int = MAX_BYTES) -> str:
    """The content of a file, pipe or device as a string; a byte order mark is dropped.

    Reading stops at the first fault: a device such as /dev/zero has no end.

    Args:
        name: of the file, for errors.
        limit: in bytes.

    Raises:
        InputError: it is larger than ``limit``, not UTF-8, or has NUL bytes.
        OSError: it can't be read.
    """
    data = bytearray()
    decoder = codecs.getincrementaldecoder("utf-8")()
    while chunk := file.read(min(_CHUNK, limit + 1 - len(data))):
        data += chunk
        if len(data) > limit:
            raise InputError(f"{name}: is too large, allowed are {limit:,} bytes")
        try:
            decoder.decode(chunk)
        except UnicodeDecodeError:
            break
        if b"\0" in chunk:
            break
    return decode_text(bytes(data), name)


def decode_text(data: bytes, name: str) -> str:
    """UTF-8 bytes as a string; a byte order mark is dropped.

    Raises:
        InputError: it is not UTF-8, or has NUL bytes; ``name`` and the line are in the message.
    """
    nul = data.find(b"\0")
    try:
        text = (data if nul < 0 else data[:nul]).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # counted in error.object: utf-8-sig takes the byte order mark off before it counts
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{name}:{line}: is not UTF-8 text") from None
    if nul >= 0:
        line = data.count(b"\n", 0, nul) + 1
        raise InputError(f"{name}:{line}: has a NUL byte; is this a text file in UTF-8?")
    return text


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a small file.

    Raises:
        InputError: it can't be read, is nested too deeply, or is no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror or error}") from error
    except RecursionError:
        raise InputError(f"{path}: is nested too deeply") from None
    except ValueError as error:  # the syntax, the encoding, a number's digits
        raise InputError(f"{path}: is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds {type(found).__name__}, not a JSON object")
    return found
