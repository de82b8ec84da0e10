"""Hill climbing finds the planted answer from a messy start."""

from types import SimpleNamespace
from typing import cast

import pytest

from conflayers_cli.search.local_search import LocalSearch, Move
from conflayers_cli.search.objective import DraftParams, Objective, Replay, Score
from conflayers_cli.skip_plan import SkipPlan

DEPTH = 20
PLANTED = {2, 3, 7, 8, 9, 13, 17}


class Landscape:
    """Every planted sub-layer left out gains, every other one costs."""

    def __init__(self, bonus: dict[tuple[str, int], float] | None = None) -> None:
        self.decoder = SimpleNamespace(depth=DEPTH)
        self.costs = SimpleNamespace(attention=1.0, mlp=1.0)
        self.num_texts = 8
        self.bonus = bonus or {}
        self.asked = 0

    def is_cached(self, plan: SkipPlan, texts: int | None = None) -> bool:
        return False

    def anchor(self, plan: SkipPlan) -> None:
        """No hidden states are kept."""

    def effects(self) -> dict[tuple[int, str], float]:
        """Those of the planted layers are small, but for one; one other layer's is smallest."""
        changes = {i: 0.1 if i in PLANTED else 1.0 + i / DEPTH for i in range(DEPTH)}
        changes |= {13: 1.25, 5: 0.05}
        return {(i, kind): each for i, each in changes.items() for kind in ("attention", "mlp")}

    def score(self, plan: SkipPlan, texts: int | None = None) -> Score:
        self.asked += 1
        speedup = 1.0
        for kind, indices in (("attention", plan.attention), ("mlp", plan.mlp)):
            for i in indices:
                gain = self.bonus.get((kind, i), 0.01 if i in PLANTED else -0.03)
                speedup += gain
        return Score(plan, 0.9, DraftParams(4, 0.0), speedup, Replay(1, 1, 1, 2, 1.0))


def refiner(landscape: Landscape, single: bool = False, most: int = 10_000) -> LocalSearch:
    return LocalSearch(
        cast(Objective, landscape),
        single_sub_layers=single,
        on_progress=lambda score, judged: None,
        max_plans=most,
    )


@pytest.mark.parametrize("start", [(), (1, 2, 3, 5), (4, 5, 6, 10, 11), tuple(range(1, 19))])
def test_finds_the_planted_layers_from_anywhere(start: tuple[int, ...]) -> None:
    best = refiner(Landscape()).refine(SkipPlan.of_layers(start))
    assert set(best.plan.layers) == PLANTED
    assert best.plan.partial == ()


def test_single_sub_layers_are_found_where_they_gain() -> None:
    landscape = Landscape({("attention", 5): 0.02, ("mlp", 7): -0.02})
    best = refiner(landscape, single=True).refine(SkipPlan.of_layers([2]))
    assert set(best.plan.attention) == PLANTED | {5}
    assert set(best.plan.mlp) == PLANTED - {7}


def test_single_sub_layers_are_left_alone_where_the_model_has_none() -> None:
    landscape = Landscape({("attention", 5): 0.02})
    best = refiner(landscape, single=False).refine(SkipPlan())
    assert best.plan.partial == ()


def test_never_worse_than_the_start_and_bounded() -> None:
    landscape = Landscape()
    start = SkipPlan.of_layers([2, 5])
    climber = refiner(landscape, most=5)
    best = climber.refine(start)
    assert best.speedup >= landscape.score(start).speedup
    # the start and its part in a comparison may come on top
    assert climber.judged <= 5 + 3


def test_never_ends_with_the_empty_plan() -> None:
    landscape = Landscape({("attention", i): -0.01 - 0.001 * i for i in range(DEPTH)})
    landscape.bonus |= {("mlp", i): -0.02 for i in range(DEPTH)}
    best = refiner(landscape, single=True).refine(SkipPlan.of_layers([4, 9]))
    assert len(best.plan) == 1
    assert best.speedup < 1


def test_a_move_flips_just_its_sub_layers() -> None:
    plan = SkipPlan.of([1, 4], [4])
    assert Move(4, True, True).apply(plan) == SkipPlan.of([1], [])
    assert Move(4, False, True).apply(plan) == SkipPlan.of([1, 4], [])
    assert Move(6, True, False).apply(plan) == SkipPlan.of([1, 4, 6], [4])
