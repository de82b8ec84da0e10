"""The header of a GGUF file: its metadata, and the names of its tensors.

The gguf package reads it, too, but makes an object of every token of the vocabulary, which takes
some seconds; here arrays are read when they are asked for.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import inf, prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

MAGIC = b"GGUF"
MAX_ENTRIES = 1 << 20
"""Entries, tensors, or items of an array of texts beyond which a file is broken."""
_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_FLOAT32 = 0


@dataclass(frozen=True)
class GGUFMetadata:
    """What a file's header says.

    Attributes:
        values: numbers and texts by key; of an array how many items it has.
        arrays: for each array (type of its items, offset of the first in the file).
        tensors: for each tensor (type, shape, offset in the file).
        path: the file.
    """

    values: dict[str, Any]
    arrays: dict[str, tuple[int, int]]
    tensors: dict[str, tuple[int, tuple[int, ...], int]]
    path: Path

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture", ""))

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a key of the architecture's own, such as ``context_length``."""
        return self.values.get(f"{self.architecture}.{name}", default)

    def number(self, *names: str) -> float | None:
        """The value of the first of some keys that is there; ValueError: it is no such number."""
        for name in names:
            value = self.get(name)
            if value is None:
                continue
            if not isinstance(value, int | float) or not 0 <= value < inf:
                raise ValueError(f"{self.architecture}.{name} is {value!r:.60}, which can't be")
            return value
        return None

    def floats(self, tensor: str) -> npt.NDArray[np.float32] | None:
        """The numbers of a small float32 tensor; None: there is none. ValueError: it is cut off."""
        found = self.tensors.get(tensor)
        if found is None or found[0] != _FLOAT32:
            return None
        _, shape, offset = found
        if offset + 4 * prod(shape) > self.path.stat().st_size:
            raise ValueError(f"{tensor} is cut off")
        return np.fromfile(self.path, np.float32, prod(shape), offset=offset)

    def texts(self, key: str) -> list[str] | None:
        """The items of an array of texts; None: there is no such array."""
        kind, offset = self.arrays.get(key, (None, 0))
        if kind != _STRING:
            return None
        with (
            self.path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            reader = _Reader(data, offset)
            return [reader.text() for _ in range(self.values[key])]

    def numbers(self, key: str) -> list[Any] | None:
        """The items of an array of numbers; None: there is no such array."""
        kind, offset = self.arrays.get(key, (None, 0))
        if kind not in _NUMBERS:
            return None
        dtype = np.dtype(f"<{_NUMBERS[kind]}")
        found = np.fromfile(self.path, dtype, self.values[key], offset=offset)
        items: list[Any] = found.tolist()
        return items


class _Reader:
    """Reads one thing behind the other."""

    def __init__(self, data: mmap.mmap, at: int = 0) -> None:
        self._data = data
        self.at = at

    def number(self, kind: str) -> Any:
        size = struct.calcsize(f"<{kind}")
        (value,) = struct.unpack_from(f"<{kind}", self._data, self.at)
        self.at += size
        return value

    def text(self) -> str:
        begin = self.skip(self.number("Q"))
        return self._data[begin : self.at].decode("utf-8", "replace")

    def skip(self, count: int) -> int:
        """Go on behind so many bytes; returns where they begin."""
        begin = self.at
        self.at += count
        if self.at > len(self._data):
            raise ValueError("it ends too early")
        return begin

    def array(self) -> tuple[int, int, int]:
        """Go on behind an array: (type of its items, how many, where they begin)."""
        items, count = self.number("I"), self.number("Q")
        begin = self.at
        if items in _NUMBERS:
            self.skip(count * struct.calcsize(f"<{_NUMBERS[items]}"))
        elif items == _STRING and count <= MAX_ENTRIES:
            for _ in range(count):
                self.skip(self.number("Q"))
        else:
            raise ValueError(f"an array of {count} items of type {items}")
        return items, count, begin


def read_metadata(path: Path) -> GGUFMetadata:
    """The header of a file.

    Raises:
        OSError: it can't be read.
        ValueError: it is broken, or no GGUF file of version 2 or 3.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _parse(_Reader(data), data, path)
        except (struct.error, KeyError, OverflowError) as error:
            raise ValueError(f"its header is broken: {error}") from error


def _parse(reader: _Reader, data: mmap.mmap, path: Path) -> GGUFMetadata:
    if data[:4] != MAGIC:
        raise ValueError("it is no GGUF file")
    reader.skip(4)
    version = reader.number("I")
    if version and not version & 0xFFFF:
        raise ValueError("its numbers are big-endian: gguf-convert-endian FILE little turns them")
    tensors, entries = reader.number("Q"), reader.number("Q")
    if version not in (2, 3) or max(tensors, entries) > MAX_ENTRIES:
        raise ValueError(f"version {version}, {tensors} tensors, {entries} entries")
    values: dict[str, Any] = {}
    arrays: dict[str, tuple[int, int]] = {}
    for _ in range(entries):
        key, kind = reader.text(), reader.number("I")
        if key in values:
            raise ValueError(f"it has {key[:60]!r} twice")
        if kind == _ARRAY:
            items, values[key], begin = reader.array()
            arrays[key] = items, begin
        else:
            values[key] = reader.text() if kind == _STRING else reader.number(_NUMBERS[kind])
    found: dict[str, tuple[int, tuple[int, ...], int]] = {}
    for _ in range(tensors):
        name = reader.text()
        shape = tuple(reader.number("Q") for _ in range(min(reader.number("I"), 8)))
        found[name] = (reader.number("I"), shape, reader.number("Q"))
    alignment = int(values.get("general.alignment", 32)) or 32
    begin = -(-reader.at // alignment) * alignment
    placed = {name: (kind, shape, begin + at) for name, (kind, shape, at) in found.items()}
    for name, (kind, shape, at) in placed.items():
        if at + _size(name, kind, shape) > len(data):
            raise ValueError(f"it ends too early, before {name[:60]!r}: is it whole?")
    return GGUFMetadata(values, arrays, placed, path)


def _size(name: str, kind: int, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; raises ValueError for a type that is not known."""
    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except ValueError:
        raise ValueError(f"{name} is of type {kind}, which is not known") from None
    return prod(shape) // block * size
