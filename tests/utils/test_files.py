from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from conflayers_cli.errors import ConfLayersError, InputError
from conflayers_cli.utils import file_lock, files
from conflayers_cli.utils.files import JsonLines, LineKey

KEYS = [LineKey(index, f"hash{index}") for index in range(3)]


def record(key: LineKey) -> dict[str, Any]:
    return {"index": key.index, "request_sha256": key.request_sha256, "text": "ü\n\u2028\r"}


def write(path: Path, *, resume: bool) -> int:
    """Write what is missing; returns how many lines were there."""
    with JsonLines.open(path, KEYS, resume=resume) as lines:
        for key in KEYS[lines.done :]:
            lines.append(record(key))
        return lines.done


def test_a_cut_at_any_byte_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    assert write(path, resume=False) == 0
    whole = path.read_bytes()
    assert [json.loads(line) for line in whole.split(b"\n")[:-1]] == [record(key) for key in KEYS]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        assert write(path, resume=True) == whole[:cut].count(b"\n")
        assert path.read_bytes() == whole


def test_resume_begins_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert write(tmp_path / "out.jsonl", resume=True) == 0


def test_an_empty_file_needs_no_resume(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").touch()
    assert write(tmp_path / "out.jsonl", resume=False) == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{}\n", ":1: answers another prompt"),
        (b'{"index": 0, "request_sha256": "hash1"}\n', ":1: answers another prompt"),
        (b"[]\n", ":1: is not an answer"),
        (b"\n", ":1: is not JSON"),
        (b"\xff\n", ":1: is not JSON"),
        (b'{"index": 0, "request_sha256": "hash0"}\nnonsense\n', ":2: is not JSON"),
        (b"{}\n" * 4, "has 4 lines, more than there are prompts: 3"),
    ],
)
def test_resume_refuses_what_it_did_not_write(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        JsonLines.open(path, KEYS, resume=True)
    assert f"{path}" in str(caught.value)
    assert said in str(caught.value)
    assert path.read_bytes() == content


def test_no_resume_keeps_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("x")
    with pytest.raises(InputError, match="resume goes on"):
        JsonLines.open(tmp_path / "out.jsonl", KEYS, resume=False)
    assert (tmp_path / "out.jsonl").read_text() == "x"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_disk_that_is_full_keeps_the_lines_whole(tmp_path: Path) -> None:
    import resource
    import signal

    path = tmp_path / "out.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with JsonLines.open(path, KEYS, resume=False) as lines:
        lines.append(record(KEYS[0]))
        whole = path.read_bytes()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 5, before[1]))
            with pytest.raises(ConfLayersError, match="can't be written"):
                lines.append(record(KEYS[1]))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("written", [0, 1, 7])
def test_a_write_that_fails_half_way_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    path = tmp_path / "out.jsonl"
    with JsonLines.open(path, KEYS, resume=False) as lines:
        lines.append(record(KEYS[0]))
        whole = path.read_bytes()
        file = Failing(lines._file, written)
        lines._file = file  # type: ignore[assignment]
        with pytest.raises(ConfLayersError, match=r"out\.jsonl: can't be written: Input/output"):
            lines.append(record(KEYS[1]))
        assert path.read_bytes() == whole
        file.broken = False
        lines.append(record(KEYS[1]))  # whoever tries again goes on
    assert write(path, resume=True) == 2


class Failing:
    """A file whose writes fail after some bytes."""

    def __init__(self, file: Any, written: int) -> None:
        self._file, self._written, self.broken = file, written, True

    def write(self, data: memoryview) -> int:
        if not self.broken:
            return int(self._file.write(data))
        if not self._written:
            raise OSError(errno.EIO, "Input/output error")
        done = int(self._file.write(data[: self._written]))
        self._written = 0
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def test_a_write_that_comes_in_parts_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with JsonLines.open(path, KEYS, resume=False) as lines:
        file = lines._file
        assert file is not None

        class Slow(Failing):
            def write(self, data: memoryview) -> int:
                return int(self._file.write(data[:5]))

        lines._file = Slow(file, 0)  # type: ignore[assignment]
        lines.append(record(KEYS[0]))
    assert [json.loads(line) for line in path.read_bytes().splitlines()] == [record(KEYS[0])]


def test_a_file_that_another_has_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with JsonLines.open(path, KEYS, resume=False) as lines:
        lines.append(record(KEYS[0]))
        for resume in (True, False):
            with pytest.raises(InputError, match="another process is writing to it"):
                JsonLines.open(path, KEYS, resume=resume)
        lines.append(record(KEYS[1]))
    assert write(path, resume=True) == 2


def test_where_there_are_no_locks_nobody_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(descriptor: int, *, blocking: bool) -> bool:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(file_lock, "lock_descriptor", unsupported)
    assert write(tmp_path / "out.jsonl", resume=False) == 0


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_lines_don_t_go_to_a_file_that_nobody_finds(tmp_path: Path, how: str) -> None:
    path, other = tmp_path / "out.jsonl", tmp_path / "other"
    with JsonLines.open(path, KEYS, resume=False) as lines:
        lines.append(record(KEYS[0]))
        if how == "removed":
            path.unlink()
        else:
            other.write_text("mine\n")
            other.replace(path)
        with pytest.raises(ConfLayersError, match="was removed or replaced while"):
            lines.append(record(KEYS[1]))
    assert how == "removed" or path.read_text() == "mine\n"


def test_a_file_that_somebody_else_changes_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with JsonLines.open(path, KEYS, resume=False) as lines:
        lines.append(record(KEYS[0]))
        with path.open("a") as other:
            other.write("theirs\n")
        content = path.read_bytes()
        with pytest.raises(ConfLayersError, match="was changed by somebody else"):
            lines.append(record(KEYS[1]))
    assert path.read_bytes() == content


def test_write_json_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    files.write_json(path, {"ü": [1]})
    assert json.loads(path.read_text("utf-8")) == {"ü": [1]}
    assert list(tmp_path.iterdir()) == [path]


def test_write_json_that_fails_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(number: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "a.json"
    path.write_text("old")
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(ConfLayersError, match="No space left"):
        files.write_json(path, {})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_targets_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        files.check_target(tmp_path / "no" / "a.json")
    with pytest.raises(InputError, match="is a folder"):
        files.check_target(tmp_path)
