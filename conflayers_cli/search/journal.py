"""The journal of a calibration: what it has measured, line by line, until its profile is written.

A line is one JSON object. The first says what is calibrated and how; each other one is an entry of
the :mod:`memo <conflayers_cli.search.memo>`, appended whole and flushed to disk before the search
goes on. Whatever ends a calibration, a signal, a full disk or a power cut, complete lines stay
valid, and a truncated last one is dropped when the journal is opened.
"""

from __future__ import annotations

import base64
import json
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from conflayers_cli.errors import InputError
from conflayers_cli.search.memo import Entry, Usage
from conflayers_cli.utils.distributed import run_on_rank0
from conflayers_cli.utils.file_lock import try_lock
from conflayers_cli.utils.files import check_target, write_error

FORMAT = 4  # raised whenever lines change, or what keys mean
VERSION_KEY = "conflayers_journal"
PENDING_FILE_KEY = "writes"
_DTYPES = {"float32": "<f4", "float64": "<f8", "int64": "<i8", "uint8": "u1", "bool": "?"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class JournalContent:
    """The complete lines of a journal.

    Attributes:
        header: of the first line; None: there is none.
        entries: of the others, by key, in their order.
        size: of all these lines, in bytes.
    """

    header: dict[str, Any] | None = None
    entries: dict[str, Entry] = field(default_factory=dict)
    size: int = 0


class Journal:
    """An open journal, locked by this process; nothing in it is discarded until :meth:`begin`.

    Under torchrun rank 0 has the file; all ranks have its entries.

    Args:
        path: the journal.
        profile: what it is about; where it exists without a journal, it is finished.
        resume: whether to resume from the journal; None: it must hold nothing.
        notify: called with one line where the journal can't be written any longer.

    Attributes:
        path: the file.
        entries: of the calibration to resume.
        resumable: whether the file holds any entry that a later run can resume from.

    Raises:
        InputError: it is another file, does not fit ``resume``, or another process has it.
        ConfLayersError: the file can't be made, read or written.
    """

    def __init__(
        self, path: Path, profile: Path, *, resume: bool | None, notify: Callable[[str], None]
    ) -> None:
        self.path = path
        self.resumable = False
        self._file: BinaryIO | None = None
        self._notify = notify
        self._failed = False
        content = run_on_rank0(lambda: self._open(profile, resume))
        self.entries = content.entries
        self._header = content.header or {}

    def _open(self, profile: Path, resume: bool | None) -> JournalContent:
        """Open and lock the file; returns what it holds to resume from."""
        path = self.path
        check_target(path)
        existed = path.exists()
        try:
            file = path.open("a+b", buffering=0)  # an append is then one system call
        except OSError as error:
            raise write_error(path, error) from error
        try:
            _lock(path, file)
            file.seek(0)
            raw = file.read()
            _check_start(path, raw)
            content = JournalContent() if resume is False else parse_journal(path, raw)
            if content.entries and resume is None:
                raise InputError(
                    f"{path}: a calibration that has not come to its end; "
                    "resume goes on with it, resume=False begins anew",
                    names=("resume goes", "resume=False begins"),
                )
            if resume and not existed and profile.exists():
                raise InputError(
                    f"{profile}: is finished, there is no {path.name} to resume; "
                    "without resume a new calibration begins",
                    names=("resume a new",),
                )
            if content.entries:
                file.truncate(content.size)
        except OSError as error:
            file.close()
            raise write_error(path, error) from error
        except InputError:
            if not existed:
                path.unlink(missing_ok=True)
            file.close()
            raise
        self._file, self.resumable = file, raw.count(b"\n") > 1
        return content

    def begin(self, header: Mapping[str, Any]) -> None:
        """Write what is calibrated and how; a journal to resume from must say the same.

        Raises:
            InputError: it does not; the message names what differs.
            ConfLayersError: it can't be written.
        """
        run_on_rank0(lambda: self._begin(header))

    def _begin(self, header: Mapping[str, Any]) -> None:
        if self.entries:
            check_same(self.path, self._header, header)
        elif self._file is not None:
            try:
                self._file.truncate(0)
                self.resumable = False
                _append_line(self._file, {VERSION_KEY: FORMAT, **header})
            except OSError as error:
                raise write_error(self.path, error) from error

    def append(self, key: str, entry: Entry) -> None:
        """Add a line, and return once it is on disk.

        Where that fails, the user is notified once, and the search goes on without the journal.
        """
        if self._file is None or self._failed:
            return
        try:
            _append_line(self._file, {"key": key, "value": entry.value, "usage": entry.usage})
            self.resumable = True
        except OSError as error:
            self._failed = True
            self._notify(
                f"note: {self.path}: can't be written: {error.strerror or error}; the search goes "
                "on, but if it is killed, what it finds from here on is lost"
            )

    @property
    def pending_file(self) -> str | None:
        """The file that was being written beside the profile when the run before ended, if any."""
        entry = self.entries.get(PENDING_FILE_KEY)
        return entry and entry.value

    def set_pending_file(self, name: str) -> None:
        """Note that a file of this name belongs to this calibration from now on."""
        self.append(PENDING_FILE_KEY, Entry(name, Usage()))

    def remove(self) -> None:
        """Delete the file: the calibration is finished."""
        if self._file is not None:
            with suppress(OSError):  # it can still be resumed, with the same result
                self.path.unlink()
        self._close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        if not self.resumable:
            self.remove()
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _append_line(file: BinaryIO, content: Mapping[str, Any]) -> None:
    """Append a line and flush it to disk, all of it or nothing."""
    line = json.dumps(content, default=_encode, separators=(",", ":")).encode() + b"\n"
    before = os.fstat(file.fileno()).st_size
    try:
        if file.write(line) != len(line):
            raise OSError("the disk is full")
        os.fsync(file.fileno())
    except BaseException:  # an interruption, too, must not leave half a line
        with suppress(OSError):  # a truncated last line is dropped when it is read
            file.truncate(before)
        raise


def parse_journal(path: Path, raw: bytes) -> JournalContent:
    """The complete lines of a journal.

    Raises:
        InputError: it is no journal, or one of another version.
    """
    _check_start(path, raw)
    header: dict[str, Any] | None = None
    entries: dict[str, Entry] = {}
    size = 0
    for line in raw.split(b"\n")[:-1]:
        try:
            found = json.loads(line, object_hook=_decode)
            if header is None:
                header = dict(found)
            else:
                seconds, full_passes, draft_passes = found["usage"]
                usage = Usage(float(seconds), int(full_passes), int(draft_passes))
                entries[str(found["key"])] = Entry(found["value"], usage)
        except (ValueError, KeyError, TypeError, RecursionError):
            break  # damaged: the lines before it are valid
        size += len(line) + 1
    if header is not None and header.pop(VERSION_KEY) != FORMAT:
        raise InputError(
            f"{path}: was written by another version of conflayers; go on with that one, or begin "
            "anew with resume=False",
            names=("resume=False",),
        )
    return JournalContent(header, entries, size)


def _check_start(path: Path, raw: bytes) -> None:
    """Raise InputError where a file does not begin as a journal does."""
    start = f'{{"{VERSION_KEY}":'.encode()
    if raw[: len(start)] != start[: len(raw)]:
        raise InputError(f"{path}: is there already and is no journal of calibrate; move it away")


def _lock(path: Path, file: BinaryIO) -> None:
    """Lock the file for this process, as long as it lives."""
    locked = try_lock(file)
    removed = locked is True and os.fstat(file.fileno()).st_nlink == 0  # its owner just removed it
    if locked is False or removed:
        raise InputError(
            f"{path}: another calibration is at work with it; name another output",
            names=("output",),
        )


def _encode(value: object) -> object:
    """An array for JSON: its bytes, little-endian, in base64."""
    if isinstance(value, np.ndarray):
        dtype = str(value.dtype)
        data = np.ascontiguousarray(value, dtype=_DTYPES[dtype]).tobytes()
        text = base64.b64encode(data).decode("ascii")
        return {"array": text, "dtype": dtype, "shape": value.shape}
    raise TypeError(f"a journal can't hold a {type(value).__name__}")


def _decode(found: dict[str, Any]) -> Any:
    if found.keys() != {"array", "dtype", "shape"}:
        return found
    data = base64.b64decode(found["array"], validate=True)
    dtype = found["dtype"]
    values = np.frombuffer(data, dtype=_DTYPES[dtype]).astype(dtype)  # a writable copy
    return values.reshape(found["shape"])


def check_same(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise InputError unless two headers are equal; the first two differences are named."""
    one, other = _flatten(there), _flatten(json.loads(json.dumps(here, allow_nan=False)))
    differing = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    if differing:
        named = "; ".join(
            f"{key} {_shorten(one.get(key))} there, {_shorten(other.get(key))} here"
            for key in differing[:2]
        )
        raise InputError(
            f"{path}: is of another calibration: {named}; resume=False begins anew in its place",
            names=("resume=False",),
        )


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves by their dotted path, such as ``settings.patience``."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        leaves |= _flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return leaves


def _shorten(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def journal_path(profile: Path) -> Path:
    """Where the journal of a profile goes: beside it."""
    return profile.with_name(f"{profile.stem}.journal.jsonl")


def temporary_name(path: Path) -> str:
    """The file that is written before it takes the place of ``path``.

    The same in every run, so that killed runs leave nothing behind.
    """
    return f".conflayers-{sha256(path.name.encode()).hexdigest()[:12]}.tmp"


def open_journal(profile: Path, resume: bool | None) -> Journal:
    """The journal beside a profile; a note says what is resumed.

    Raises:
        InputError, ConfLayersError: as `Journal`.
    """
    journal = Journal(journal_path(profile), profile, resume=resume, notify=logger.warning)
    if journal.entries:
        seconds = max(entry.usage.seconds for entry in journal.entries.values())
        logger.info(f"going on with {journal.path}: {seconds:.0f} s of work so far")
    elif resume:
        logger.warning(f"note: there is no {journal.path} to go on with: beginning")
    return journal
