"""The lines of a calibration's journal: how an entry is written, and what a file of them says."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conflayers_cli.errors import InputError
from conflayers_cli.search.record import Entry, Meter

FORMAT = 1
"""Raised whenever lines change, or what a search asks, or the order in which it does."""
MARK = "conflayers_journal"
_DTYPES = {"float32": "<f4", "float64": "<f8", "int64": "<i8", "uint8": "u1", "bool": "?"}


@dataclass(frozen=True)
class Content:
    """What a journal's file holds.

    Attributes:
        header: of its first line; None: there is none.
        entries: as far as lines are whole.
        ends: where the header and each of the entries end, in bytes; a mark behind one is its part.
        writes: the file that was being written beside the profile, if it came to that.
    """

    header: dict[str, Any] | None
    entries: tuple[Entry, ...]
    ends: tuple[int, ...]
    writes: str | None


NOTHING = Content(None, (), (), None)


def line_of(content: Mapping[str, Any]) -> bytes:
    """One line of the file; arrays as their bytes, little-endian, in base64."""
    return f"{json.dumps(content, default=_encoded, separators=(',', ':'))}\n".encode()


def header_line(header: Mapping[str, Any]) -> bytes:
    """The first line."""
    return line_of({MARK: FORMAT, **header})


def entry_line(entry: Entry) -> bytes:
    """The line of an entry."""
    return line_of({"entry": entry.number, **vars(entry.meter), "outcomes": entry.outcomes})


def parsed(path: Path, raw: bytes) -> Content:
    """The content of a journal, as far as its lines are whole.

    Raises:
        InputError: it is no journal, or one of another version.
    """
    lines = [line + b"\n" for line in raw.split(b"\n")[:-1]]
    header = _header(path, lines[0] if lines else raw)
    entries: list[Entry] = []
    ends = [len(line) for line in lines[:1]]
    writes: str | None = None
    for line in lines[1:]:
        try:
            found = json.loads(line, object_hook=_decoded)
            if "writes" in found:
                writes = str(found["writes"])
                ends[-1] += len(line)
            else:
                entries.append(_entry(found, len(entries) + 1))
                ends.append(ends[-1] + len(line))
        except (ValueError, KeyError, TypeError, RecursionError):
            break  # damaged: what is before it is good
    return Content(header, tuple(entries), tuple(ends), writes)


def _header(path: Path, line: bytes) -> dict[str, Any] | None:
    """The first line; None where there is none, or only the beginning of one."""
    start = f'{{"{MARK}":'.encode()
    if line[: len(start)] != start[: len(line)]:
        raise InputError(f"{path}: is there already and is no journal of calibrate; move it away")
    try:
        found: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    if found.pop(MARK) != FORMAT:
        raise InputError(
            f"{path}: was written by another version of conflayers; "
            "go on with that one, or delete it to begin anew"
        )
    return found


def _entry(found: Mapping[str, Any], number: int) -> Entry:
    if found["entry"] != number:
        raise ValueError("an entry is missing")
    meter = Meter(float(found["seconds"]), int(found["full_passes"]), int(found["draft_passes"]))
    return Entry(number, meter, tuple((str(key), value) for key, value in found["outcomes"]))


def _encoded(value: object) -> object:
    """What JSON has no form for."""
    if isinstance(value, np.ndarray):
        dtype = str(value.dtype)
        data = np.ascontiguousarray(value, dtype=_DTYPES[dtype]).tobytes()
        text = base64.b64encode(data).decode("ascii")
        return {"array": text, "dtype": dtype, "shape": value.shape}
    raise TypeError(f"{type(value).__name__} is nothing that a journal holds")


def _decoded(found: dict[str, Any]) -> Any:
    if found.keys() != {"array", "dtype", "shape"}:
        return found
    data = base64.b64decode(found["array"], validate=True)
    dtype = found["dtype"]
    values = np.frombuffer(data, dtype=_DTYPES[dtype]).astype(dtype)  # a copy, to be written to
    return values.reshape(found["shape"])


def check_same(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise InputError unless two headers say the same; the first two differences are named."""
    one, other = _flat(there), _flat(json.loads(json.dumps(here, allow_nan=False)))
    differing = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    if differing:
        named = "; ".join(
            f"{key} {_shown(one.get(key))} there, {_shown(other.get(key))} here"
            for key in differing[:2]
        )
        raise InputError(
            f"{path}: is of another calibration: {named}; resume=False begins anew in its place",
            names=("resume=False begins",),
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves by the way to them, as in ``settings.patience``."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        leaves |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return leaves


def _shown(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
