"""Skip plans: what is one, what is refused, what it says about layers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conflayers_cli.skip_plan import SkipPlan

INDICES = st.sets(st.integers(0, 40))


@pytest.mark.parametrize(
    "indices", [(-1,), (2, 1), (1, 1), (1.0,), (True,), ("1",), (None,)], ids=repr
)
@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_bad_indices_are_refused(kind: str, indices: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=kind):
        SkipPlan(**{kind: indices})  # type: ignore[arg-type]


def test_equal_plans_are_one_key() -> None:
    assert {SkipPlan.of([3, 1, 3], [2]): 1}[SkipPlan((1, 3), (2,))] == 1
    assert SkipPlan((1,), ()) != SkipPlan((), (1,))


def test_the_empty_plan_is_false() -> None:
    assert not SkipPlan()
    assert SkipPlan((1,))
    assert SkipPlan(mlp=(1,))


@given(INDICES, INDICES)
def test_layers_and_partial_share_out_what_is_named(attention: set[int], mlp: set[int]) -> None:
    plan = SkipPlan.of(attention, mlp)
    assert set(plan.layers) == attention & mlp
    assert set(plan.layers) | set(plan.partial) == attention | mlp
    assert not set(plan.layers) & set(plan.partial)
    assert len(plan) == len(attention) + len(mlp)
    assert len(plan) == 2 * len(plan.layers) + len(plan.partial)


@given(INDICES)
def test_whole_layers(layers: set[int]) -> None:
    plan = SkipPlan.of_layers(layers)
    assert plan.layers == tuple(sorted(layers))
    assert plan.partial == ()


@pytest.mark.parametrize(
    ("depth", "layers"), [(1, ()), (2, ()), (3, (1,)), (6, (1, 3)), (7, (1, 3, 5)), (8, (1, 3, 5))]
)
def test_balanced_is_every_second_layer_and_never_the_last(
    depth: int, layers: tuple[int, ...]
) -> None:
    plan = SkipPlan.balanced(depth)
    assert plan.layers == layers
    plan.check(depth)


@given(INDICES, INDICES, st.integers(1, 45))
def test_check_spares_the_first_and_the_last_layer(
    attention: set[int], mlp: set[int], depth: int
) -> None:
    plan = SkipPlan.of(attention, mlp)
    if (attention | mlp) <= set(range(1, depth - 1)):
        plan.check(depth)
    else:
        with pytest.raises(ValueError, match="first and the last"):
            plan.check(depth)


@pytest.mark.parametrize(
    ("depth", "speedup", "kept"),
    [
        (32, 1.0, list(range(32))),
        (8, 2.0, [0, 2, 5, 7]),
        (9, 3.0, [0, 4, 8]),
        (12, 100.0, [0, 11]),
        (2, 1.5, [0, 1]),
    ],
)
def test_unified_keeps_evenly_spaced_layers_with_both_ends(
    depth: int, speedup: float, kept: list[int]
) -> None:
    plan = SkipPlan.unified(depth, speedup)
    assert [i for i in range(depth) if i not in plan.layers] == kept
    assert not plan.partial


@given(st.integers(2, 200), st.floats(1, 50))
def test_unified_keeps_as_many_as_it_says(depth: int, speedup: float) -> None:
    plan = SkipPlan.unified(depth, speedup)
    plan.check(depth)
    assert depth - len(plan.layers) == max(2, round(depth / speedup))


@pytest.mark.parametrize("speedup", [0.99, 0.0, -2.0, float("nan"), float("inf")])
def test_unified_refuses_what_is_no_speedup(speedup: float) -> None:
    with pytest.raises(ValueError, match="from 1 on"):
        SkipPlan.unified(10, speedup)
