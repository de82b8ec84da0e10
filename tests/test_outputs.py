from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from conflayers_cli import outputs
from conflayers_cli.errors import ConfLayersError, InputError
from conflayers_cli.outputs import JsonLines, LineKey

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
    with pytest.raises(InputError, match="--resume"):
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


def test_write_json_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    outputs.write_json(path, {"ü": [1]})
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
        outputs.write_json(path, {})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_targets_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        outputs.check_target(tmp_path / "no" / "a.json")
    with pytest.raises(InputError, match="is a folder"):
        outputs.check_target(tmp_path)
