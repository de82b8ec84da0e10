"""The soak: that it runs, and that it sees what it is there to see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools import soak
from tools.soak import Round, fit_slope, judge_rounds, latency_by_hundred

MIB = 2**20


def rounds(held: list[float], different: int = 0) -> list[Round]:
    """Rounds of 100 texts with so many MiB behind each."""
    last = len(held) - 1
    return [
        Round(100 * (i + 1), int(mib * MIB), 0.01, [3] * different if i == last else [])
        for i, mib in enumerate(held)
    ]


@pytest.mark.parametrize("rate", [0.0, 3.0, 40.0])
def test_the_slope_is_per_thousand_texts_and_jumps_don_t_move_it(rate: float) -> None:
    held = [500 + rate * i / 10 + (i * 7 % 5) * 0.02 + 30 * (i == 11) for i in range(40)]
    held[:3] = [300, 400, 450]  # while it settles
    slope = fit_slope(rounds(held))
    assert slope is not None
    assert slope["slope"] == pytest.approx(rate, abs=0.1)
    assert slope["low"] <= slope["slope"] <= slope["high"]
    passed, verdict = judge_rounds(rounds(held), slope)
    assert passed == (rate < 5.0)
    assert ("memory grows" in verdict) == (rate > 5.0)
    assert verdict.startswith("4000 texts in 40 rounds, 0 different; ")


def test_another_text_is_no_good_verdict() -> None:
    held = [500.0] * 10
    passed, verdict = judge_rounds(rounds(held, different=2), fit_slope(rounds(held)))
    assert not passed and ", 2 different" in verdict


def test_too_few_rounds_tell_nothing() -> None:
    assert fit_slope(rounds([1.0, 2.0])) is None
    assert "too few rounds" in judge_rounds(rounds([1.0]), None)[1]


def test_latencies_by_hundred() -> None:
    found = latency_by_hundred([Round(60 * (i + 1), None, 0.001 * (i + 1), []) for i in range(4)])
    assert found == [
        {"generations": 100, "ms_per_token": pytest.approx(1.0)},
        {"generations": 200, "ms_per_token": pytest.approx(2.5)},
        {"generations": 300, "ms_per_token": pytest.approx(4.0)},
    ]


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONFLAYERS_CACHE", str(tmp_path / "cache"))
    output = tmp_path / "soak.json"
    arguments = ["--dtype", "float32", "--generations", "60", "--output", str(output)]
    assert soak.main(arguments) == 0
    document: dict[str, Any] = json.loads(output.read_text())
    assert [entry["different"] for entry in document["curve"]] == [[], []]
    assert document["curve"][-1]["generations"] >= 60
    assert document["verdict"].endswith("too few rounds to tell about memory")


def test_every_way_is_in_the_set_alone_and_together() -> None:
    found = soak.make_requests(1000, 2048)
    corners = {(each.way, each.batch_size > 1, each.sampling.greedy) for each in found}
    expected = {(way, False, greedy) for way in soak.WAYS for greedy in (True, False)}
    expected |= {(way, True, greedy) for way in soak.TOGETHER for greedy in (True, False)}
    assert corners == expected
    assert len({len(each.prompt) for each in found}) == len(soak.LENGTHS)
