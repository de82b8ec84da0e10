"""Simulated decoding in expectation is the mean of all that may happen."""

import itertools
import random

import numpy as np
import pytest

from conflayers_cli.engine.cost_model import PassCosts
from conflayers_cli.search.expected_replay import (
    ExpectedText,
    agreement_chances,
    expected_replays,
)
from conflayers_cli.search.forced_text import Trace
from conflayers_cli.search.objective import DraftParams, replay

COSTS = PassCosts({1: 10.0, 2: 11.0, 4: 15.0}, floor=1.0, attention=0.5, mlp=0.5, context=256)


def test_any_error_may_meet_any_margin() -> None:
    # errors are -2, 0, 0.5 and -4
    margins = [np.array([1.0, 3.0]), np.array([0.0, 5.0])]
    drafted = [np.array([-1.0, 3.0]), np.array([0.5, 1.0])]
    first, second = agreement_chances(margins, drafted)
    assert first.tolist() == [0.5, 0.75]
    assert second.tolist() == [0.5, 1.0]
    assert agreement_chances([], []) == []


def test_where_an_error_fell_changes_nothing() -> None:
    draw = np.random.default_rng(0)
    margins, errors = draw.exponential(2.0, 60), draw.normal(0.0, 1.0, 60)
    found = [agreement_chances([margins], [margins + draw.permutation(errors)]) for _ in range(3)]
    assert all(np.allclose(each[0], found[0][0]) for each in found)
    counted = {int((margins + draw.permutation(errors) >= 0).sum()) for _ in range(9)}
    assert len(counted) > 1  # counts do change


def test_logits_that_are_not_finite_agree_with_nothing() -> None:
    (chances,) = agreement_chances([np.array([1.0, -np.inf])], [np.array([-np.inf, -np.inf])])
    assert chances.tolist() == [0.0, 0.0]
    (chances,) = agreement_chances([np.array([1.0, 2.0])], [np.array([-np.inf, 2.0])])
    assert chances.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("stop", [0.0, 0.5])
def test_is_the_mean_over_all_outcomes(stop: float) -> None:
    draw = random.Random(3)
    texts = [[draw.random() for _ in range(n)] for n in (5, 3)]
    sure = [np.array([draw.random() for _ in each]) for each in texts]
    settings = [DraftParams(n, stop) for n in (1, 3, 4)]
    lengths = np.zeros((len(settings), 2, 5), np.int64)
    wanted = np.zeros((len(settings), 5))
    for i, (chances, probability) in enumerate(zip(texts, sure, strict=True)):
        for outcome in itertools.product((True, False), repeat=len(chances)):
            kept = np.array(outcome)
            chance = np.where(kept, chances, 1 - np.array(chances)).prod()
            trace = Trace(kept, probability, np.zeros(len(chances)))
            for s, setting in enumerate(settings):
                played = replay([trace], setting, 2.0, COSTS)
                counts = (played.steps, played.drafted, played.accepted, played.tokens)
                wanted[s] += chance * np.array([*counts, played.seconds])
                drafted = np.minimum(trace.draft_lengths(stop), setting.max_tokens)
                lengths[s, i, : len(chances)] = drafted
    expected = ExpectedText([np.array(each) for each in texts], 4)
    found = expected_replays(expected, lengths, 2.0, COSTS)
    parts = (found.steps, found.drafted, found.accepted, found.tokens, found.seconds)
    assert np.stack(parts, 1) == pytest.approx(wanted)
