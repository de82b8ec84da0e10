"""Calibrations that die after every single entry of their journal, and come to the same end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conflayers_cli.engine.cost_model import PassCosts
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.search import validate as check_module
from conflayers_cli.search.auto import auto
from conflayers_cli.search.calibrate import Calibration, Candidate, calibrate
from conflayers_cli.search.journal import Journal, parse_journal
from conflayers_cli.search.memo import Entry, Memo
from conflayers_cli.search.problem import SearchProblem, Strategy, Trial
from conflayers_cli.search.strategies.conflayers import ConfLayers
from conflayers_cli.search.strategies.greedy import Greedy
from conflayers_cli.search.strategies.knapsack import Knapsack
from conflayers_cli.search.strategies.local import Local
from conflayers_cli.search.strategies.swift import Swift
from conflayers_cli.search.strategies.unified import Unified
from conflayers_cli.search.validate import Check
from conflayers_cli.spec_decode.tree import PAPER_SHAPE
from tests import tiny

# drafts are cheap, so that plans pay; attention grows with the context, so that ranges differ
COSTS = PassCosts({1: 10.0, 26: 11.0}, 0.01, 0.01, 3.0, context=8, attention_per_position=0.02)
CONFLAYERS = ConfLayers(search_interval=4, max_iterations=6, skip_ratio=0.1, stop_probability=0.0)
GREEDY = Greedy(patience=2, hopeless=0.0)
SWIFT = Swift(context_window=20, max_steps=8, max_score=1.0, bayes_interval=3)
STRATEGIES: dict[str, Strategy | list[Strategy]] = {
    "local": Local(),
    "conflayers": CONFLAYERS,
    "swift": SWIFT,
    "knapsack": Knapsack(),
    "clasp": Knapsack.clasp(),
    "greedy": GREEDY,
    "unified": Unified(1.5),
    "auto": [Unified(1.5), Knapsack(), CONFLAYERS, SWIFT],
    "auto out of time": [Unified(1.5), CONFLAYERS, Knapsack(), GREEDY],
}
BUDGETS = {"auto": 1000.0, "auto out of time": 20.0}


class KilledError(BaseException):
    """The end of a process that nothing in it hears of."""


class Dying:
    """A journal whose process dies after so many new entries; 0: never."""

    def __init__(self, journal: Journal, entries: int) -> None:
        self._journal = journal
        self._left = entries

    def append(self, key: str, entry: Entry) -> None:
        self._journal.append(key, entry)
        self._left -= 1
        if self._left == 0:
            raise KilledError


class Ticking(Memo):
    """A memo for which everything computed takes a second."""

    def __init__(self, decoder: Decoder, journal: Journal, die_after: int) -> None:
        self._now = 0.0
        keep = Dying(journal, die_after).append
        super().__init__(decoder, journal.entries, keep, clock=lambda: self._now)

    def cached(self, key: str, compute: Callable[[], Any]) -> Any:
        def ticked() -> Any:
            self._now += 1.0
            return compute()

        return super().cached(key, ticked)


@dataclass
class Case:
    """A calibration that may be run again and again."""

    name: str
    path: Path
    on_trial: Callable[[Trial, Trial | None], None] = lambda trial, best: None

    def run(self, *, resume: bool, die_after: int = 0) -> Calibration:
        decoder = tiny.decoder("llama")
        prompts = tuple(tuple(tiny.prompt(9, seed)) for seed in range(3))
        profile = self.path.with_name("found.yaml")
        with Journal(self.path, profile, resume=resume, notify=pytest.fail) as journal:
            journal.begin({"name": self.name})
            memo = Ticking(decoder, journal, die_after)
            return self._calibrated(
                SearchProblem(
                    decoder, prompts, COSTS, 24, frozenset(), self.on_trial, shared_memo=memo
                )
            )

    def _calibrated(self, problem: SearchProblem) -> Calibration:
        strategy = STRATEGIES[self.name]
        how: dict[str, Any] = {
            "refine": 12,
            "tree": PAPER_SHAPE,
            "on_stage": lambda name: None,
            "on_better": lambda score, judged: None,
        }
        if isinstance(strategy, list):
            return auto(strategy, problem, (), budget=BUDGETS[self.name], **how)
        return calibrate(strategy, problem, (), **how)

    @property
    def entries(self) -> dict[str, Entry]:
        return parse_journal(self.path, self.path.read_bytes()).entries

    @property
    def lines(self) -> int:
        """Behind the first one: what was measured in all runs."""
        return self.path.read_bytes().count(b"\n") - 1


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real decoding of a tiny model is all overhead: set what it would measure."""

    def checks(problem: SearchProblem, candidates: list[Any], *args: object) -> list[Check]:
        return [Check(1.1 + 0.01 * len(plan), 0.9, 3.0, 1, True) for plan, _ in candidates]

    monkeypatch.setattr(check_module, "_checks", checks)


def close(one: object, other: object) -> None:
    """Equal; numbers but for the rounding of a prompt that is read at once, not token by token."""
    if isinstance(one, np.ndarray | float):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=1e-5)
    elif isinstance(one, list | tuple):
        assert isinstance(other, list | tuple) and len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            close(left, right)
    elif isinstance(one, dict):
        assert isinstance(other, dict) and one.keys() == other.keys()
        for key in one:
            if not key.endswith("_seconds"):  # of steps: real ones
                close(one[key], other[key])
    else:
        assert one == other


def facts(candidate: Candidate) -> list[object]:
    """What a candidate says, but for passes: caches made anew take some."""
    trials = [list(vars(trial).values()) for trial in candidate.result.trials]
    ranges = [(each.from_context, each.plan, each.setting) for each in candidate.ranges]
    tensors = {name: values.numpy() for name, values in candidate.result.tensors.items()}
    expected = candidate.expected
    return [
        *(candidate.strategy, candidate.plan, candidate.setting, ranges, candidate.judged),
        *(candidate.seconds, candidate.refined, candidate.interrupted, trials, tensors),
        expected and (expected.plan, expected.agreement, expected.setting, expected.speedup),
        candidate.result.stopped_because,
    ]


def told(done: Calibration) -> list[object]:
    checks = [done.check, *(check for _, check in done.candidates)]
    return [
        *(done.plan, done.setting, done.conclusion, done.seconds, facts(done.candidate)),
        *([facts(candidate) for candidate, _ in done.candidates], checks),
    ]


def run_whole(name: str, folder: Path) -> tuple[Calibration, dict[str, Entry]]:
    folder.mkdir()
    case = Case(name, folder / "found.journal.jsonl")
    return case.run(resume=False), case.entries


@pytest.mark.parametrize("name", STRATEGIES)
def test_dying_after_every_entry_it_comes_to_the_same_end(name: str, tmp_path: Path) -> None:
    whole, expected = run_whole(name, tmp_path / "whole")
    case, lives = Case(name, tmp_path / "found.journal.jsonl"), 0
    while True:
        try:
            done = case.run(resume=lives > 0, die_after=1)
            break
        except KilledError:
            lives += 1
            assert len(case.entries) == lives, "each life adds one entry, and repeats none"
    assert lives == len(expected) > 3
    close(told(done), told(whole))
    assert list(case.entries) == list(expected)
    for entry, other in zip(case.entries.values(), expected.values(), strict=True):
        close(entry.value, other.value)
        assert entry.usage.seconds == other.usage.seconds
    assert case.lines == len(case.entries), "nothing is asked twice"


@pytest.mark.parametrize("name", ["conflayers", "swift"])
def test_dying_once_anywhere(name: str, tmp_path: Path) -> None:
    whole, expected = run_whole(name, tmp_path / "whole")
    for dies in range(1, len(expected), 7):
        case = Case(name, tmp_path / f"{dies}.journal.jsonl")
        with pytest.raises(KilledError):
            case.run(resume=False, die_after=dies)
        close(told(case.run(resume=True)), told(whole))
        assert list(case.entries) == list(expected)
        assert case.lines == len(case.entries)


def test_time_runs_out_where_it_does_uninterrupted(tmp_path: Path) -> None:
    done, _ = run_whole("auto out of time", tmp_path / "whole")
    assert "out of time" in [each.result.stopped_because for each, _ in done.candidates]
    assert len(done.candidates) < len(list(STRATEGIES["auto out of time"]))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["conflayers", "swift", "greedy", "knapsack"])
def test_an_interrupted_search_goes_on_behind_its_last_step(name: str, tmp_path: Path) -> None:
    whole, expected = run_whole(name, tmp_path / "whole")
    seen: list[Trial] = []

    def interrupt(trial: Trial, best: Trial | None) -> None:
        seen.append(trial)
        if len(seen) == 2:
            raise KeyboardInterrupt

    case = Case(name, tmp_path / "found.journal.jsonl", interrupt)
    first = case.run(resume=False)
    assert first.interrupted
    assert list(case.entries) == list(expected)[: len(case.entries)]

    done = case.run(resume=True)
    assert not done.interrupted
    close(told(done)[:3], told(whole)[:3])
    close(facts(done.candidate)[8], facts(whole.candidate)[8])


def test_interrupted_once_more_while_it_catches_up_nothing_is_lost(tmp_path: Path) -> None:
    case = Case("conflayers", tmp_path / "found.journal.jsonl")
    with pytest.raises(KilledError):
        case.run(resume=False, die_after=6)
    before = case.path.read_bytes()

    def interrupt(trial: Trial, best: Trial | None) -> None:
        raise KeyboardInterrupt

    case.on_trial = interrupt
    assert case.run(resume=True).interrupted
    assert case.path.read_bytes() == before


def test_what_is_known_takes_no_pass(tmp_path: Path) -> None:
    case = Case("conflayers", tmp_path / "found.journal.jsonl")
    case.run(resume=False)
    decoder = tiny.decoder("llama")
    before = decoder.full_passes, decoder.draft_passes
    case.run(resume=True)
    assert (decoder.full_passes, decoder.draft_passes) == before
