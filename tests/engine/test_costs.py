"""What passes cost: reading the figures, and measuring some."""

from __future__ import annotations

import math

import pytest
import torch

from conflayers_cli.engine import costs as costs_module
from conflayers_cli.engine.costs import WIDTHS, Costs, measure_costs
from conflayers_cli.engine.plan import SkipPlan
from tests import tiny

COSTS = Costs({1: 2.0, 4: 5.0, 8: 7.0}, floor=0.5, attention=0.25, mlp=0.125, context=64)


@pytest.mark.parametrize(
    ("width", "seconds"),
    [(1, 2.0), (2, 3.0), (3, 4.0), (4, 5.0), (6, 6.0), (8, 7.0), (16, 14.0)],
)
def test_verify_cost_is_linear_between_widths(width: int, seconds: float) -> None:
    assert COSTS.verify_cost(width) == pytest.approx(seconds)


def test_verify_cost_does_not_depend_on_the_order_of_the_widths() -> None:
    backwards = Costs({8: 7.0, 4: 5.0, 1: 2.0}, 0.5, 0.25, 0.125, 64)
    assert [backwards.verify_cost(w) for w in range(1, 20)] == [
        COSTS.verify_cost(w) for w in range(1, 20)
    ]


def test_verify_cost_of_a_single_width() -> None:
    assert Costs({2: 3.0}, 0, 0, 0, 1).verify_cost(1) == 3.0
    assert Costs({2: 3.0}, 0, 0, 0, 1).verify_cost(4) == 6.0


@pytest.mark.parametrize(
    ("plan", "seconds"),
    [
        (SkipPlan(), 0.5 + 8 * 0.375),
        (SkipPlan.of_layers([1, 2]), 0.5 + 6 * 0.375),
        (SkipPlan(attention=(3,)), 0.5 + 8 * 0.375 - 0.25),
        (SkipPlan.of([1, 2], [2, 3, 4]), 0.5 + 6 * 0.25 + 5 * 0.125),
    ],
)
def test_draft_cost_is_what_is_left(plan: SkipPlan, seconds: float) -> None:
    assert COSTS.draft_cost(plan, depth=8) == pytest.approx(seconds)


def test_costs_at_another_context() -> None:
    costs = Costs({1: 2.0, 4: 5.0}, 0.5, 0.25, 0.125, 64, attention_per_position=0.001)
    longer = costs.at(164, depth=8)
    assert longer.attention == pytest.approx(0.35)
    assert longer.verify_cost(1) == pytest.approx(2.8)
    assert longer.context == 164
    assert longer.at(64, depth=8).attention == pytest.approx(0.25)
    assert costs.at(0, depth=8).attention == pytest.approx(0.186)


def test_a_model_with_little_room_is_measured_in_it() -> None:
    costs = measure_costs(tiny.decoder("gpt2"), rounds=1)  # learned positions, 256 of them
    assert costs.context == 256 - max(WIDTHS)
    assert costs.attention_per_position == 0.0
    assert measure_costs(tiny.decoder("llama"), context=20, rounds=1).context == 20


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_measured_costs_are_whole(family: str) -> None:
    costs = measure_costs(tiny.decoder(family), context=40, rounds=2)
    assert tuple(sorted(costs.verify)) == WIDTHS
    ordered = [costs.verify[width] for width in WIDTHS]
    assert ordered == sorted(ordered)
    assert ordered[0] > 0 and math.isfinite(ordered[-1])
    assert min(costs.floor, costs.attention, costs.mlp) >= 0
    assert costs.context == 40
    if family == "opt":  # its sub-layers can't be told apart
        assert costs.attention == costs.mlp


def test_costs_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that runs by what a pass contains, the figures come out as put in."""
    decoder = tiny.decoder("llama")
    floor, attention, mlp, row = 0.5, 0.25, 0.125, 0.01

    def pass_time(
        decoder: object, cache: object, plan: SkipPlan, context: int, width: int
    ) -> float:
        layers = (tiny.DEPTH - len(plan.attention)) * attention
        return floor + layers + (tiny.DEPTH - len(plan.mlp)) * mlp + row * (width - 1)

    monkeypatch.setattr(costs_module, "_time", pass_time)
    costs = measure_costs(decoder, context=8, rounds=1)
    got = (costs.floor, costs.attention, costs.mlp)
    assert got == pytest.approx((floor, attention, mlp))
    full = floor + tiny.DEPTH * (attention + mlp)
    assert costs.verify == pytest.approx({w: full + row * (w - 1) for w in WIDTHS})
    assert costs.draft_cost(SkipPlan(), tiny.DEPTH) == pytest.approx(costs.verify_cost(1))


def test_measuring_leaves_the_model_as_it_was() -> None:
    decoder = tiny.decoder("llama")
    tokens, positions = torch.tensor([tiny.prompt(6)]), torch.arange(6)[None]
    before = decoder.forward(tokens, positions, decoder.new_cache(6))
    measure_costs(decoder, context=8, rounds=1)
    assert torch.equal(decoder.forward(tokens, positions, decoder.new_cache(6)), before)
