"""Result files: atomic writes, and JSON lines that can be resumed."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from conflayers_cli.errors import ConfLayersError, InputError
from conflayers_cli.utils.distributed import is_rank0, run_on_rank0
from conflayers_cli.utils.file_lock import try_lock


@dataclass(frozen=True)
class LineKey:
    """Identifies the prompt and settings that a line of an output belongs to."""

    index: int
    request_sha256: str


def write_error(path: Path, error: OSError) -> ConfLayersError:
    return ConfLayersError(f"{path}: can't be written: {error.strerror or error}")


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Within: OSErrors become ConfLayersErrors that name the file."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


def check_target(path: Path) -> None:
    """Raise InputError where a path's folder does not exist, or it is a folder or a device."""
    with naming_file(path):  # the name may be too long, the folder not readable
        target = Path(os.path.realpath(path))
        if not target.parent.is_dir():
            raise InputError(f"{path}: the folder {target.parent} does not exist")
        if target.exists() and not target.is_file():
            raise InputError(f"{path}: is a folder or a device, a file is needed")


def write_json(path: Path, document: Any) -> None:
    """Write a JSON document atomically; errors as `write_atomically`."""
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, indent=2)
    write_atomically(path, f"{text}\n")


def write_atomically(path: Path, content: str | bytes, *, temporary: str | None = None) -> None:
    """Replace ``path`` by a file with ``content``, so that no reader ever sees half of it.

    Text is written as UTF-8. Under torchrun only rank 0 writes. ``temporary`` names the file in the
    same folder that is written first, for a process that alone writes there and overwrites what a
    killed run left; by default it has a new name.

    Raises:
        InputError: as `check_target`.
        ConfLayersError: the file can't be written.
    """
    if not is_rank0():
        return
    check_target(path)
    target = Path(os.path.realpath(path))  # write through a link, don't replace it
    beside = target.parent / (temporary or f".conflayers-{secrets.token_hex(6)}.tmp")
    with naming_file(path):
        try:
            # opened like any new file, so that the user's umask applies
            with beside.open("wb" if temporary else "xb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)


class JsonLines:
    """A file of one JSON object per prompt, in order, each appended whole.

    Made by `open`; ``done`` is the number of lines found there. Under torchrun rank 0 alone has the
    file, which is locked (see :mod:`.file_lock`).
    """

    def __init__(self, path: Path, file: BinaryIO | None, done: int) -> None:
        self._path = path
        self._file = file
        self._size = 0 if file is None else os.fstat(file.fileno()).st_size
        self.done = done

    @classmethod
    def open(cls, path: Path, keys: Sequence[LineKey], *, resume: bool) -> JsonLines:
        """Begin an output for the prompts that ``keys`` name, or resume one.

        A last line without its line end was cut off while it was written and is dropped.

        Raises:
            InputError: the file can't be made there; another process is writing to it; it has
                content and ``resume`` is not set; or a line does not belong to the prompt with its
                number.
            ConfLayersError: the file can't be read or written.
        """
        opened: list[JsonLines] = []

        def open_here() -> int:
            opened.append(cls._open(path, keys, resume))
            return opened[0].done

        done = run_on_rank0(open_here)
        return opened[0] if opened else cls(path, None, done)

    @classmethod
    def _open(cls, path: Path, keys: Sequence[LineKey], resume: bool) -> JsonLines:
        check_target(path)
        with naming_file(path), ExitStack() as on_error:
            # unbuffered: an append is one system call
            file = on_error.enter_context(path.open("a+b", buffering=0))
            if try_lock(file) is False:
                raise InputError(f"{path}: another process is writing to it")
            file.seek(0)
            content = file.read()
            if content and not resume:
                raise InputError(
                    f"{path}: holds something already; resume goes on behind its last line",
                    names=("resume goes",),
                )
            whole = content.rfind(b"\n") + 1
            lines = content[:whole].split(b"\n")[:-1]
            _check_lines(path, lines, keys)
            if whole < len(content):
                file.truncate(whole)
            on_error.pop_all()  # the file stays open
        return cls(path, file, len(lines))

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line, and return once it is on the disk.

        Raises:
            ConfLayersError: it can't be written, or the file was changed; earlier lines stay whole.
        """
        if self._file is None:
            return
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
        data = f"{text}\n".encode()
        with naming_file(self._path):
            self._check_unchanged(self._file)
            try:
                rest = memoryview(data)
                while rest:  # after a partial write the next one raises the reason
                    rest = rest[self._file.write(rest) :]
            except OSError:
                self._file.truncate(self._size)
                raise
            self._size += len(data)
            os.fsync(self._file.fileno())

    def _check_unchanged(self, file: BinaryIO) -> None:
        """Raise ConfLayersError where the path is another file now, or others wrote to it."""
        ours = os.fstat(file.fileno())
        try:
            same = os.path.samestat(ours, self._path.stat())
        except FileNotFoundError:
            same = False
        if not same:
            raise ConfLayersError(
                f"{self._path}: was removed or replaced while it was being written"
            )
        if ours.st_size != self._size:
            raise ConfLayersError(
                f"{self._path}: was changed by somebody else while it was being written"
            )

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *of_error: object) -> None:
        if self._file is not None:
            self._file.close()


def _check_lines(path: Path, lines: Sequence[bytes], keys: Sequence[LineKey]) -> None:
    if len(lines) > len(keys):
        raise InputError(
            f"{path}: has {len(lines)} lines, more than there are prompts: {len(keys)}"
        )
    for number, (line, key) in enumerate(zip(lines, keys, strict=False), 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise InputError(f"{path}:{number}: is not JSON; it can't be resumed") from None
        if not isinstance(record, dict):
            raise InputError(f"{path}:{number}: is not an answer; it can't be resumed")
        found = (record.get("index"), record.get("request_sha256"))
        if found != (key.index, key.request_sha256):
            raise InputError(
                f"{path}:{number}: answers another prompt than number {number} of the prompt file, "
                "or was made with other settings; it can't be resumed"
            )
