"""Calibration with stand-ins: looked for, put to the proof, cut short and resumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from conflayers_cli.engine.cost_model import Costs
from conflayers_cli.journal_lines import parsed
from conflayers_cli.search import objective as objective_module
from conflayers_cli.search import stand_ins as module
from conflayers_cli.search import validate as check_module
from conflayers_cli.search.auto import auto
from conflayers_cli.search.calibrate import Calibration, calibrate
from conflayers_cli.search.journal import Journal
from conflayers_cli.search.objective import Objective, Score, Setting
from conflayers_cli.search.problem import RangePlan, SearchResult, Task
from conflayers_cli.search.record import Entry
from conflayers_cli.search.settings import StandInSettings
from conflayers_cli.search.stand_ins import blocks_of
from conflayers_cli.search.validate import Check
from conflayers_cli.skip_plan import SkipPlan
from tests.search import planted_linear
from tests.search.planted_linear import IDENTITY, LINEAR
from tests.search.test_resume import Dying, KilledError, Ticking, close, told

SETTINGS = StandInSettings(tokens=2000)
BLOCK = (LINEAR.start, LINEAR.stop)
HELD_OUT = planted_linear.prompts(2, 50)


class Fixed:
    """A strategy that knows its answer: the layer that may be left out, and one that may not."""

    name = "fixed"
    setting = Setting(4, 0.5)

    def __init__(self, ranges: tuple[RangePlan, ...] = ()) -> None:
        self._ranges = ranges

    def search(self, task: Task) -> SearchResult:
        plan = SkipPlan.of_layers([IDENTITY, 8])
        return SearchResult(plan, (), {}, False, "done", None, self._ranges)


def run(
    task: Task,
    strategy: Fixed | None = None,
    *,
    on_stage: Callable[[str], None] = lambda name: None,
    on_better: Callable[[Score, int], None] = lambda score, judged: None,
) -> Calibration:
    return calibrate(
        strategy or Fixed(),
        task,
        HELD_OUT,
        refine=12,
        stand_ins=SETTINGS,
        on_stage=on_stage,
        on_better=on_better,
    )


@pytest.fixture(autouse=True)
def few_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaying texts with every draft setting takes most of a tiny model's time."""
    monkeypatch.setattr(objective_module, "LENGTHS", (2, 4, 8))
    monkeypatch.setattr(objective_module, "STOPS", (0.0, 0.5))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real decoding of a tiny model is all overhead: set what it would measure."""

    def checks(task: Task, candidates: list[object], *args: object) -> list[Check]:
        return [Check(1.4, 0.9, 3.0, 1, True) for _ in candidates]

    monkeypatch.setattr(check_module, "_checks", checks)


def test_a_plan_with_maps_is_put_to_the_proof_by_decoding() -> None:
    stages: list[str] = []
    done = run(planted_linear.task(), on_stage=stages.append)
    assert stages == ["refining", "fitting stand-ins", "checking by real decoding"]
    candidate = done.candidate
    assert blocks_of(candidate.plan.stand_ins) == [BLOCK]
    assert candidate.plan.layers == (IDENTITY, *LINEAR)
    assert candidate.expected is not None and candidate.expected.plan == candidate.plan
    assert candidate.stand_ins is not None and candidate.stand_ins.reason is None
    assert candidate.judged > candidate.stand_ins.judged > 0
    check = done.check
    assert check is not None and check.held_out and check.prompts == len(HELD_OUT)
    # decoded with the maps: without them, at most every second of these drafts is right
    assert check.acceptance_rate is not None and check.acceptance_rate > 0.75
    assert check.tokens_per_step is not None and check.tokens_per_step > 2
    assert f"{check.speedup:.2f}× vanilla, measured on 2 held-out prompts" in done.conclusion


@pytest.mark.usefixtures("measured")
def test_the_answer_keeps_its_maps() -> None:
    done = run(planted_linear.task())
    assert done.plan == done.candidate.plan and done.plan.stand_ins
    assert "1.40× vanilla" in done.conclusion


@pytest.mark.usefixtures("measured")
def test_where_maps_do_not_pay_the_plan_without_is_the_answer() -> None:
    dear = replace(planted_linear.COSTS, stand_in=30.0)
    done = run(planted_linear.task(costs=dear))
    assert done.plan == SkipPlan.of_layers([IDENTITY])
    assert done.candidate.stand_ins is not None
    assert "none decodes faster" in str(done.candidate.stand_ins.reason)


@pytest.mark.usefixtures("measured")
def test_every_strategy_of_auto_gets_its_maps() -> None:
    done = auto(
        [Fixed(), Fixed()],
        planted_linear.task(),
        (),
        budget=1e6,
        refine=4,
        stand_ins=SETTINGS,
        on_stage=lambda name: None,
        on_better=lambda score, judged: None,
    )
    first, second = (candidate for candidate, _ in done.others)
    assert blocks_of(first.plan.stand_ins) == blocks_of(second.plan.stand_ins) == [BLOCK]
    assert first.plan == second.plan, "the same texts, the same maps, the same bits"


def test_an_interrupt_when_fitting_begins_keeps_the_refined_plan() -> None:
    def interrupt(name: str) -> None:
        if name == "fitting stand-ins":
            raise KeyboardInterrupt

    done = run(planted_linear.task(), on_stage=interrupt)
    assert done.interrupted and done.check is None
    assert done.candidate.expected is not None
    assert done.plan == done.candidate.expected.plan == SkipPlan.of_layers([IDENTITY])
    assert done.setting == done.candidate.expected.setting


def test_an_interrupt_while_maps_are_looked_for_keeps_the_best() -> None:
    best: list[Score] = []

    def interrupt(score: Score, judged: int) -> None:
        best.append(score)
        if score.plan.stand_ins:
            raise KeyboardInterrupt

    done = run(planted_linear.task(), on_better=interrupt)
    assert done.interrupted and done.check is None
    assert done.plan == best[-1].plan and done.plan.stand_ins
    assert done.conclusion.startswith("interrupted: the best plan so far")


@pytest.mark.usefixtures("measured")
def test_ranges_are_judged_by_texts_not_fitted_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of few prompts, the texts that the search went by are fitted to: a plan with maps is judged
    by the others, for longer contexts too."""
    judges: list[int] = []
    score = Objective.score

    def noted(self: Objective, plan: SkipPlan, texts: int | None = None) -> Score:
        if plan.stand_ins:
            judges.append(self.texts)
        return score(self, plan, texts)

    monkeypatch.setattr(Objective, "score", noted)
    costs: Costs = replace(planted_linear.COSTS, attention_per_position=0.001)
    ranges = (RangePlan(1024, SkipPlan.of_layers([IDENTITY, 8])),)
    done = run(planted_linear.task(costs=costs), Fixed(ranges))
    assert done.candidate.stand_ins is not None and done.candidate.stand_ins.objective is not None
    assert done.plan.stand_ins
    assert set(judges) == {2}, "of six prompts two are judged by"


class Case:
    """A calibration that may be run again and again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, *, resume: bool, die_after: int = 0) -> Calibration:
        profile = self.path.with_name("found.yaml")
        with Journal.open(self.path, profile, resume=resume, tell=pytest.fail) as journal:
            journal.begin({"name": "stand-ins"})
            decoder = planted_linear.decoder()
            record = Ticking(decoder, journal.entries, Dying(journal, die_after))
            try:
                return run(planted_linear.task(10, tokens=40, recorder=record))
            finally:
                record.close()

    @property
    def entries(self) -> tuple[Entry, ...]:
        return parsed(self.path, self.path.read_bytes()).entries


@pytest.mark.usefixtures("measured")
def test_dying_after_every_entry_it_comes_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROUNDS", 0)
    monkeypatch.setattr(module, "MOST_BLOCKS", 1)
    whole = Case(tmp_path / "whole.journal.jsonl")
    expected = whole.run(resume=False)
    assert expected.plan.stand_ins
    case, lives = Case(tmp_path / "found.journal.jsonl"), 0
    while True:
        try:
            done = case.run(resume=lives > 0, die_after=1)
            break
        except KilledError:
            lives += 1
            assert len(case.entries) == lives, "each life adds one entry, and repeats none"
    assert lives == len(whole.entries) > 10
    close(told(done), told(expected))
    # a plan is what it was to the bit: its maps are fitted anew, to the same texts
    assert done.plan == expected.plan
    for one, other in zip(case.entries, whole.entries, strict=True):
        assert [key for key, _ in one.outcomes] == [key for key, _ in other.outcomes]
    keys = [key for entry in case.entries for key, _ in entry.outcomes]
    assert any(key.startswith("texts ") for key in keys)
    assert any("map 3-7 full" in key for key in keys)
