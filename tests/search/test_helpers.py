"""Passes given away to others with the same model: the search comes to the same."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.search.calibrate import Candidate, find
from conflayers_cli.search.corpus import Sample
from conflayers_cli.search.helpers import Helper
from conflayers_cli.search.objective import Trace
from conflayers_cli.search.problem import Strategy, Task
from conflayers_cli.search.record import Entry, Record
from conflayers_cli.search.strategies.conflayers import ConfLayers
from conflayers_cli.search.strategies.knapsack import Knapsack
from conflayers_cli.skip_plan import SkipPlan
from tests import tiny
from tests.search import planted


class Neighbours:
    """Two helpers in this process, which take turns."""

    def __init__(self, decoder: Decoder) -> None:
        self._helpers = (Helper(decoder), Helper(decoder))
        self.continued: list[int] = []
        self.traced: list[tuple[SkipPlan, Sample]] = []
        self.together: list[int] = []

    def continuations(
        self, prompts: Sequence[tuple[int, ...]], max_new_tokens: int, end_tokens: frozenset[int]
    ) -> list[list[int]]:
        self.continued.append(len(prompts))
        return [
            self._helpers[i % 2].continuation(prompt, max_new_tokens, end_tokens)
            for i, prompt in enumerate(prompts)
        ]

    def traces(self, asked: Sequence[tuple[SkipPlan, Sample]], most_tokens: int) -> list[Trace]:
        self.traced += asked
        self.together.append(len(asked))
        return [
            self._helpers[i % 2].trace(plan, sample, most_tokens)
            for i, (plan, sample) in enumerate(asked)
        ]


class Kept:
    """A record's entries, in memory."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def append(self, entry: Entry) -> None:
        self.entries.append(entry)

    def cut(self, count: int) -> None:
        del self.entries[count:]


def task(helpers: Neighbours | None, record: Record | None = None) -> Task:
    decoder = planted.decoder()
    prompts = tuple(tuple(tiny.prompt(9, seed)) for seed in range(6))
    return Task(
        *(decoder, prompts, planted.COSTS, 48, frozenset()), recorder=record, helpers=helpers
    )


def found(strategy: Strategy, task: Task) -> Candidate:
    return find(
        *(strategy, task),
        refine=30,
        on_stage=lambda stage: None,
        on_better=lambda score, judged: None,
    )


def outcomes(kept: Kept) -> list[tuple[str, str]]:
    """What was asked and what came of it, in their order."""
    pairs = (outcome for entry in kept.entries for outcome in entry.outcomes)
    timed = ("meter", "conflayers: ")
    return [(key, repr(value)) for key, value in pairs if not key.startswith(timed)]


@pytest.mark.parametrize(
    "strategy", [ConfLayers(max_iterations=3, search_interval=6), Knapsack()], ids=["paper", "dp"]
)
def test_a_search_with_helpers_comes_to_the_same(strategy: Strategy) -> None:
    kept = Kept(), Kept()
    neighbours = Neighbours(planted.decoder())
    alone = found(strategy, task(None, Record(planted.decoder(), keeper=kept[0])))
    helped = found(strategy, task(neighbours, Record(planted.decoder(), keeper=kept[1])))
    assert alone.refined and alone.judged > 10
    assert (helped.plan, helped.setting, helped.expected) == (
        *(alone.plan, alone.setting, alone.expected),
    )
    assert (helped.judged, helped.ranges) == (alone.judged, alone.ranges)
    assert outcomes(kept[1]) == outcomes(kept[0])
    assert max(neighbours.together) > 12  # plans at a time, not texts alone
    assert len(set(neighbours.traced)) == len(neighbours.traced)


def test_this_process_makes_none_of_the_passes_given_away(monkeypatch: pytest.MonkeyPatch) -> None:
    neighbours = Neighbours(planted.decoder())
    objective = task(neighbours).objective
    assert neighbours.continued == [6]

    def refused(*arguments: object) -> None:
        raise AssertionError("traced here")

    for text in objective._texts:
        monkeypatch.setattr(text, "trace", refused)
    two, three = SkipPlan.of_layers([2]), SkipPlan.of_layers([3])
    objective.ahead([two, three, SkipPlan()], 2)
    assert neighbours.together == [4]
    objective.score(two)  # the other four texts
    assert neighbours.together == [4, 4]
    objective.score(three, 2)
    assert neighbours.together == [4, 4]


def test_what_is_known_from_an_earlier_run_is_not_asked_again() -> None:
    kept = Kept()
    first = found(
        Knapsack(), task(Neighbours(planted.decoder()), Record(planted.decoder(), keeper=kept))
    )
    neighbours = Neighbours(planted.decoder())
    again = found(Knapsack(), task(neighbours, Record(planted.decoder(), kept.entries)))
    assert (again.plan, again.judged) == (first.plan, first.judged)
    assert (neighbours.continued, neighbours.traced) == ([], [])
