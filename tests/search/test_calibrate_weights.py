"""Calibration where drafts may use weights of four bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from conflayers_cli.engine.cost_model import PassCosts
from conflayers_cli.search import auto as auto_module
from conflayers_cli.search import calibrate as module
from conflayers_cli.search.auto import auto
from conflayers_cli.search.calibrate import Calibration, calibrate
from conflayers_cli.search.objective import DraftParams
from conflayers_cli.search.problem import RangePlan, SearchProblem, SearchResult
from conflayers_cli.search.validate import Check
from conflayers_cli.skip_plan import SkipPlan, Weights
from tests.search import planted

HALF = replace(planted.COSTS, int4_attention=0.2, int4_mlp=0.2, int4_floor=0.3)
DEAR = replace(planted.COSTS, int4_attention=0.6, int4_mlp=0.6, int4_floor=0.5)
BOTH: tuple[Weights | None, ...] = (None, "int4")


class Fixed:
    """A strategy that knows its answer, two layers."""

    name = "fixed"
    setting = DraftParams(4, 0.5)

    def __init__(self, ranges: tuple[RangePlan, ...] = ()) -> None:
        self._ranges = ranges

    def search(self, problem: SearchProblem) -> SearchResult:
        plan = SkipPlan.of_layers([1, 8])
        return SearchResult(plan, (), {}, False, "done", None, self._ranges)


@pytest.fixture(autouse=True)
def _checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real decoding of a tiny model is all overhead: set what it would measure."""

    def check(
        problem: SearchProblem, candidates: Sequence[object], *more: object, **how: object
    ) -> list[Check]:
        return [Check(1.4, 0.9, 3.0, 1, True) for _ in candidates]

    monkeypatch.setattr(module, "check_by_decoding", check)
    monkeypatch.setattr(auto_module, "check_by_decoding", check)


def run(costs: PassCosts, weights: Sequence[Weights | None], *, refine: int = 200) -> Calibration:
    return calibrate(
        Fixed(),
        planted.problem(costs=costs),
        (),
        refine=refine,
        weights=weights,
        on_stage=lambda name: None,
        on_better=lambda score, judged: None,
    )


def test_the_cheaper_weights_are_found_with_the_layers_that_go_with_them() -> None:
    done = run(HALF, BOTH)
    assert done.plan.weights == "int4"
    assert set(planted.PLANTED) <= set(done.plan.attention) | set(done.plan.mlp)
    assert done.conclusion.startswith("drafting with int4 weights and skipping ")
    own = run(HALF, (None,))
    assert own.plan.weights is None and own.conclusion.startswith("skipping ")
    expected = [each.candidate.expected for each in (done, own)]
    assert expected[0] is not None and expected[1] is not None
    assert expected[0].speedup > expected[1].speedup


def test_weights_that_cost_more_are_not_taken() -> None:
    assert run(DEAR, BOTH).plan.weights is None
    assert run(DEAR, ("int4",)).plan.weights == "int4"  # nothing else is wanted


def test_unrefined_plans_keep_the_models_own() -> None:
    assert run(HALF, BOTH, refine=0).plan == SkipPlan.of_layers([1, 8])


def test_they_alone_may_be_the_answer() -> None:
    """Where every layer that is left out costs more than it saves."""
    free = replace(HALF, int4_attention=0.001, int4_mlp=0.001)
    done = run(free, BOTH)
    assert done.plan.weights == "int4"
    single = module._in_words(SkipPlan(weights="int4"))
    assert single == "drafting with int4 weights"


def test_of_several_strategies_and_of_ranges() -> None:
    ranges = (RangePlan(600, SkipPlan.of_layers([2]), Fixed.setting),)
    done = auto(
        [Fixed(ranges), Fixed()],
        planted.problem(costs=HALF),
        (),
        budget=1e6,
        refine=60,
        weights=BOTH,
        on_stage=lambda name: None,
        on_better=lambda score, judged: None,
    )
    assert all(candidate.plan.weights == "int4" for candidate, _ in done.candidates)
    assert all(each.plan.weights == "int4" for each in done.candidates[0][0].ranges)
