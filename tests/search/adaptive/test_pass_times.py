"""Costs learnt from passes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conflayers_cli.search.adaptive.pass_times import PassTimes, cost_table


def test_nothing_seen_counts_in_single_tokens() -> None:
    costs = PassTimes().costs([1, 5, 26])
    assert costs[1] == 1.0
    assert 1 < costs[5] < costs[26]


def test_what_was_seen_once_does_not_count_yet() -> None:
    times = PassTimes()
    times.add(1, 0.5)
    assert not times.known
    times.add(1, 0.5)
    assert times.known == {1: 0.5}
    assert times.costs([1])[1] == 0.5


def test_unseen_widths_follow_the_nearest_ones_seen() -> None:
    times, prior = PassTimes({1: 0.01, 9: 0.05}), PassTimes().costs([1, 9, 26])
    costs = times.costs([1, 9, 26])
    assert (costs[1], costs[9]) == pytest.approx((0.01, 0.05), rel=0.01)
    assert costs[26] == pytest.approx(0.05 * prior[26] / prior[9], rel=0.01)


def test_what_disturbs_one_width_is_no_step() -> None:
    usual = PassTimes().costs(range(1, 12))
    times = PassTimes({width: usual[width] for width in range(1, 12)})
    for _ in range(2):
        times.add(6, 4 * usual[6])
    costs = times.costs(range(1, 12))
    assert costs[6] < 2 * usual[6]
    assert costs[11] < 1.2 * usual[11] or costs[11] == costs[6]


def test_disturbed_passes_do_not_count() -> None:
    times = PassTimes()
    for seconds in (1.0, 1.0, 9.0, 1.0, 8.0, 1.1):
        times.add(1, seconds)
    assert times.known[1] <= 1.05


def test_old_passes_are_forgotten() -> None:
    times = PassTimes({1: 1.0})
    for _ in range(400):
        times.add(1, 2.0)
    assert times.known == {1: 2.0}


@given(
    seen=st.dictionaries(st.integers(1, 40), st.floats(1e-6, 10), max_size=6),
    widths=st.sets(st.integers(1, 200), min_size=1),
)
def test_wider_is_never_cheaper(seen: dict[int, float], widths: set[int]) -> None:
    costs = PassTimes(seen).costs(widths)
    assert list(costs) == sorted(widths)
    assert all(a <= b for a, b in pairwise(costs.values()))


def test_a_table_of_several_sequences() -> None:
    """A pass over three sequences of two tokens reads weights for six."""
    verify = PassTimes({1: 1.0, 6: 1.6})
    table = cost_table(verify, {1: 0.25, 3: 0.5}, 4, (1, 3))
    assert table.at(3, 100).verify_cost(2) == pytest.approx(1.6, rel=0.05)
