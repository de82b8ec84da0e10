"""What a search leaves behind: a row for each set, of every strategy alike."""

from __future__ import annotations

import math

import torch

from conflayers_cli.search.problem import SearchResult, Trial
from conflayers_cli.search.tensors import collect_tensors, trial_tensors
from conflayers_cli.skip_plan import SkipPlan

TRIALS = (
    Trial(0, SkipPlan.of_layers([1, 3]), 10, 40, 30, 1.25, "best so far", {"lambda": 0.0}),
    Trial(1, SkipPlan.of([2], []), 0, 0, 0, None, "too few layers", {"agreement": 0.5}),
)


def test_a_row_for_each_set() -> None:
    found = trial_tensors(TRIALS, 5)
    assert found["trial_attention"].tolist() == [[0, 1, 0, 1, 0], [0, 0, 1, 0, 0]]
    assert found["trial_mlp"].tolist() == [[0, 1, 0, 1, 0], [0, 0, 0, 0, 0]]
    assert found["trial_mlp"].dtype == torch.uint8
    assert found["trial_steps"].tolist() == [10, 0]
    assert found["trial_drafted"].tolist() == [40, 0]
    assert found["trial_accepted"].tolist() == [30, 0]
    assert found["trial_speedup"][0] == 1.25 and math.isnan(found["trial_speedup"][1])
    assert found["trial_lambda"][0] == 0.0 and math.isnan(found["trial_lambda"][1])
    assert math.isnan(found["trial_agreement"][0]) and found["trial_agreement"][1] == 0.5


def test_the_strategys_own_tensors_stay_and_a_search_without_sets_has_none() -> None:
    own = {"z": torch.ones(2, 3)}
    result = SearchResult(SkipPlan(), TRIALS, own, False, "")
    assert collect_tensors(result, 5).keys() == {"z", *trial_tensors(TRIALS, 5)}
    assert collect_tensors(SearchResult(SkipPlan(), (), own, False, ""), 5) == own
    assert trial_tensors((), 5) == {}
