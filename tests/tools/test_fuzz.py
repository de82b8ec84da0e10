"""Broken bytes for all readers: a small round of `tools.fuzz`, and that it finds faults."""

from __future__ import annotations

import json
from math import inf
from pathlib import Path

import pytest

from conflayers_cli.errors import InputError
from conflayers_cli.generation.prompts import read_prompts
from tools import fuzz
from tools.fuzz_reader import Reader


@pytest.mark.parametrize("reader", fuzz.readers(), ids=lambda reader: reader.name)
def test_whatever_is_read_is_accepted_or_refused_in_one_line(
    reader: Reader, tmp_path: Path
) -> None:
    found: list[str] = []
    report = fuzz.fuzz(
        reader, 150, 2, tmp_path, lambda suffix, data, wrong: found.append(wrong), seconds=inf
    )
    assert found == []
    assert report.inputs == 150
    assert 0 < report.accepted < 150  # many are broken, and not all at their first byte


@pytest.mark.parametrize("reader", fuzz.readers(), ids=lambda reader: reader.name)
def test_the_files_that_are_mutated_are_valid(reader: Reader, tmp_path: Path) -> None:
    for data in reader.corpus:
        kinds = []
        for suffix in reader.suffixes:
            path = tmp_path / f"x{suffix}"
            path.write_bytes(data)
            kinds.append(fuzz.judge(reader, path))
        assert (True, None) in kinds
        assert not [wrong for _, wrong in kinds if wrong]


def test_inputs_are_the_same_for_a_seed() -> None:
    one, same, other = (list(fuzz.inputs(fuzz.readers()[0], 50, seed)) for seed in (1, 1, 2))
    assert one == same != other
    assert len({data for _, data in one}) > 45


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("x"), "ValueError: x"),
        (InputError("PATH: a\nb"), "not one short line"),
        (InputError(f"PATH: {'x' * 600}"), "not one short line"),
        (InputError("something is wrong"), "does not name the file"),
        (InputError("PATH: something is wrong"), None),
    ],
)
def test_what_is_a_finding(tmp_path: Path, error: Exception, expected: str | None) -> None:
    def read(path: Path) -> object:
        raise type(error)(str(error).replace("PATH", str(path)))

    reader = Reader("x", read, fuzz.sound_prompts, (".txt",), (b"a",))
    accepted, wrong = fuzz.judge(reader, tmp_path / "x.txt")
    assert not accepted
    assert (wrong is None) if expected is None else (expected in (wrong or ""))


def test_what_is_accepted_must_be_sound(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("a\nb")
    assert fuzz.sound_prompts(read_prompts(path), path) is None
    assert fuzz.sound_prompts([], path) == "no prompts, and no error"
    assert fuzz.sound_prompts(read_prompts(path) * 2, path) == "an id is there twice"


def test_a_slow_input_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fuzz, "MAX_SECONDS", -1.0)
    monkeypatch.setattr(fuzz.fuzz, "__defaults__", (-1.0,))
    output, findings = tmp_path / "out.json", tmp_path / "found"
    options = ["--inputs", "4", "--output", str(output), "--findings", str(findings)]
    fuzz.main([*options, "--reader", "prompts"])
    fuzz.main([*options, "--reader", "profile"])
    document = json.loads(output.read_text())
    assert document["readers"]["prompts"]["inputs"] == 4
    assert document["readers"]["prompts"]["findings"] == 4
    assert len(document["findings"]) == 2
    assert len(list(findings.iterdir())) == 6  # three of each kind
    assert "prompts       4" in capsys.readouterr().out
