"""Reading text and JSON files of users, with errors of one line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any, BinaryIO

from conflayers_cli.errors import InputError

MAX_BYTES = 100_000_000
"""Limit of what is read whole. Hostile JSON takes some 25 times as much memory."""
_CHUNK = 1 << 16
_UTF32 = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
_NO_TEXT = (
    (b"\x1f\x8b", "compressed by gzip: gunzip FILE, or name it .gz"),
    (b"\xfd7zX", "compressed by xz: unxz FILE, or name it .xz"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd: zstd -d FILE"),
    (b"PK\x03\x04", "a ZIP archive or a workbook, not a text file: unpack it, or save it as CSV"),
)
"""First bytes of files that are no text, and what to do about them."""
_MARKS = (
    (codecs.BOM_UTF8, "UTF-8"),
    (codecs.BOM_UTF16_LE, "UTF-16-LE"),
    (codecs.BOM_UTF16_BE, "UTF-16-BE"),
)


@contextmanager
def open_file(path: Path) -> Iterator[FileIO]:
    """A file to read bytes from; whatever can't be read, within too, is an `InputError`.

    Not buffered: of a pipe what is there is given at once.
    """
    try:
        with path.open("rb", buffering=0) as file:
            yield file
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder, a file is needed") from None
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror or error}") from error


def read_text(path: Path, limit: int = MAX_BYTES) -> str:
    """A text file as a string; a byte order mark is dropped.

    Raises:
        InputError: there is no such file, it is a folder, unreadable, larger than ``limit`` bytes,
            or refused by `text_pieces`.
    """
    with open_file(path) as file:
        return _read_limited(file.read, str(path), limit)


def read_stream(file: BinaryIO, name: str, limit: int = MAX_BYTES) -> str:
    """The content of a file, pipe or device as a string; a byte order mark is dropped.

    Reading stops at the first fault: a device such as /dev/zero has no end.

    Args:
        name: of the file, for errors.
        limit: in bytes.

    Raises:
        InputError: it is larger than ``limit``, or refused by `text_pieces`.
        OSError: it can't be read.
    """
    return _read_limited(file.read, name, limit)


def _read_limited(read: Callable[[int], bytes], name: str, limit: int) -> str:
    taken = 0

    def read_some(size: int) -> bytes:
        nonlocal taken
        chunk = read(min(size, limit + 1 - taken))
        taken += len(chunk)
        if taken > limit:
            raise InputError(f"{name}: is too large, allowed are {limit:,} bytes")
        return chunk

    return "".join(text_pieces(read_some, name))


def decode_text(data: bytes, name: str) -> str:
    """Bytes as a string, by `text_pieces`; ``name`` and the line are in its errors."""
    return "".join(text_pieces(BytesIO(data).read, name))


def text_pieces(read: Callable[[int], bytes], name: str) -> Iterator[str]:
    """The text of a file in pieces, read as they are asked for; a byte order mark is dropped.

    It is UTF-8, or UTF-16 where a byte order mark says so. Everything before a fault is given
    before the error is raised, so what a reader finds doesn't depend on the size of the pieces.

    Args:
        read: gives at most so many bytes; none at the end.

    Raises:
        InputError: it is in another encoding, compressed, or has NUL bytes.
    """
    head = b""
    while len(head) < len(_UTF32[0]) and (chunk := read(_CHUNK)):
        head += chunk
    if head.startswith(_UTF32):
        raise InputError(
            f"{name}: is UTF-32 text, which is not read; UTF-8 is: "
            "iconv -f utf-32 -t utf-8 FILE > NEW"
        )
    if kind := next((kind for magic, kind in _NO_TEXT if head.startswith(magic)), None):
        raise InputError(f"{name}: is {kind}")
    mark, encoding = next((m for m in _MARKS if head.startswith(m[0])), (b"", "UTF-8"))
    decoder = codecs.getincrementaldecoder(encoding)()
    chunk, line = head[len(mark) :], 1
    while True:
        try:
            piece, fault = decoder.decode(chunk, final=not chunk), ""
        except UnicodeDecodeError as error:
            piece = error.object[: error.start].decode(encoding)
            fault = f"is not {encoding} text"
            if encoding == "UTF-8":
                fault += "; if it is Windows-1252: iconv -f cp1252 -t utf-8 FILE > NEW"
        piece, nul, _ = piece.partition("\0")
        if nul:
            fault = "has a NUL byte; is this a text file in UTF-8?"
        if piece:
            yield piece
        line += piece.count("\n")
        if fault:
            raise InputError(f"{name}:{line}: {fault}")
        if not chunk:
            return
        chunk = read(_CHUNK)


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
