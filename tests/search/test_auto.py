"""Several strategies within a budget."""

from collections.abc import Sequence

import pytest

from conflayers_cli.errors import InputError
from conflayers_cli.search import auto as module
from conflayers_cli.search.auto import auto
from conflayers_cli.search.calibrate import Calibration
from conflayers_cli.search.objective import DraftParams
from conflayers_cli.search.problem import SearchProblem, SearchResult, Strategy
from conflayers_cli.search.strategies.greedy import Greedy
from conflayers_cli.search.strategies.unified import Unified
from conflayers_cli.search.validate import Check
from conflayers_cli.skip_plan import SkipPlan
from tests.search import planted


def run(strategies: Sequence[Strategy], budget: float = 1000.0, refine: int = 0) -> Calibration:
    return auto(
        strategies,
        planted.problem(),
        (),
        budget=budget,
        refine=refine,
        on_stage=lambda name: None,
        on_better=lambda score, judged: None,
    )


def checks_by_size(
    monkeypatch: pytest.MonkeyPatch, worth: dict[int, float]
) -> list[list[tuple[SkipPlan, DraftParams]]]:
    """Real decoding of tiny models is all overhead: set what it would measure, by plan size."""
    asked: list[list[tuple[SkipPlan, DraftParams]]] = []

    def check(
        problem: SearchProblem,
        candidates: list[tuple[SkipPlan, DraftParams]],
        held_out: object,
        *,
        adaptive_draft_length: bool,
    ) -> list[Check]:
        asked.append(candidates)
        return [Check(worth.get(len(plan), 1.1), 0.9, 3.0, 1, True) for plan, _ in candidates]

    monkeypatch.setattr(module, "check_by_decoding", check)
    return asked


class Fixed:
    """A strategy that says what it is told to."""

    setting = DraftParams(4, 0.3)

    def __init__(self, name: str, plan: SkipPlan, interrupts: bool = False) -> None:
        self.name, self.plan, self.interrupts = name, plan, interrupts
        self.deadline: float | None = None

    def search(self, problem: SearchProblem) -> SearchResult:
        self.deadline = problem.deadline
        return SearchResult(self.plan, (), {}, self.interrupts, "said")


PART = SkipPlan.of_layers(planted.PLANTED[:4])
WHOLE = SkipPlan.of_layers(planted.PLANTED)


def test_keeps_what_decodes_fastest_and_reports_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NEAR", 0.9)
    checks_by_size(monkeypatch, {8: 1.5, 10: 1.3})
    done = run([Fixed("one", WHOLE), Fixed("two", PART)])
    assert done.plan == PART
    assert done.candidate.strategy == "two"
    assert [
        (each.strategy, check.speedup if check else None) for each, check in done.candidates
    ] == [
        ("one", 1.3),
        ("two", 1.5),
    ]


def test_equal_plans_are_decoded_with_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = checks_by_size(monkeypatch, {10: 1.4})
    done = run([Fixed("one", WHOLE), Fixed("two", WHOLE)])
    assert asked == [[(WHOLE, Fixed.setting)]]
    assert all(check is not None for _, check in done.candidates)


def test_plans_without_a_chance_are_not_decoded_with(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = checks_by_size(monkeypatch, {})
    hopeless = SkipPlan.of_layers([1, 4, 5])
    done = run([Fixed("good", WHOLE), Fixed("hopeless", hopeless)])
    assert [plan for plan, _ in asked[0]] == [WHOLE]
    assert done.candidates[1][1] is None


def test_the_budget_is_shared_and_ends_the_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    checks_by_size(monkeypatch, {10: 1.4})
    one, two = Fixed("one", WHOLE), Fixed("two", PART)
    done = run([one, two], budget=1e-9)
    assert [each.strategy for each, _ in done.candidates] == ["one"]
    run([one, two], budget=1000.0)
    assert one.deadline is not None and two.deadline is not None
    assert one.deadline < two.deadline  # what the first did not use goes to the second


@pytest.mark.parametrize("refine", [0, 300])
def test_an_interrupt_keeps_the_best_found(refine: int) -> None:
    strategies = [Fixed("one", WHOLE), Fixed("two", PART, interrupts=True), Fixed("three", PART)]
    done = run(strategies, refine=refine)
    assert done.interrupted
    assert done.plan == WHOLE
    assert "interrupted" in done.conclusion or not refine
    assert [each.strategy for each, _ in done.candidates] == ["one", "two"]


def test_an_interrupt_of_the_check_keeps_the_best_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **how: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "check_by_decoding", interrupted)
    done = run([Fixed("one", WHOLE), Fixed("two", PART)], refine=300)
    assert done.interrupted and done.plan == WHOLE


class Refused:
    """A strategy that is not for this model."""

    name = "refused"
    setting = DraftParams(4, 0.3)

    def search(self, problem: SearchProblem) -> SearchResult:
        raise InputError("not for this model")


def test_a_strategy_that_does_not_apply_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    checks_by_size(monkeypatch, {10: 1.4})
    done = run([Refused(), Fixed("one", WHOLE)])
    assert done.plan == WHOLE
    with pytest.raises(InputError, match="not for this model"):
        run([Refused()])


def test_real_strategies_together(monkeypatch: pytest.MonkeyPatch) -> None:
    checks_by_size(monkeypatch, {})
    done = run([Unified(1.5), Greedy()], refine=300)
    assert done.plan == WHOLE
    assert {each.strategy for each, _ in done.candidates} == {"unified", "greedy"}
