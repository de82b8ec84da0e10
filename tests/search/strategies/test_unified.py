"""Unified Layer Skipping as a strategy."""

import pytest

from conflayers_cli.errors import InputError
from conflayers_cli.search.calibrate import calibrate
from conflayers_cli.search.objective import PAPER
from conflayers_cli.search.problem import SearchProblem
from conflayers_cli.search.strategies.unified import Unified
from conflayers_cli.skip_plan import SkipPlan
from tests.search import planted


def test_keeps_depth_over_s_layers_evenly_spaced() -> None:
    result = Unified(2.0).search(planted.problem())
    assert result.plan == SkipPlan.unified(planted.DEPTH, 2.0)
    assert len(result.plan.layers) == planted.DEPTH // 2
    assert result.setting is not None  # chosen by the texts


def test_needs_no_prompts() -> None:
    problem = SearchProblem(planted.decoder(), (), planted.COSTS, 0, frozenset())
    before = planted.decoder().full_passes, planted.decoder().draft_passes
    done = calibrate(
        Unified(1.5),
        problem,
        (),
        refine=0,
        on_stage=lambda name: None,
        on_better=lambda score, judged: None,
    )
    assert done.plan == SkipPlan.unified(planted.DEPTH, 1.5)
    assert done.setting == PAPER
    assert done.check is None
    assert "not measured" in done.conclusion
    assert (planted.decoder().full_passes, planted.decoder().draft_passes) == before


@pytest.mark.parametrize("target", [0.5, float("nan"), float("inf"), -1.0])
def test_a_target_that_is_no_speedup_is_refused(target: float) -> None:
    with pytest.raises(InputError, match="target_speedup"):
        Unified(target).search(planted.problem())
