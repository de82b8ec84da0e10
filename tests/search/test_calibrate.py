"""From prompts to a decision."""

import pytest

from conflayers_cli.engine.costs import Costs
from conflayers_cli.engine.plan import SkipPlan
from conflayers_cli.search import calibrate as module
from conflayers_cli.search.calibrate import Calibration, Check, calibrate, split_prompts
from conflayers_cli.search.conflayers import ConfLayers
from conflayers_cli.search.objective import VANILLA, Setting
from conflayers_cli.search.task import Task
from tests import tiny

PAPER = Setting(25, 0.8)
CHEAP_DRAFTS = Costs({1: 10.0, 26: 11.0}, floor=0.01, attention=0.01, mlp=0.01, context=256)
DEAR_DRAFTS = Costs({1: 10.0, 26: 40.0}, floor=9.0, attention=0.1, mlp=0.1, context=256)


def run(costs: Costs, *, refine: bool = True, interrupt_at: str = "") -> Calibration:
    decoder = tiny.decoder("llama")
    prompts = tuple(tuple(tiny.prompt(9, seed)) for seed in range(4))
    task = Task(decoder, prompts[:3], costs, 40, frozenset(), lambda trial, best: None)

    def stage(name: str) -> None:
        if interrupt_at and interrupt_at in name:
            raise KeyboardInterrupt

    return calibrate(
        ConfLayers(search_interval=6, max_iterations=4, skip_ratio=0.1),
        task,
        prompts[3:],
        refine=500 if refine else 0,
        paper_setting=PAPER,
        on_stage=stage,
        on_better=lambda score, judged: None,
    )


def checked(monkeypatch: pytest.MonkeyPatch, speedup: float) -> None:
    """Real decoding of a tiny model is all overhead: set what it would measure."""
    monkeypatch.setattr(
        module, "check_by_decoding", lambda *args: Check(speedup, 0.9, 3.0, 1, True)
    )


def test_a_plan_that_pays_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    checked(monkeypatch, 1.4)
    done = run(CHEAP_DRAFTS)
    assert done.plan and done.expected is not None
    assert done.plan == done.expected.plan
    assert done.setting == done.expected.setting
    assert done.expected.speedup > 1
    assert "1.40× vanilla, measured on 1 held-out prompts" in done.conclusion


def test_a_plan_that_measures_slower_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    checked(monkeypatch, 0.9)
    done = run(CHEAP_DRAFTS)
    assert (done.plan, done.setting) == (SkipPlan(), VANILLA)
    assert done.candidate
    assert done.conclusion.startswith("no plan pays")
    assert "0.90×" in done.conclusion


def test_no_plan_pays_where_drafts_cost_as_much_as_the_model() -> None:
    done = run(DEAR_DRAFTS)
    assert (done.plan, done.setting, done.check) == (SkipPlan(), VANILLA, None)
    assert done.conclusion.startswith("no plan pays")
    assert "predicted at 0." in done.conclusion
    assert done.candidate


def test_unrefined_is_the_strategys_own_whatever_it_is_worth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checked(monkeypatch, 0.5)
    done = run(DEAR_DRAFTS, refine=False)
    assert done.plan == done.result.plan
    assert done.setting == PAPER
    assert not done.refined
    assert done.conclusion.startswith("no plan pays")


@pytest.mark.parametrize("stage", ["refining", "checking"])
def test_an_interrupt_keeps_the_best_so_far(stage: str) -> None:
    done = run(CHEAP_DRAFTS, interrupt_at=stage)
    assert done.interrupted
    assert done.plan and done.check is None
    assert "interrupted" in done.conclusion


def test_the_check_decodes_both_arms() -> None:
    decoder = tiny.decoder("llama")
    prompts = tuple(tuple(tiny.prompt(9, seed)) for seed in range(2))
    task = Task(decoder, prompts, CHEAP_DRAFTS, 30, frozenset(), lambda trial, best: None)
    check = module.check_by_decoding(task, SkipPlan.of_layers([2]), Setting(3, 0.0), ())
    assert check is not None
    assert check.prompts == 2 and not check.held_out
    assert check.speedup > 0
    assert check.acceptance_rate is not None and 0 < check.acceptance_rate < 1
    assert check.tokens_per_step is not None and 1 < check.tokens_per_step <= 4


def test_prompts_are_split_without_loss_and_by_seed() -> None:
    prompts = [(i,) for i in range(20)]
    used, held = split_prompts(prompts, 0)
    assert sorted(used + held) == prompts
    assert len(held) == 5
    assert split_prompts(prompts, 0) == (used, held)
    assert split_prompts(prompts, 1) != (used, held)
    assert split_prompts(prompts[:3], 0)[1] == ()
    assert len(split_prompts([(i,) for i in range(80)], 0)[1]) == 6
