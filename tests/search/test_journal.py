"""The journal's file: whole lines, whatever happens, and nothing else's file touched."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conflayers_cli.errors import ConfLayersError, InputError
from conflayers_cli.search.journal import Journal, parse_journal
from conflayers_cli.search.memo import Entry, Usage
from tests.disk import limited_to

HEADER = {"model": {"depth": 4}, "settings": {"patience": 3, "ratios": [0.1, 1 / 3]}, "none": None}
VALUES: list[Any] = [
    np.array([True, False]),
    np.array([[0.1, np.nan], [1 / 3, -np.inf]]),
    np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
    np.array([2**62, -1]),
    np.zeros((0, 4), dtype=np.uint8),
    {"deep": [1, 0.1, "ü\u2028\r", None, True, {"array": [1]}]},
]


def entry(number: int) -> Entry:
    return Entry([VALUES, number], Usage(number / 3, number, 2 * number))


def append(journal: Journal, number: int) -> None:
    journal.append(f"step {number}", entry(number))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "found.journal.jsonl"


def opened(path: Path, resume: bool | None = None, messages: list[str] | None = None) -> Journal:
    notify = pytest.fail if messages is None else messages.append
    return Journal(path, path.with_name("found.yaml"), resume=resume, notify=notify)


def written(path: Path, count: int = 3) -> bytes:
    with opened(path) as journal:
        journal.begin(HEADER)
        for number in range(1, count + 1):
            append(journal, number)
    return path.read_bytes()


def same(one: object, other: object) -> None:
    np.testing.assert_equal(one, other)


def test_entries_are_read_as_they_were_written(path: Path) -> None:
    written(path)
    with opened(path, resume=True) as journal:
        journal.begin(HEADER)
        assert len(journal.entries) == 3
        for number, (key, found) in enumerate(journal.entries.items(), 1):
            assert (key, found.usage) == (f"step {number}", entry(number).usage)
            same(found.value, entry(number).value)
            arrays = [value for value in found.value[0] if isinstance(value, np.ndarray)]
            assert [a.dtype for a in arrays] == [v.dtype for v in VALUES[:-1]]
        append(journal, 4)
    assert len(parse_journal(path, path.read_bytes()).entries) == 4


def test_cut_off_anywhere_what_is_whole_is_gone_on_with(path: Path) -> None:
    whole = written(path)
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole)):
        lines = sum(end <= size for end in ends)
        assert len(parse_journal(path, whole[:size]).entries) == max(lines - 1, 0), size
    for size in (ends[0] + 5, ends[1], ends[2] + 1, len(whole) - 1):
        path.write_bytes(whole[:size])
        with opened(path, resume=True) as journal:
            journal.begin(HEADER)
            for number in range(len(journal.entries) + 1, 4):
                append(journal, number)
        assert path.read_bytes() == whole


@pytest.mark.parametrize("place", [1, 2])
def test_a_damaged_line_ends_what_is_known(path: Path, place: int) -> None:
    whole = written(path)
    lines = whole.splitlines(keepends=True)
    for damage in (
        b"\0" * 20 + b"\n",
        b'{"key":"step 7"}\n',
        b"[]\n",
        lines[place].replace(b'"usage"', b'"used"'),
    ):
        assert damage != lines[place]
        path.write_bytes(b"".join([*lines[:place], damage, *lines[place + 1 :]]))
        with opened(path, resume=True) as journal:
            assert len(journal.entries) == place - 1


def test_a_journal_is_not_begun_over_another_one(path: Path) -> None:
    whole = written(path)
    with pytest.raises(InputError, match="resume goes on with it, resume=False begins anew"):
        opened(path)
    assert path.read_bytes() == whole
    with opened(path, resume=False):  # and then the model can't be loaded
        pass
    assert path.read_bytes() == whole
    with opened(path, resume=False) as journal:
        journal.begin(HEADER)
        append(journal, 1)
    assert len(parse_journal(path, path.read_bytes()).entries) == 1


def test_another_calibration_is_not_gone_on_with(path: Path) -> None:
    whole = written(path)
    other = {**HEADER, "settings": {"patience": 5, "more": 1}}
    with opened(path, resume=True) as journal, pytest.raises(InputError) as refused:
        journal.begin(other)
    difference = (
        "settings.patience 3 there, 5 here; settings.ratios [0.1, 0.3333333333333333] there, none"
    )
    assert difference in str(refused.value)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("content", [b"a prompt\n", b'{"prompt": "x"}\n', b"{", b"\n"])
@pytest.mark.parametrize("resume", [None, True, False])
def test_other_files_are_left_alone(path: Path, content: bytes, resume: bool | None) -> None:
    path.write_bytes(content)
    if content == b"{":  # may be a journal's first byte
        with opened(path, resume):
            return
    with pytest.raises(InputError, match="no journal"):
        opened(path, resume)
    assert path.read_bytes() == content


@pytest.mark.parametrize("version", [1, 99])
def test_another_version_is_refused_and_begun_anew_where_that_is_wanted(
    path: Path, version: int
) -> None:
    old = re.sub(rb'journal":\d+', f'journal":{version}'.encode(), written(path), count=1)
    path.write_bytes(old)
    for resume in (None, True):
        with pytest.raises(
            InputError, match=r"another version.* anew with resume=False"
        ) as refused:
            opened(path, resume=resume)
        assert "\n" not in str(refused.value)
    assert path.read_bytes() == old
    with opened(path, resume=False):  # and then the model can't be loaded
        pass
    assert path.read_bytes() == old
    with opened(path, resume=False) as journal:
        journal.begin(HEADER)
        append(journal, 1)
    assert len(parse_journal(path, path.read_bytes()).entries) == 1


def test_nothing_to_resume(path: Path) -> None:
    path.with_name("found.yaml").write_text("a profile")
    with pytest.raises(InputError, match="is finished"):
        opened(path, resume=True)
    assert not path.exists()
    path.write_bytes(b"")  # killed while the model was loaded, over an older profile
    with opened(path, resume=True) as journal:
        assert not journal.entries


def test_one_that_holds_nothing_does_not_stay(path: Path) -> None:
    with opened(path):
        assert path.exists()
    assert not path.exists()
    with opened(path) as journal:
        journal.begin(HEADER)
    assert not path.exists()


def test_removed_when_it_is_not_needed(path: Path) -> None:
    with opened(path) as journal:
        journal.begin(HEADER)
        append(journal, 1)
        journal.remove()
        append(journal, 2)
    assert not path.exists()


def test_two_at_once_are_refused(path: Path) -> None:
    with opened(path) as journal:
        journal.begin(HEADER)
        append(journal, 1)
        before = path.read_bytes()
        for resume in (None, True, False):
            with pytest.raises(InputError, match="another calibration is at work"):
                opened(path, resume=resume)
        assert path.read_bytes() == before
    with opened(path, resume=True) as journal:
        assert len(journal.entries) == 1


def test_what_is_being_written_beside_it_is_known(path: Path) -> None:
    with opened(path) as journal:
        journal.begin(HEADER)
        append(journal, 1)
        journal.set_pending_file("found.safetensors")
    with opened(path, resume=True) as journal:
        assert journal.pending_file == "found.safetensors"
        journal.begin(HEADER)
        append(journal, 2)
    assert list(parse_journal(path, path.read_bytes()).entries) == ["step 1", "writes", "step 2"]


def test_a_full_disk_is_told_once_and_the_lines_stay_whole(path: Path) -> None:
    messages: list[str] = []
    with opened(path, messages=messages) as journal:
        journal.begin(HEADER)
        append(journal, 1)
        before = path.read_bytes()
        with limited_to(len(before) + 10):
            append(journal, 2)
        append(journal, 3)  # there may be room again, but a line is missing
        assert journal.resumable
    assert path.read_bytes() == before
    assert len(messages) == 1
    assert "can't be written" in messages[0] and "the search goes on" in messages[0]


def test_where_nothing_can_be_written_no_work_is_begun(path: Path) -> None:
    with opened(path) as journal, limited_to(10), pytest.raises(ConfLayersError, match="written"):
        journal.begin(HEADER)
    assert not path.exists()


@pytest.mark.parametrize("failing", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_a_line_is_written_whole_or_not(
    path: Path, monkeypatch: pytest.MonkeyPatch, failing: BaseException
) -> None:
    messages: list[str] = []
    with opened(path, messages=messages) as journal:
        journal.begin(HEADER)
        append(journal, 1)
        before = path.read_bytes()

        def fail(number: int) -> None:
            raise failing

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            if isinstance(failing, KeyboardInterrupt):
                with pytest.raises(KeyboardInterrupt):
                    append(journal, 2)
            else:
                append(journal, 2)
        assert path.read_bytes() == before
    assert len(messages) == isinstance(failing, OSError)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        opened(tmp_path / "no" / "found.journal.jsonl")
    with pytest.raises(ConfLayersError, match="can't be written"):
        opened(Path("/proc/found.journal.jsonl"))
