"""The journal of a calibration: what it has measured, line by line, until its profile is written.

A line is one JSON object: the first says what is calibrated and how, each other one is an entry of
the search's :mod:`record <conflayers_cli.search.record>`, appended whole and put on the disk before
the search goes on. Whatever ends a calibration, a signal, a full disk or a power cut, the lines
before that stay good, and a last one that was cut off is dropped when the journal is opened.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from conflayers_cli.errors import InputError
from conflayers_cli.journal_lines import (
    NOTHING,
    Content,
    check_same,
    entry_line,
    header_line,
    line_of,
    parsed,
)
from conflayers_cli.search.record import Entry
from conflayers_cli.utils.distributed import on_first
from conflayers_cli.utils.file_lock import try_lock
from conflayers_cli.utils.files import check_target, unwritable


class Journal:
    """A journal, open: this process' alone. Use :meth:`open`, then :meth:`begin`.

    Of several processes of one torchrun the first has the file.

    Attributes:
        path: the file.
        entries: those of the calibration to go on with.
        writes: the file that was being written beside the profile when it ended, if it came to
            that.
        goes_on: whether the file holds anything that a later run can go on with.
    """

    def __init__(
        self,
        path: Path,
        file: BinaryIO | None,
        content: Content,
        tell: Callable[[str], None],
        worth: bool = False,
    ) -> None:
        self.path = path
        self.entries = content.entries
        self.writes = content.writes
        self._header = content.header
        self._ends = list(content.ends)
        self._file = file
        self._tell = tell
        self._lost = False
        self.goes_on = worth

    @classmethod
    def open(
        cls, path: Path, profile: Path, *, resume: bool | None, tell: Callable[[str], None]
    ) -> Journal:
        """Open a journal, or begin one, before any work is done; what it holds stays until `begin`.

        Args:
            path: the journal.
            profile: what it is about; where it is there without a journal, it is finished.
            resume: go on with what the journal holds, or don't; None: it must hold nothing.
            tell: told where the journal can't be kept any longer.

        Raises:
            InputError: there is something else, or what is there does not fit ``resume``; or
                another process is at work with it.
            ConfLayersError: the file can't be made, read or written.
        """
        opened: list[Journal] = []

        def work() -> Content:
            file, there = _opened(path, profile, resume)
            content = there if resume else NOTHING
            opened.append(cls(path, file, content, tell, bool(there.entries)))
            return content

        content = on_first(work)
        return opened[0] if opened else cls(path, None, content, tell)

    def begin(self, header: Mapping[str, Any]) -> None:
        """Say what is calibrated and how; a journal to go on with must say the same.

        Raises:
            InputError: it does not; the message names what differs.
            ConfLayersError: it can't be written.
        """
        on_first(lambda: self._begin(header))

    def _begin(self, header: Mapping[str, Any]) -> None:
        if self.entries:
            check_same(self.path, self._header or {}, header)
            return
        try:
            self._truncate(0)
            self.goes_on = False
            self._ends = [self._write(header_line(header))]
        except OSError as error:
            raise unwritable(self.path, error) from error

    def append(self, entry: Entry) -> None:
        """Add a line, and return once it is on the disk.

        Where that can't be, it is told once, and the search goes on without a journal: the lines
        before stay good.
        """
        end = self._keep(entry_line(entry))
        if end:
            self._ends.append(end)
            self.goes_on = True

    def cut(self, count: int) -> None:
        """Keep the first ``count`` entries only, and tell."""
        self._tell(
            f"note: {self.path}: the search takes another way than it did behind entry {count}; "
            "what follows is measured anew"
        )
        if self._file is not None and not self._lost and count + 1 < len(self._ends):
            try:
                self._truncate(self._ends[count])
                del self._ends[count + 1 :]
                self.goes_on = count > 0
            except OSError as error:
                self._lose(error)

    def will_write(self, name: str) -> None:
        """Note that a file of this name is this calibration's own from now on."""
        end = self._keep(line_of({"writes": name}))
        if end:
            self._ends[-1] = end

    def remove(self) -> None:
        """The journal is not needed any more."""
        if self._file is not None:
            with suppress(OSError):  # it can still be resumed, to the same end
                self.path.unlink()
        self._close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *of_error: object) -> None:
        if not self.goes_on:
            self.remove()
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _keep(self, line: bytes) -> int:
        """Append a line; where it ends, 0 where it can't be kept."""
        if self._file is None or self._lost:
            return 0
        try:
            return self._write(line)
        except OSError as error:
            self._lose(error)
            return 0

    def _lose(self, error: OSError) -> None:
        self._lost = True
        self._tell(
            f"note: {self.path}: can't be written: {error.strerror or error}; the search goes on, "
            "but if it is killed, what it finds from here on is lost"
        )

    def _write(self, line: bytes) -> int:
        """Append a line, all of it or nothing; where it ends."""
        if self._file is None:
            return 0
        before = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) != len(line):
                raise OSError("the disk is full")
            os.fsync(self._file.fileno())
        except BaseException:  # an interruption, too, must not leave half a line
            with suppress(OSError):  # half a line at the end is dropped by who reads it
                self._truncate(before)
            raise
        return before + len(line)

    def _truncate(self, size: int) -> None:
        if self._file is not None:
            self._file.truncate(size)


def _opened(path: Path, profile: Path, resume: bool | None) -> tuple[BinaryIO, Content]:
    """The journal's file, locked, and what it holds of use; what is behind that is cut off."""
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
        content = parsed(path, raw)
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
        if resume and content.entries and content.ends[-1] < len(raw):
            file.truncate(content.ends[-1])
    except OSError as error:
        file.close()
        raise unwritable(path, error) from error
    except InputError:
        if not known:
            path.unlink(missing_ok=True)
        file.close()
        raise
    return file, content


def _lock(path: Path, file: BinaryIO) -> None:
    """Have the file for this process alone, as long as it lives."""
    taken = try_lock(file)
    gone = taken is True and os.fstat(file.fileno()).st_nlink == 0  # its owner just removed it
    if taken is False or gone:
        raise InputError(
            f"{path}: another calibration is at work with it; name another output",
            names=("output",),
        )
