"""Costs learnt from passes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conflayers_cli.search.adaptive.pass_times import PassTimes, cost_table, fast


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
    times, prior = PassTimes({1: 0.01, 5: 0.05}), PassTimes().costs([1, 5, 9])
    costs = times.costs([1, 5, 9])
    assert (costs[1], costs[5]) == pytest.approx((0.01, 0.05))
    assert costs[9] == pytest.approx(0.05 * prior[9] / prior[5])


def test_disturbed_passes_do_not_count() -> None:
    times = PassTimes()
    for seconds in (1.0, 1.0, 9.0, 1.0, 8.0, 1.1):
        times.add(1, seconds)
    assert times.known[1] <= 1.05
    assert fast([3.0]) == 3.0


def test_old_passes_are_forgotten() -> None:
    times = PassTimes({1: 1.0})
    for _ in range(40):
        times.add(1, 2.0)
    assert times.known[1] == 2.0


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
    verify = PassTimes({1: 1.0, 6: 1.5})
    table = cost_table(verify, {1: 0.25, 3: 0.5}, 4, (1, 3))
    assert table.at(3, 100).verify_cost(2) == pytest.approx(1.5)
