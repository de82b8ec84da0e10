"""The journal of a calibration: what it has measured, line by line, until its profile is written.

A line is one JSON object. The first says what is calibrated and how; each other one is an entry of
the :mod:`memo <conflayers_cli.search.memo>`, appended whole and put on the disk before the search
goes on. Whatever ends a calibration, a signal, a full disk or a power cut, the lines before that
stay good, and a last one that was cut off is dropped when the journal is opened.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from conflayers_cli.errors import InputError
from conflayers_cli.search.memo import Entry, Usage
from conflayers_cli.utils.distributed import on_first
from conflayers_cli.utils.file_lock import try_lock
from conflayers_cli.utils.files import check_target, unwritable

FORMAT = 2
"""Raised whenever lines change, or what keys mean."""
MARK = "conflayers_journal"
WRITES = "writes"
"""The key of the file that is being written beside the profile."""
_DTYPES = {"float32": "<f4", "float64": "<f8", "int64": "<i8", "uint8": "u1", "bool": "?"}


@dataclass(frozen=True)
class Content:
    """What a journal's file holds, as far as its lines are whole.

    Attributes:
        header: of the first line; None: there is none.
        entries: of the others, by key, in their order.
        size: of all these lines, in bytes.
    """

    header: dict[str, Any] | None = None
    entries: dict[str, Entry] = field(default_factory=dict)
    size: int = 0


class Journal:
    """A journal, open, and this process's alone. Use :meth:`open`, then :meth:`begin`.

    Of several processes of one torchrun the first has the file; all have its entries.

    Attributes:
        path: the file.
        entries: of the calibration to go on with.
        goes_on: whether the file holds anything that a later run can go on with.
    """

    def __init__(
        self,
        path: Path,
        file: BinaryIO | None,
        content: Content,
        notify: Callable[[str], None],
        goes_on: bool = False,
    ) -> None:
        self.path = path
        self.entries = content.entries
        self.goes_on = goes_on
        self._header = content.header or {}
        self._file = file
        self._notify = notify
        self._lost = False

    @classmethod
    def open(
        cls, path: Path, profile: Path, *, resume: bool | None, notify: Callable[[str], None]
    ) -> Journal:
        """Open a journal, or begin one, before any work is done; what it holds stays until `begin`.

        Args:
            path: the journal.
            profile: what it is about; where it is there without a journal, it is finished.
            resume: go on with what the journal holds, or don't; None: it must hold nothing.
            notify: called with one line where the journal can't be kept any longer.

        Raises:
            InputError: there is something else, or what is there does not fit ``resume``; or
                another process is at work with it.
            ConfLayersError: the file can't be made, read or written.
        """
        opened: list[Journal] = []

        def work() -> Content:
            file, content, holds = _opened(path, profile, resume)
            opened.append(cls(path, file, content, notify, holds))
            return content

        content = on_first(work)
        return opened[0] if opened else cls(path, None, content, notify)

    def begin(self, header: Mapping[str, Any]) -> None:
        """Say what is calibrated and how; a journal to go on with must say the same.

        Raises:
            InputError: it does not; the message names what differs.
            ConfLayersError: it can't be written.
        """
        on_first(lambda: self._begin(header))

    def _begin(self, header: Mapping[str, Any]) -> None:
        if self.entries:
            check_same(self.path, self._header, header)
        elif self._file is not None:
            try:
                self._file.truncate(0)
                self.goes_on = False
                self._write({MARK: FORMAT, **header})
            except OSError as error:
                raise unwritable(self.path, error) from error

    def append(self, key: str, entry: Entry) -> None:
        """Add a line, and return once it is on the disk.

        Where that can't be, a note says so once, and the search goes on without a journal: the
        lines before stay good.
        """
        if self._file is None or self._lost:
            return
        try:
            self._write({"key": key, "value": entry.value, "usage": entry.usage})
            self.goes_on = True
        except OSError as error:
            self._lost = True
            self._notify(
                f"note: {self.path}: can't be written: {error.strerror or error}; the search goes "
                "on, but if it is killed, what it finds from here on is lost"
            )

    @property
    def writes(self) -> str | None:
        """The file that was being written beside the profile when the run before ended, if any."""
        return self.entries[WRITES].value if WRITES in self.entries else None

    def will_write(self, name: str) -> None:
        """Note that a file of this name is this calibration's own from now on."""
        self.append(WRITES, Entry(name, Usage()))

    def remove(self) -> None:
        """The journal is not needed any more."""
        if self._file is not None:
            with suppress(OSError):  # it can still be resumed, to the same end
                self.path.unlink()
        self._close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        if not self.goes_on:
            self.remove()
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, content: Mapping[str, Any]) -> None:
        """Append a line, all of it or nothing."""
        file = self._file
        if file is None:
            return
        line = json.dumps(content, default=_encoded, separators=(",", ":")).encode() + b"\n"
        before = os.fstat(file.fileno()).st_size
        try:
            if file.write(line) != len(line):
                raise OSError("the disk is full")
            os.fsync(file.fileno())
        except BaseException:  # an interruption, too, must not leave half a line
            with suppress(OSError):  # half a line at the end is dropped by who reads it
                file.truncate(before)
            raise


def parsed(path: Path, raw: bytes) -> Content:
    """The content of a journal, as far as its lines are whole.

    Raises:
        InputError: it is no journal, or one of another version.
    """
    _check_mark(path, raw)
    header: dict[str, Any] | None = None
    entries: dict[str, Entry] = {}
    size = 0
    for line in raw.split(b"\n")[:-1]:
        try:
            found = json.loads(line, object_hook=_decoded)
            if header is None:
                header = dict(found)
            else:
                seconds, full_passes, draft_passes = found["usage"]
                usage = Usage(float(seconds), int(full_passes), int(draft_passes))
                entries[str(found["key"])] = Entry(found["value"], usage)
        except (ValueError, KeyError, TypeError, RecursionError):
            break  # damaged: what is before it is good
        size += len(line) + 1
    if header is not None and header.pop(MARK) != FORMAT:
        raise InputError(
            f"{path}: was written by another version of conflayers; go on with that one, or begin "
            "anew with resume=False",
            names=("resume=False",),
        )
    return Content(header, entries, size)


def _check_mark(path: Path, raw: bytes) -> None:
    """Raise InputError where a file begins unlike a journal."""
    start = f'{{"{MARK}":'.encode()
    if raw[: len(start)] != start[: len(raw)]:
        raise InputError(f"{path}: is there already and is no journal of calibrate; move it away")


def _opened(path: Path, profile: Path, resume: bool | None) -> tuple[BinaryIO, Content, bool]:
    """The journal's file, locked, what it holds of use, and whether it holds any outcome at all."""
    check_target(path)
    known = path.exists()
    try:
        file = path.open("a+b", buffering=0)  # an append is then one write of the system
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        _lock(path, file)
        file.seek(0)
        raw = file.read()
        _check_mark(path, raw)
        content = Content() if resume is False else parsed(path, raw)
        if content.entries and resume is None:
            raise InputError(
                f"{path}: a calibration that has not come to its end; "
                "resume goes on with it, resume=False begins anew",
                names=("resume goes", "resume=False begins"),
            )
        if resume and not known and profile.exists():
            raise InputError(
                f"{profile}: is finished, there is no {path.name} to resume; "
                "without resume a new calibration begins",
                names=("resume a new",),
            )
        if content.entries:
            file.truncate(content.size)
    except OSError as error:
        file.close()
        raise unwritable(path, error) from error
    except InputError:
        if not known:
            path.unlink(missing_ok=True)
        file.close()
        raise
    return file, content, raw.count(b"\n") > 1


def _lock(path: Path, file: BinaryIO) -> None:
    """Have the file for this process alone, as long as it lives."""
    taken = try_lock(file)
    gone = taken is True and os.fstat(file.fileno()).st_nlink == 0  # its owner just removed it
    if taken is False or gone:
        raise InputError(
            f"{path}: another calibration is at work with it; name another output",
            names=("output",),
        )


def _encoded(value: object) -> object:
    """An array for JSON: its bytes, little-endian, in base64."""
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
    one, other = _leaves(there), _leaves(json.loads(json.dumps(here, allow_nan=False)))
    differing = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    if differing:
        named = "; ".join(
            f"{key} {_shown(one.get(key))} there, {_shown(other.get(key))} here"
            for key in differing[:2]
        )
        raise InputError(
            f"{path}: is of another calibration: {named}; resume=False begins anew in its place",
            names=("resume=False",),
        )


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves by the way to them, as in ``settings.patience``."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        leaves |= _leaves(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return leaves


def _shown(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
