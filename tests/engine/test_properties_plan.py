"""Skip plans against plain sets: what is one, which are equal, what they say of layers."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conflayers_cli.profile.sections import SkipSection
from conflayers_cli.skip_plan import SkipPlan

FEW = st.lists(st.integers(0, 3), max_size=5)  # so few that many are equal
ANYTHING = st.lists(
    st.integers(-1, 4) | st.booleans() | st.floats(0, 3) | st.none() | st.text(max_size=1),
    max_size=4,
)


def is_valid(indices: list[Any]) -> bool:
    """Whole numbers from 0 that rise; true and 1.0 are none."""
    return all(type(i) is int and i >= 0 for i in indices) and all(
        one < other for one, other in itertools.pairwise(indices)
    )


@settings(max_examples=400)
@given(attention=ANYTHING | FEW | FEW.map(sorted), mlp=ANYTHING | FEW.map(sorted))
def test_a_plan_is_made_of_rising_whole_numbers_and_of_nothing_else(
    attention: list[Any], mlp: list[Any]
) -> None:
    if is_valid(attention) and is_valid(mlp):
        plan = SkipPlan(tuple(attention), tuple(mlp))
        assert (list(plan.attention), list(plan.mlp)) == (attention, mlp)
        return
    with pytest.raises(ValueError, match="mlp" if is_valid(attention) else "attention"):
        SkipPlan(tuple(attention), tuple(mlp))


@pytest.mark.parametrize("indices", [[1, 2], {1, 2}, range(1, 3), 1, "12", None], ids=repr)
def test_only_tuples_can_be_hashed_and_stay_as_they_are(indices: Any) -> None:
    for kind in ("attention", "mlp"):
        with pytest.raises(ValueError, match=f"{kind}: a tuple"):
            SkipPlan(**{kind: indices})


@given(FEW, FEW, FEW, FEW)
def test_plans_are_equal_as_their_sets_are(
    a: list[int], b: list[int], c: list[int], d: list[int]
) -> None:
    """In whatever order, and how often, the layers were named; equal ones are one key."""
    one, other = SkipPlan.of(a, b), SkipPlan.of(iter(c), reversed(d))
    same = (set(a), set(b)) == (set(c), set(d))
    assert (one == other) is same
    assert len({one, other}) == (1 if same else 2)
    assert ({one: "found"}.get(other) == "found") is same
    if same:
        assert hash(one) == hash(other)
    assert (one != SkipPlan.of(b, a)) is (set(a) != set(b))  # the kinds are told apart


@given(FEW, FEW)
def test_what_a_plan_says_follows_from_its_sets(attention: list[int], mlp: list[int]) -> None:
    plan = SkipPlan.of(attention, mlp)
    both, either = set(attention) & set(mlp), set(attention) | set(mlp)
    assert plan.layers == tuple(sorted(both))
    assert plan.partial == tuple(sorted(either - both))
    assert len(plan) == len(set(attention)) + len(set(mlp))
    assert bool(plan) is bool(either)
    assert SkipPlan.of(plan.attention, plan.mlp) == plan
    assert (SkipPlan.of_layers(plan.layers) == plan) is (not plan.partial)
    assert (plan == SkipPlan()) is (not either)


@given(st.sets(st.integers(1, 9)), st.sets(st.integers(1, 9)))
def test_a_profile_gives_it_back(attention: set[int], mlp: set[int]) -> None:
    plan = SkipPlan.of(attention, mlp)
    assert SkipSection.of(plan).plan == plan


@given(st.integers(2, 120), st.floats(1, 130))
def test_unified_keeps_both_ends_and_nowhere_more_than_elsewhere(
    depth: int, speedup: float
) -> None:
    plan = SkipPlan.unified(depth, speedup)
    kept = [i for i in range(depth) if i not in plan.layers]
    gaps = [other - one for one, other in itertools.pairwise(kept)]
    assert (kept[0], kept[-1]) == (0, depth - 1)
    assert max(gaps) - min(gaps) <= 1
    assert plan.attention == plan.mlp == plan.layers


@pytest.mark.parametrize("depth", range(1, 7))
@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_every_layer_but_the_first_and_the_last_may_be_left_out(depth: int, kind: str) -> None:
    """To the layer: one before the last may be named, the last may not."""
    allowed = set()
    for layer in range(depth + 2):
        with contextlib.suppress(ValueError):
            attention, mlp = ([layer] if kind == name else [] for name in ("attention", "mlp"))
            SkipPlan.of(attention, mlp).check(depth)
            allowed.add(layer)
    assert allowed == set(range(depth)[1:-1])
    SkipPlan().check(depth)
