"""Compressed files, read as far as they are asked for."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import BinaryIO, Protocol

from conflayers_cli.errors import InputError
from conflayers_cli.utils.error_text import first_line


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


_Opener = Callable[[BinaryIO], _Readable]


def _gzip(file: BinaryIO) -> _Readable:
    return gzip.GzipFile(fileobj=file)


COMPRESSED: Mapping[str, _Opener] = MappingProxyType(
    {".gz": _gzip, ".bz2": bz2.BZ2File, ".xz": lzma.LZMAFile}
)
"""What reads them, by the ends of their names."""


def decompressed(file: BinaryIO, name: str, suffix: str) -> Callable[[int], bytes]:
    """What reads so many bytes of a file's content.

    Args:
        name: of the file, for errors.
        suffix: one of `COMPRESSED`.

    Reading raises InputError where it is not what its name says, or is cut off.
    """
    opened = COMPRESSED[suffix](file)

    def read(size: int) -> bytes:
        try:
            return opened.read(size)
        except (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
            raise InputError(f"{name}: can't be decompressed: {first_line(error)}") from error

    return read
