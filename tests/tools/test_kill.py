"""Killing ``generate --data``: a small round of it, and that what is torn would be seen."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.cli.conftest import save_model, save_profile, write_prompts
from tests.processes import Process, environment, start
from tools import kill_generate
from tools.kill_generate import Tally, check_cuts, check_partial, run_with_kills, without_times


def line(index: int, seconds: float = 0.5, steps: int = 3) -> str:
    stats = dict.fromkeys(kill_generate.TIMES, seconds)
    stats |= dict.fromkeys(kill_generate.COUNTS, steps)
    record = {"index": index, "request_sha256": f"hash{index}", "text": "ü", "stats": stats}
    return json.dumps(record) + "\n"


def test_times_alone_may_differ() -> None:
    one, other = (line(0, seconds).encode() for seconds in (0.5, 0.7))
    assert one != other and without_times(one) == without_times(other)
    counted = line(0, steps=4).encode()
    assert without_times(one) != without_times(counted)
    assert without_times(one, counts=False) == without_times(counted, counts=False)
    with pytest.raises(ValueError, match="cut off"):
        without_times(one[:-1])
    with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
        without_times(one[:20] + b"\n")


def test_what_a_kill_left_has_to_be_a_beginning(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    expected = without_times("".join(map(line, range(3))).encode())
    for content, torn, faults in (
        ("", False, 0),
        (line(0), False, 0),
        (line(0) + line(1)[:9], True, 0),
        (line(1), False, 1),
        (line(0) + line(0), False, 1),
    ):
        output.write_text(content)
        tally = Tally("x")
        assert check_partial(output, expected, tally, counts=True) is torn
        assert len(tally.faults) == faults


def test_every_cut_is_mended(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    whole.write_text("".join(map(line, range(4))))
    assert check_cuts(whole, 2) == len((line(2) + line(3)).encode()) + 1
    assert check_cuts(whole, 9) == whole.stat().st_size + 1


@pytest.mark.skipif(sys.platform == "win32", reason="is killed otherwise")
def test_two_kills_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(arguments: Sequence[object], folder: Path) -> Process:
        variables = environment(CONFLAYERS_CACHE=str(folder / "cache"))
        pipe = subprocess.PIPE
        return start("conflayers_cli", arguments, env=variables, stdout=pipe, stderr=pipe)

    monkeypatch.setattr(kill_generate, "start", started)
    model = save_model(tmp_path / "model")
    profile = save_profile(tmp_path / "tiny.yaml", model)
    data = write_prompts(tmp_path / "p.jsonl", *(f"prompt {i}" for i in range(12)))
    arguments = ["generate", "-p", profile, "--data", data, "--dtype", "float32", "-n", "24"]
    tally = run_with_kills("greedy-1", arguments, tmp_path, 2, random.Random(1))
    assert tally.faults == []
    assert tally.kills == 2 and tally.rounds >= 1
