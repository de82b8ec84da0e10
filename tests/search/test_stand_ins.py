"""The search for stand-ins, on a model in which a run of layers is nearly linear."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from conflayers_cli.engine.cost_model import Costs
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.search import objective as objective_module
from conflayers_cli.search import stand_ins as module
from conflayers_cli.search.corpus import MOST_TEXTS, Sample
from conflayers_cli.search.local_search import Refiner
from conflayers_cli.search.objective import SAME, Score
from conflayers_cli.search.problem import Task
from conflayers_cli.search.settings import StandInSettings
from conflayers_cli.search.stand_ins import Found, blocks_of, find_stand_ins
from conflayers_cli.search.states import Reader
from conflayers_cli.skip_plan import SkipPlan
from tests import tiny
from tests.search import planted_linear

SETTINGS = StandInSettings(tokens=2000)
BLOCK = (planted_linear.LINEAR.start, planted_linear.LINEAR.stop)
DEAR_MAPS = Costs({1: 10.5, 26: 13.0}, 0.5, 0.5, 0.5, context=256, stand_in=30.0)


def nobody(score: Score, judged: int) -> None:
    """Nobody is told."""


def found_in(
    task: Task,
    before: Score | None = None,
    settings: StandInSettings = SETTINGS,
    on_better: Callable[[Score, int], None] = nobody,
) -> Found:
    return find_stand_ins(task, before, settings, 20, on_better)


@pytest.fixture(autouse=True)
def few_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaying texts with every draft setting takes most of a tiny model's time."""
    monkeypatch.setattr(objective_module, "LENGTHS", (2, 4, 8))
    monkeypatch.setattr(objective_module, "STOPS", (0.0, 0.5))


@dataclass
class Seen:
    """Which prompts' texts were fitted to, and which ones plans with maps were judged by."""

    fitted: set[tuple[int, ...]] = field(default_factory=set)
    judging: set[tuple[int, ...]] = field(default_factory=set)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    told = Seen()

    class Recorded(Reader):
        def __init__(self, decoder: Decoder, samples: Sequence[Sample], most_tokens: int) -> None:
            told.fitted |= {sample.prompt for sample in samples}
            super().__init__(decoder, samples, most_tokens)

    class RecordedText(objective_module.JudgedText):
        def __init__(self, decoder: Decoder, sample: Sample, most_tokens: int) -> None:
            super().__init__(decoder, sample, most_tokens)
            self.prompt = sample.prompt

        def _logits(self, decoder: Decoder, plan: SkipPlan) -> torch.Tensor:
            if plan.stand_ins:
                told.judging.add(self.prompt)
            return super()._logits(decoder, plan)

    monkeypatch.setattr(module, "Reader", Recorded)
    monkeypatch.setattr(objective_module, "JudgedText", RecordedText)
    return told


def test_the_linear_run_is_found_and_beats_leaving_it_out() -> None:
    found = found_in(planted_linear.task())
    assert found.reason is None and not found.interrupted
    assert found.score is not None and found.score.speedup > 1
    assert found.tokens == 4 * (9 + planted_linear.NEW_TOKENS - 1)
    plan = found.score.plan
    assert blocks_of(plan.stand_ins) == [BLOCK]
    fresh = planted_linear.fresh_objective()
    with_map, without = fresh.score(plan), fresh.score(SkipPlan(plan.attention, plan.mlp))
    assert with_map.agreement > 0.85
    assert without.agreement < 0.6
    assert with_map.speedup > without.speedup


def test_a_runs_ends_are_moved_as_long_as_it_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = [(BLOCK[0] + 2, BLOCK[1] - 1)]
    monkeypatch.setattr(module, "candidates", lambda similarity, taken: [] if taken else inner)
    score = found_in(planted_linear.task()).score
    assert score is not None and blocks_of(score.plan.stand_ins) == [BLOCK]
    monkeypatch.setattr(module, "ROUNDS", 0)
    score = found_in(planted_linear.task()).score
    assert score is not None and blocks_of(score.plan.stand_ins) == inner


@pytest.mark.parametrize("rank", [4, 16])
def test_a_rank_asked_for_is_kept_to(rank: int) -> None:
    found = found_in(planted_linear.task(), settings=StandInSettings(2000, rank))
    assert found.score is not None and found.score.plan.stand_ins
    assert {each.rank for each in found.score.plan.stand_ins} == {rank}


def test_with_little_memory_the_same_is_found() -> None:
    found = found_in(planted_linear.task(), settings=StandInSettings(2000, memory=40_000))
    assert found.score is not None
    assert blocks_of(found.score.plan.stand_ins) == [BLOCK]


def test_every_better_plan_is_told_about_once() -> None:
    told: list[tuple[Score, int]] = []
    found = found_in(planted_linear.task(), on_better=lambda *what: told.append(what))
    speeds, judged = [score.speedup for score, _ in told], [count for _, count in told]
    assert speeds == sorted(set(speeds)) and len(speeds) > 2
    assert judged == sorted(judged) and judged[-1] <= found.judged
    assert found.score is not None and told[-1][0].plan == found.score.plan
    assert planted_linear.IDENTITY in found.score.plan.layers, "found in refining"


def test_it_goes_on_from_what_is_left_out_already() -> None:
    task = planted_linear.task()
    before = task.objective.score(SkipPlan.of_layers([planted_linear.IDENTITY]))
    assert before.speedup > 1
    found = find_stand_ins(task, before, SETTINGS, 0, nobody)
    assert found.score is not None and found.objective is not None
    assert found.score.plan.layers == (planted_linear.IDENTITY, *planted_linear.LINEAR)
    assert found.score.speedup > found.objective.score(before.plan).speedup * (1 + SAME)


def test_maps_that_cost_more_than_they_save_are_none() -> None:
    task = planted_linear.task(costs=DEAR_MAPS)
    before = task.objective.score(SkipPlan.of_layers([planted_linear.IDENTITY]))
    found = found_in(task, before)
    assert found.score is before and found.objective is None
    assert found.reason is not None and "none decodes faster" in found.reason
    assert found.judged > 0
    assert found_in(task).score is None


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_prompts(count: int) -> None:
    found = found_in(planted_linear.task(count, tokens=24))
    assert (found.score, found.judged) == (None, 0)
    few = "two prompts with outputs" if count < 2 else "32 tokens are too few to fit to"
    assert few in str(found.reason)


def test_too_few_layers() -> None:
    shallow = tiny.decoder("llama")
    prompts = planted_linear.prompts(6)
    task = Task(shallow, prompts, planted_linear.COSTS, 96, frozenset())
    before = shallow.full_passes
    assert found_in(task).reason == "the model has 5 layers, and they pay from 6 on"
    assert shallow.full_passes == before


@pytest.mark.parametrize("form", ["several streams", "another width"])
def test_layers_that_hand_on_something_else(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = planted_linear.task()
    showing = task.decoder.showing_states

    @contextmanager
    def other(layers: Any, show: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
        def shown(layer: int, states: torch.Tensor) -> None:
            show(layer, states[None] if form == "several streams" else states[..., :-1])

        with showing(layers, shown):
            yield

    monkeypatch.setattr(task.decoder, "showing_states", other)
    found = found_in(task)
    assert found.reason == "what its layers hand on is not one state per token"
    assert found.score is None


@pytest.mark.parametrize("count", [6, 2 * MOST_TEXTS])
def test_what_is_judged_by_is_never_fitted_to(count: int, seen: Seen) -> None:
    task = planted_linear.task(count, tokens=80)
    found = found_in(task, settings=StandInSettings(tokens=600))
    assert found.score is not None and found.tokens > 0
    prompts = set(planted_linear.prompts(count))
    assert seen.judging and seen.fitted and seen.judging | seen.fitted <= prompts
    assert not seen.judging & seen.fitted
    plenty = count == 2 * MOST_TEXTS
    assert len(seen.judging) == (MOST_TEXTS if plenty else count // 3)
    assert (found.objective is task.objective) is plenty


@pytest.mark.parametrize("at", [1, 3])
def test_an_interrupt_keeps_the_best_so_far(at: int) -> None:
    told: list[Score] = []

    def interrupt(score: Score, judged: int) -> None:
        told.append(score)
        if len(told) == at:
            raise KeyboardInterrupt

    found = found_in(planted_linear.task(), on_better=interrupt)
    assert found.interrupted and len(told) == at
    assert found.score is told[-1]


def test_an_interrupt_while_it_is_refined_keeps_the_best_so_far(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rounds: list[Score] = []

    def interrupted(self: Any, best: Score, *args: Any, **how: Any) -> Any:
        rounds.append(best)
        raise KeyboardInterrupt

    monkeypatch.setattr(Refiner, "_first_gain", interrupted)
    found = found_in(planted_linear.task())
    assert found.interrupted and len(rounds) == 1
    assert found.score is not None and found.score.plan == rounds[0].plan
    assert blocks_of(found.score.plan.stand_ins) == [BLOCK]


def test_out_of_time_it_ends_with_what_it_has() -> None:
    task = planted_linear.task()
    task.deadline = task.record.meter().seconds
    found = found_in(task)
    assert found.score is None and found.judged == 0
    assert not found.interrupted
