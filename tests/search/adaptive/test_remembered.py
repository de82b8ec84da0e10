"""What is kept between runs: whole files, and nothing believed that can't be true."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from conflayers_cli.models.loaded_model import wrap_model
from conflayers_cli.search.adaptive import remembered
from conflayers_cli.search.adaptive.proposer import Learnt
from conflayers_cli.search.adaptive.remembered import Memory
from conflayers_cli.skip_plan import SkipPlan
from tests import tiny

LEARNT = Learnt(SkipPlan((1, 2), (2,), "int4"), 0.875, True, {1: 0.01, 5: 0.0125}, {1: 0.005}, 0.25)


def memory(folder: Path, name: str = "tiny") -> Memory:
    decoder = tiny.decoder("llama")
    loaded = wrap_model(decoder.model, None, name, "float32")
    return Memory(loaded, decoder, folder)


def file_of(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_what_is_kept_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    assert memory(folder).read() is None
    memory(folder).write(LEARNT)
    assert memory(folder).read() == LEARNT
    assert memory(folder, "another").read() is None


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format": 1}',
        b" " * 100_000,
    ],
)
def test_damaged_files_are_passed_over(tmp_path: Path, damage: bytes) -> None:
    memory(tmp_path).write(LEARNT)
    file_of(tmp_path).write_bytes(damage)
    assert memory(tmp_path).read() is None
    memory(tmp_path).write(LEARNT)
    assert memory(tmp_path).read() == LEARNT


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("plan", {"attention": [99], "mlp": [], "weights": None}),
        ("plan", {"attention": [2, 1], "mlp": [], "weights": None}),
        ("plan", {"attention": [-1], "mlp": [], "weights": None}),
        ("plan", {"attention": [], "mlp": [], "weights": "int1"}),
        ("plan", {"attention": 5, "mlp": [], "weights": None}),
        ("plan", None),
        ("acceptance", 1.5),
        ("acceptance", True),
        ("acceptance", float("nan")),
        ("settled", 1),
        ("verify", {"0": 1.0}),
        ("verify", {"1": 0.0}),
        ("verify", {"one": 1.0}),
        ("verify", {"1": 1e999}),
        ("draft", [1.0]),
        ("rounding_seconds", -1),
        ("rounding_seconds", "soon"),
    ],
)
def test_what_can_not_be_is_not_believed(tmp_path: Path, key: str, value: Any) -> None:
    memory(tmp_path).write(LEARNT)
    path = file_of(tmp_path)
    document = json.loads(path.read_text())
    document["learnt"][key] = value
    path.write_text(json.dumps(document))
    assert memory(tmp_path).read() is None


@pytest.mark.parametrize("key", ["format", "model", "environment", "depth", "dtype"])
def test_files_of_something_else_are_passed_over(tmp_path: Path, key: str) -> None:
    memory(tmp_path).write(LEARNT)
    path = file_of(tmp_path)
    document = json.loads(path.read_text())
    document[key] = "another"
    path.write_text(json.dumps(document))
    assert memory(tmp_path).read() is None


def test_a_folder_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    memory(tmp_path / "file").write(LEARNT)
    assert memory(tmp_path / "file").read() is None


def test_files_used_last_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "MAX_FILES", 3)
    for number in range(5):
        memory(tmp_path, f"model {number}").write(LEARNT)
        for path in tmp_path.iterdir():
            os.utime(path, (path.stat().st_atime - 10, path.stat().st_mtime - 10))
    assert len(list(tmp_path.iterdir())) == 3
    kept = [memory(tmp_path, f"model {number}").read() is not None for number in range(5)]
    assert kept == [False, False, True, True, True]


def test_several_that_remember_at_once(tmp_path: Path) -> None:
    def work() -> None:
        for _ in range(20):
            memory(tmp_path).write(LEARNT)
            assert memory(tmp_path).read() == LEARNT

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert memory(tmp_path).read() == LEARNT
    assert len(list(tmp_path.iterdir())) == 1
