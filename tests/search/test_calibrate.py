"""From prompts to a decision."""

import itertools
from collections.abc import Callable
from itertools import pairwise

import pytest

from conflayers_cli.engine.cost_model import PassCosts
from conflayers_cli.search import calibrate as module
from conflayers_cli.search.calibrate import (
    Calibration,
    calibrate,
    search_and_refine,
    split_prompts,
)
from conflayers_cli.search.memo import Memo
from conflayers_cli.search.objective import PAPER, VANILLA, DraftParams
from conflayers_cli.search.problem import RangePlan, SearchProblem, SearchResult, Strategy
from conflayers_cli.search.strategies.conflayers import ConfLayers
from conflayers_cli.search.strategies.local import Local
from conflayers_cli.search.strategies.unified import Unified
from conflayers_cli.search.validate import Check, check_by_decoding, make_proposer
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.mixed import MixedProposer
from conflayers_cli.spec_decode.proposer import SkipProposer
from tests import tiny

CHEAP_DRAFTS = PassCosts({1: 10.0, 26: 11.0}, floor=0.01, attention=0.01, mlp=0.01, context=256)
DEAR_DRAFTS = PassCosts({1: 10.0, 26: 40.0}, floor=9.0, attention=0.1, mlp=0.1, context=256)


def run(costs: PassCosts, *, refine: bool = True, interrupt_at: str = "") -> Calibration:
    decoder = tiny.decoder("llama")
    prompts = tuple(tuple(tiny.prompt(9, seed)) for seed in range(4))
    problem = SearchProblem(decoder, prompts[:3], costs, 40, frozenset())

    def stage(name: str) -> None:
        if interrupt_at and interrupt_at in name:
            raise KeyboardInterrupt

    return calibrate(
        ConfLayers(search_interval=6, max_iterations=4, skip_ratio=0.1),
        problem,
        prompts[3:],
        refine=500 if refine else 0,
        on_stage=stage,
        on_better=lambda score, judged: None,
    )


def checked(monkeypatch: pytest.MonkeyPatch, speedup: float) -> None:
    """Real decoding of a tiny model is all overhead: set what it would measure."""
    monkeypatch.setattr(
        module, "check_by_decoding", lambda *args, **how: [Check(speedup, 0.9, 3.0, 1, True)]
    )


def test_a_plan_that_pays_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    checked(monkeypatch, 1.4)
    done = run(CHEAP_DRAFTS)
    expected = done.candidate.expected
    assert done.plan and expected is not None
    assert done.plan == expected.plan
    assert done.setting == expected.setting
    assert expected.speedup > 1
    assert done.candidate.full_passes > 0 and done.candidate.draft_passes > 0
    assert "1.40× vanilla, measured on 1 held-out prompt" in done.conclusion


def test_a_plan_that_measures_slower_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    checked(monkeypatch, 0.9)
    done = run(CHEAP_DRAFTS)
    assert (done.plan, done.setting) == (SkipPlan(), VANILLA)
    assert done.candidate.plan
    assert done.conclusion.startswith("no plan pays")
    assert "0.90×" in done.conclusion


def test_no_plan_pays_where_drafts_cost_as_much_as_the_model() -> None:
    done = run(DEAR_DRAFTS)
    assert (done.plan, done.setting, done.check) == (SkipPlan(), VANILLA, None)
    assert done.conclusion.startswith("no plan pays")
    assert "predicted at 0." in done.conclusion
    assert done.candidate.plan


def test_unrefined_is_the_strategys_own_whatever_it_is_worth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checked(monkeypatch, 0.5)
    done = run(DEAR_DRAFTS, refine=False)
    assert done.plan == done.result.plan
    assert done.setting == PAPER
    assert not done.candidate.refined
    assert done.conclusion.startswith("no plan pays")


@pytest.mark.parametrize("stage", ["refining", "checking"])
def test_an_interrupt_keeps_the_best_so_far(stage: str) -> None:
    done = run(CHEAP_DRAFTS, interrupt_at=stage)
    assert done.interrupted
    assert done.plan and done.check is None
    assert "interrupted" in done.conclusion


def small_task(prompts: int = 2, costs: PassCosts = CHEAP_DRAFTS) -> SearchProblem:
    texts = tuple(tuple(tiny.prompt(9, seed)) for seed in range(prompts))
    return SearchProblem(tiny.decoder("llama"), texts, costs, 30, frozenset())


def test_the_check_decodes_every_arm() -> None:
    candidates = [
        (SkipPlan.of_layers([2]), DraftParams(3, 0.0)),
        (SkipPlan(), VANILLA),
        (SkipPlan.of_layers([1, 2, 3]), DraftParams(5, 0.0)),
    ]
    one, none, bad = check_by_decoding(small_task(), candidates, ())
    assert one is not None and none is None and bad is not None
    assert one.prompts == 2 and not one.held_out
    assert one.speedup > 0 and one.overall is not None
    assert one.overall == pytest.approx(one.speedup, rel=1.0)  # of the same two prompts
    assert one.acceptance_rate is not None and 0 < one.acceptance_rate < 1
    assert one.tokens_per_step is not None and 1 < one.tokens_per_step <= 4
    assert bad.acceptance_rate is not None and bad.acceptance_rate < one.acceptance_rate


def test_with_an_adaptive_length_the_check_drafts_as_far_as_it_pays() -> None:
    problem, setting = small_task(), DraftParams(3, 0.0)
    plan = SkipPlan.of_layers([2])
    fixed, ahead = (
        make_proposer(problem, plan, setting, adaptive_draft_length=way) for way in (False, True)
    )
    assert isinstance(fixed, SkipProposer)
    assert isinstance(ahead, MixedProposer) and ahead.name == "skip"
    assert make_proposer(problem, SkipPlan(), setting, adaptive_draft_length=True) is None
    (check,) = check_by_decoding(problem, [(plan, setting)], (), adaptive_draft_length=True)
    assert check is not None and check.speedup > 0
    # drafts are as good as free by these costs, so more than three are drafted at once
    assert check.tokens_per_step is not None and check.tokens_per_step > 1


class WithRanges:
    """A strategy that finds a bad plan for short texts, and others for longer ones."""

    name = "ranges"
    setting = DraftParams(4, 0.5)

    def search(self, problem: SearchProblem) -> SearchResult:
        ranges = (RangePlan(512, SkipPlan.of_layers([1])), RangePlan(2048, SkipPlan.of_layers([3])))
        return SearchResult(
            SkipPlan.of_layers([1, 2, 3]), (), {}, False, "done", DraftParams(7, 0.1), ranges
        )


def test_ranges_are_refined_at_their_context_and_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    checked(monkeypatch, 1.4)
    # attention grows dear with the context: the longer, the more of it is worth leaving out
    costs = PassCosts(
        {1: 10.0, 26: 11.0}, 0.01, 0.01, 3.0, context=256, attention_per_position=0.02
    )

    def nothing(*args: object) -> None:
        pass

    done = calibrate(
        WithRanges(), small_task(3, costs), (), refine=300, on_stage=nothing, on_better=nothing
    )
    plans = [done.plan, *(each.plan for each in done.ranges)]
    assert all(one != other for one, other in pairwise(plans))
    assert all(each.setting is not None for each in done.ranges)
    unrefined = calibrate(
        WithRanges(), small_task(3, costs), (), refine=0, on_stage=nothing, on_better=nothing
    )
    assert unrefined.setting == DraftParams(7, 0.1)
    assert [each.from_context for each in unrefined.ranges] == [512, 2048]


@pytest.mark.parametrize("refine", [0, 300])
def test_outputs_too_short_are_no_verdict(refine: int) -> None:
    def nothing(*args: object) -> None:
        pass

    problem = SearchProblem(
        tiny.decoder("llama"), (tuple(tiny.prompt(9)),), CHEAP_DRAFTS, 8, frozenset()
    )
    done = calibrate(Unified(1.5), problem, (), refine=refine, on_stage=nothing, on_better=nothing)
    assert "no plan can be judged" in done.conclusion
    assert bool(done.plan) is not bool(refine)
    assert done.setting.max_tokens > 0 or not done.plan


def test_prompts_are_split_without_loss_and_by_seed() -> None:
    prompts = [(i,) for i in range(20)]
    used, held = split_prompts(prompts, 0)
    assert sorted(used + held) == prompts
    assert len(held) == 5
    assert split_prompts(prompts, 0) == (used, held)
    assert split_prompts(prompts, 1) != (used, held)
    assert split_prompts(prompts[:3], 0)[1] == ()
    assert len(split_prompts([(i,) for i in range(80)], 0)[1]) == 6


def ticking() -> Callable[[], float]:
    """A clock that goes on by a second at every look at it."""
    ticks = itertools.count()
    return lambda: float(next(ticks))


@pytest.mark.parametrize("strategy", [Local(), ConfLayers(search_interval=6, skip_ratio=0.1)])
def test_a_budget_ends_each_stage_in_time(strategy: Strategy) -> None:
    prompts = tuple(tuple(tiny.prompt(9, seed)) for seed in range(4))
    judged, checked_prompts = [], []
    for budget in (None, 40.0):
        problem = SearchProblem(
            *(tiny.decoder("llama"), prompts[:2], CHEAP_DRAFTS, 40, frozenset()),
            shared_memo=Memo(tiny.decoder("llama"), clock=ticking()),
        )
        done = calibrate(
            *(strategy, problem, prompts[2:]),
            budget=budget,
            refine=500,
            on_stage=lambda name: None,
            on_better=lambda score, judged: None,
        )
        assert done.check is not None and done.candidate.refined
        judged.append(done.candidate.judged)
        checked_prompts.append(done.check.prompts)
    assert judged[1] < judged[0]
    assert checked_prompts[0] == 2


def test_every_look_is_told_with_the_share_that_is_done() -> None:
    looks: list[tuple[int, float]] = []
    search_and_refine(
        Local(),
        small_task(),
        refine=500,
        on_stage=lambda name: None,
        on_better=lambda score, judged: None,
        on_look=lambda judged, done: looks.append((judged, done)),
    )
    assert len(looks) > 5
    assert all(0 <= done <= 1 for _, done in looks)
    assert [judged for judged, _ in looks] == sorted(judged for judged, _ in looks)
