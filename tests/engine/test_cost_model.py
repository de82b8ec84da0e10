"""What passes cost: reading the figures, and measuring some."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf

from conflayers_cli.engine import cost_measurement
from conflayers_cli.engine.cost_measurement import (
    MIN_ROUNDS,
    WIDTHS,
    costs_hold,
    measure_costs,
    widths_for,
)
from conflayers_cli.engine.cost_model import CostTable, PassCosts
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.kernels.kv_cache import KV_BLOCK, KVCache
from conflayers_cli.skip_plan import SkipPlan
from tests import tiny

COSTS = PassCosts({1: 2.0, 4: 5.0, 8: 7.0}, floor=0.5, attention=0.25, mlp=0.125, context=64)


@pytest.mark.parametrize(
    ("width", "seconds"),
    [(1, 2.0), (2, 3.0), (3, 4.0), (4, 5.0), (6, 6.0), (8, 7.0), (16, 14.0)],
)
def test_verify_cost_is_linear_between_widths(width: int, seconds: float) -> None:
    assert COSTS.verify_cost(width) == pytest.approx(seconds)


def test_verify_cost_does_not_depend_on_the_order_of_the_widths() -> None:
    backwards = PassCosts({8: 7.0, 4: 5.0, 1: 2.0}, 0.5, 0.25, 0.125, 64)
    assert [backwards.verify_cost(w) for w in range(1, 20)] == [
        COSTS.verify_cost(w) for w in range(1, 20)
    ]


def test_verify_cost_of_a_single_width() -> None:
    assert PassCosts({2: 3.0}, 0, 0, 0, 1).verify_cost(1) == 3.0
    assert PassCosts({2: 3.0}, 0, 0, 0, 1).verify_cost(4) == 6.0


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
    costs = PassCosts({1: 2.0, 4: 5.0}, 0.5, 0.25, 0.125, 64, attention_per_position=0.001)
    longer = costs.at(164, depth=8)
    assert longer.attention == pytest.approx(0.35)
    assert longer.verify_cost(1) == pytest.approx(2.8)
    assert longer.context == 164
    assert longer.at(64, depth=8).attention == pytest.approx(0.25)
    assert costs.at(0, depth=8).attention == pytest.approx(0.186)


def test_wider_passes_grow_more_with_the_context() -> None:
    costs = PassCosts(
        {1: 2.0, 4: 5.0}, 0.5, 0.25, 0.125, 64, 0.001, attention_per_position_and_token=0.0001
    )
    longer = costs.at(164, depth=8)
    assert longer.verify_cost(1) == pytest.approx(2.8)
    assert longer.verify_cost(4) == pytest.approx(5.8 + 3 * 0.08)
    assert longer.attention == pytest.approx(0.35)
    shorter = costs.at(0, depth=8)
    assert shorter.verify_cost(4) == pytest.approx(5.0 - 0.512 - 3 * 0.0512)


def test_wider_is_not_cheaper_at_a_shorter_context() -> None:
    costs = PassCosts(
        {1: 2.0, 9: 2.1}, 0.5, 0.25, 0.125, 100, attention_per_position_and_token=0.001
    )
    assert costs.at(0, depth=8).verify == {1: 2.0, 9: 2.0}


def test_a_table_is_linear_between_numbers_of_rows() -> None:
    one = PassCosts({1: 2.0, 4: 5.0}, 0.5, 0.25, 0.125, 64, 0.001, 0.0001)
    four = PassCosts({1: 4.0, 2: 6.0}, 1.0, 0.5, 0.25, 64, 0.004, 0.0004)
    table = CostTable({4: four, 1: one}, depth=8)
    assert table.at(1, 64) == one
    assert table.at(4, 64) == table.at(9, 64) == four
    between = table.at(2, 64)
    assert between.verify == pytest.approx({1: 8 / 3, 2: 4.0, 4: (2 * 5.0 + 12.0) / 3})
    assert between.floor == pytest.approx(2 / 3)
    assert between.attention_per_position_and_token == pytest.approx(0.0002)
    assert table.at(1, 164) == one.at(164, 8)


@pytest.mark.parametrize(
    ("rows", "widths"),
    [
        (1, WIDTHS),
        (2, (1, 2, 3, 5, 9, 17, 26)),
        (4, (1, 2, 3, 5, 9)),
        (16, (1, 2, 3, 5)),
        (64, (1, 2, 5)),
    ],
)
def test_widths_for_rows(rows: int, widths: tuple[int, ...]) -> None:
    assert widths_for(rows) == widths


def test_a_model_with_little_room_is_measured_in_it() -> None:
    costs = measure_costs(tiny.decoder("gpt2"), rounds=1)  # learned positions, 256 of them
    assert costs.context == 256 - max(WIDTHS)
    assert costs.attention_per_position == 0.0
    assert measure_costs(tiny.decoder("llama"), context=20, rounds=1).context == 20


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_measured_costs_are_whole(family: str, batch: int) -> None:
    costs = measure_costs(tiny.decoder(family), context=40, rounds=2, batch=batch)
    assert tuple(costs.verify) == widths_for(batch)
    ordered = list(costs.verify.values())
    assert ordered == sorted(ordered)
    assert ordered[0] > 0 and math.isfinite(ordered[-1])
    assert min(costs.floor, costs.attention, costs.mlp) >= 0
    assert costs.context == 40
    if family == "opt":  # its sub-layers can't be told apart
        assert costs.attention == costs.mlp


class Clockwork:
    """Seconds by what a pass contains, and by how often it was run."""

    FLOOR, ATTENTION, MLP, ROW = 0.5, 0.25, 0.125, 0.01
    POSITION, BOTH = 2e-4, 1e-5

    def __init__(self, monkeypatch: pytest.MonkeyPatch, depth: int = tiny.DEPTH) -> None:
        self.depth = depth
        self.runs: list[tuple[int, int, int]] = []
        self.late: dict[int, float] = {}
        monkeypatch.setattr(cost_measurement, "_time", self.time)

    def time(
        self, decoder: Decoder, cache: KVCache, plan: SkipPlan, context: int, width: int
    ) -> float:
        self.runs.append((cache.batch, context, width))
        layers = (self.depth - len(plan.attention)) * (
            self.ATTENTION + (context - 8) * (self.POSITION + (width - 1) * self.BOTH)
        )
        layers += (self.depth - len(plan.mlp)) * self.MLP
        disturbance = self.late.get(width, 0.0) if not plan and context == 8 else 0.0
        return self.FLOOR + layers + self.ROW * (width - 1) + disturbance


def test_costs_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that runs by what a pass contains, the figures come out as put in."""
    clockwork = Clockwork(monkeypatch)
    decoder = Decoder(
        tiny.build(hf.LlamaConfig(**tiny.LLAMA_LIKE | {"max_position_embeddings": 2048}))
    )
    costs = measure_costs(decoder, context=8, rounds=1)
    got = (costs.floor, costs.attention, costs.mlp)
    expected = (clockwork.FLOOR, clockwork.ATTENTION, clockwork.MLP)
    assert got == pytest.approx(expected)
    assert costs.attention_per_position == pytest.approx(clockwork.POSITION)
    assert costs.attention_per_position_and_token == pytest.approx(clockwork.BOTH)
    full = 0.5 + tiny.DEPTH * 0.375
    assert costs.verify == pytest.approx({w: full + clockwork.ROW * (w - 1) for w in WIDTHS})
    assert costs.draft_cost(SkipPlan(), tiny.DEPTH) == pytest.approx(costs.verify_cost(1))
    # at the same place of its extent, whole extents further on
    assert {at for _, at, _ in clockwork.runs} == {8, 8 + KV_BLOCK}


def test_growth_is_left_out_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    clockwork = Clockwork(monkeypatch)
    costs = measure_costs(tiny.decoder("llama"), context=8, rounds=1, growth=False, batch=4)
    assert costs.attention_per_position == costs.attention_per_position_and_token == 0
    assert {(rows, at) for rows, at, _ in clockwork.runs} == {(4, 8)}


def test_a_disturbed_pass_is_no_dearer_than_a_wider_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clockwork = Clockwork(monkeypatch)
    clockwork.late = {1: 7.0, 5: 9.0}
    costs = measure_costs(tiny.decoder("llama"), context=8, rounds=1)
    full = 0.5 + tiny.DEPTH * 0.375
    assert costs.verify_cost(1) == costs.verify_cost(2) == pytest.approx(full + 0.01)
    assert costs.verify_cost(5) == pytest.approx(full + 0.08)
    assert costs.verify_cost(17) == pytest.approx(full + 0.16)


def test_neither_sub_layer_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clockwork, "MLP", 0.0)
    Clockwork(monkeypatch)
    costs = measure_costs(tiny.decoder("llama"), context=8, rounds=1)
    assert (costs.attention, costs.mlp) == pytest.approx((0.225, 0.025))


def test_measuring_ends_when_nothing_changes_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    clockwork = Clockwork(monkeypatch)
    measure_costs(tiny.decoder("llama"), context=8, rounds=50)
    rounds = clockwork.runs.count((1, 8, 26))
    assert rounds == MIN_ROUNDS + 1  # one warms up


@pytest.mark.parametrize(
    ("spread", "seconds", "rounds"),
    [
        (0.5, 100, 13),  # never known well: as many as were allowed, and one that warms up
        (0.08, 6, 9),  # nearly known, and late
        (0.5, 2, 9),  # too late
        (0.5, 0, 3),
    ],
)
def test_measuring_ends_late_at_the_latest(
    monkeypatch: pytest.MonkeyPatch, spread: float, seconds: float, rounds: int
) -> None:
    clockwork = Clockwork(monkeypatch)
    monkeypatch.setattr(clockwork, "late", _Unsteady(spread))
    seen = itertools.count()  # the time is looked at before the first and behind every counted one
    monkeypatch.setattr("time.perf_counter", lambda: float(next(seen)))
    measure_costs(tiny.decoder("llama"), context=8, rounds=12, seconds=seconds)
    assert clockwork.runs.count((1, 8, 26)) == rounds


class _Unsteady(dict[int, float]):
    """A disturbance that is another one every time, within a spread."""

    def __init__(self, spread: float) -> None:
        super().__init__()
        self._spread, self._calls = spread, 0

    def get(self, key: int, default: object = None) -> float:
        self._calls += 1
        return 100 * (1 + self._spread * (self._calls * 0.618034 % 1))


def test_a_machine_that_slows_down_changes_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    """From round to round everything takes longer: what counts is what a round's passes are to
    one another."""
    clockwork, steady, full_passes = Clockwork(monkeypatch), Clockwork.time, [0]

    def slower(*args: Any) -> float:
        _, _, plan, context, _ = args
        full_passes[0] += not plan and context == 8
        return steady(clockwork, *args) * (1 + full_passes[0] // len(WIDTHS))

    monkeypatch.setattr(cost_measurement, "_time", slower)
    costs = measure_costs(tiny.decoder("llama"), context=8, rounds=9)
    expected = 1 + clockwork.ROW * 25 / (0.5 + tiny.DEPTH * 0.375)
    assert costs.verify_cost(26) / costs.verify_cost(1) == pytest.approx(expected, rel=0.3)


def test_logits_of_many_tokens_are_not_all_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny.decoder("llama")
    seen: dict[int, set[bool]] = {}
    forward = decoder.forward

    def spy(tokens: torch.Tensor, *args: Any, last_only: bool = False, **more: Any) -> torch.Tensor:
        if args[0][0, 0] == 8:  # the passes that are measured, not the one that fills the cache
            seen.setdefault(tokens.numel(), set()).add(last_only)
        return forward(tokens, *args, last_only=last_only, **more)

    tiny.through_logits(decoder, monkeypatch)
    monkeypatch.setattr(decoder, "forward", spy)
    measure_costs(decoder, context=8, rounds=1, batch=32)
    assert seen == {32: {False}, 64: {False}, 160: {True}}


def test_measuring_leaves_the_model_as_it_was() -> None:
    decoder = tiny.decoder("llama")
    tokens, positions = torch.tensor([tiny.prompt(6)]), torch.arange(6)[None]
    before = decoder.forward(tokens, positions, decoder.new_cache(6))
    measure_costs(decoder, context=8, rounds=1)
    assert torch.equal(decoder.forward(tokens, positions, decoder.new_cache(6)), before)


@pytest.mark.parametrize(
    ("factor", "hold"), [(1.0, True), (1.05, True), (1.3, False), (0.7, False)]
)
def test_known_costs_hold_unless_drafts_cost_another_share(
    factor: float, hold: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clockwork(monkeypatch)
    decoder = tiny.decoder("llama")
    known = measure_costs(decoder, context=8, rounds=2)
    other = replace(known, verify={w: factor * s for w, s in known.verify.items()})
    assert costs_hold(decoder, other) is hold


def test_a_pass_at_a_shorter_context_costs_no_less_than_one_without_layers() -> None:
    costs = PassCosts({1: 1.0, 2: 1.5}, 0.1, 0.3, 0.3, 10**6, attention_per_position=1.0)
    assert costs.at(10, 20).verify_cost(1) == 0.1
    assert costs.at(10**6, 20) == costs
