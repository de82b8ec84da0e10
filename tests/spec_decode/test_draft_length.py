"""What the policy makes of drafts whose worth is known: the best there is, and no loss without.

Time is simulated, so the margins below hold on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch

from conflayers_cli.engine.cost_model import CostTable, PassCosts
from conflayers_cli.spec_decode.acceptance import AcceptanceModel, TextBias
from conflayers_cli.spec_decode.mixed import MixedProposer
from conflayers_cli.spec_decode.ngram import Match
from tests.spec_decode.simulated import (
    PLAN,
    Model,
    Run,
    Text,
    costs,
    decode,
    decode_rows,
    fixed_rate,
    independent,
    random_text,
)

Draw = Callable[[torch.Generator], Iterable[tuple[bool, float]]]


def run(
    table: CostTable, text: Text, *, skip: bool = True, ngram: bool = False, **more: float
) -> Run:
    model = Model([text])
    plan = PLAN if skip else None
    proposer = MixedProposer(model, plan, table, ngram=ngram, **more)  # type: ignore[arg-type]
    return decode(table, text, proposer, model)


@pytest.mark.parametrize("chance", [0.5, 0.7, 0.85, 0.95])
@pytest.mark.parametrize(
    "table",
    [costs(0.3, 0.03), costs(0.55, 0.02), costs(0.4, 0.01, [(5, 0.3), (9, 0.3)])],
    ids=["cheap", "dear", "in leaps"],
)
def test_as_fast_as_the_best_fixed_length(chance: float, table: CostTable) -> None:
    """Where confidence says nothing, there is nothing better than one length for all steps."""
    text = random_text(3000, independent(chance), seed=int(100 * chance))
    best = max(fixed_rate(table, text, most) for most in range(0, 16))
    assert run(table, text).rate(300) >= 0.97 * best


@pytest.mark.parametrize("chance", [0.0, 0.3])
@pytest.mark.parametrize("prior", [0.9, None])
@pytest.mark.parametrize("sure", [0.505, 0.999])
def test_never_slower_than_vanilla(chance: float, prior: float, sure: float) -> None:
    """Drafts that don't pay, from a profile that promises the opposite."""
    table = costs(0.55, 0.03)
    text = random_text(3000, independent(chance, sure), seed=3)
    decoded = run(table, text, prior=prior)
    assert decoded.rate(0, 400) >= 0.985
    assert decoded.rate(400) >= 0.995


def test_drafts_dearer_than_what_they_gain() -> None:
    """Right nearly always, but a draft costs as much as the token it saves."""
    table = costs(1.0, 0.05)
    decoded = run(table, random_text(1500, independent(0.95)), prior=0.95)
    assert decoded.rate(0, 400) >= 0.985
    assert decoded.rate(400) >= 0.995


def persistent(generator: torch.Generator) -> Iterable[tuple[bool, float]]:
    """The draft knows how sure it may be, and stretches of one kind last a while."""
    levels, level = ((0.25, 0.505), (0.6, 0.52), (0.9, 0.75), (0.985, 0.95)), 3
    while True:
        if float(torch.rand((), generator=generator)) < 0.3:
            level = int(torch.randint(4, (), generator=generator))
        chance, sure = levels[level]
        yield float(torch.rand((), generator=generator)) < chance, sure


@pytest.mark.parametrize("draft", [0.3, 0.5])
def test_confidence_is_made_use_of(draft: float) -> None:
    table = costs(draft, 0.02)
    text = random_text(6000, persistent, seed=5)
    rate = run(table, text).rate(300)
    assert rate >= 1.05 * max(fixed_rate(table, text, most) for most in range(0, 16))
    assert rate >= 1.02 * fixed_rate(table, text, 25, 0.6)


@pytest.mark.parametrize("leap", [0.96, 1.5])
@pytest.mark.parametrize("draft", [0.1, 0.4])
def test_a_second_row_that_costs_a_leap_is_worth_it_for_long_drafts(
    draft: float, leap: float
) -> None:
    """As with kernels made for one row: a first draft kept short for caution would never pay."""
    table = costs(draft, 0.0, [(2, leap)])
    text = random_text(3000, independent(0.95), seed=3)
    best = max(fixed_rate(table, text, most) for most in range(0, 26))
    assert best > 1.01
    assert run(table, text, prior=0.95).rate(300) >= 0.97 * best
    text = random_text(3000, independent(0.2), seed=3)
    assert run(table, text, prior=0.95).rate(300) >= 0.995


def test_drafts_that_are_never_worth_verifying_are_saved_for() -> None:
    """Promised to be right, but unsure of every token, so that each is dropped again."""
    table = costs(0.4, 0.0, [(2, 0.5)])
    text = random_text(1500, independent(0.95, 0.505), seed=4)
    assert run(table, text, prior=0.95).rate(0) >= 0.98


def test_overconfident_drafts_are_seen_through() -> None:
    """Sure of everything, and right half of the time."""
    table = costs(0.4, 0.02)
    text = random_text(3000, independent(0.5, 0.999), seed=6)
    best = max(fixed_rate(table, text, most) for most in range(0, 8))
    assert run(table, text).rate(300) >= 0.97 * best
    assert fixed_rate(table, text, 8, 0.8) < 0.75 * best


def changing(generator: torch.Generator) -> Iterable[tuple[bool, float]]:
    for chance in (0.92, 0.1, 0.92, 0.1, 0.92):
        for _ in range(800):
            yield float(torch.rand((), generator=generator)) < chance, 0.9


def test_changes_are_followed_both_ways() -> None:
    table = costs(0.4, 0.02)
    text = random_text(4000, changing, seed=7)
    decoded = run(table, text)
    good = random_text(3000, independent(0.92), seed=7)
    best = max(fixed_rate(table, good, most) for most in range(0, 16))
    for begin in (1600, 3200):
        assert decoded.rate(begin + 250, begin + 780) >= 0.93 * best
    for begin in (800, 2400):
        assert decoded.rate(begin, begin + 780) >= 0.95


def bursts(length: int) -> Text:
    """Stretches of new text, and stretches copied from far before."""
    text = random_text(length, independent(0.0), seed=8)
    for begin in range(200, length - 100, 200):
        text.tokens[begin : begin + 60] = text.tokens[begin - 160 : begin - 100]
    return text


def test_ngrams_draft_what_was_there_before() -> None:
    table, text = costs(0.5, 0.03), bursts(3000)
    assert run(table, text, skip=False, ngram=True).rate() >= 1.25
    assert run(table, text, ngram=True).rate() >= 1.22  # the skipped model is of no use here


def test_ngrams_that_never_hit_cost_nothing() -> None:
    """Where verification grows at once with its width, and matches are mere chance."""
    table, text = costs(0.5, 0.3), random_text(2000, independent(0.0), seed=9)
    decoded = run(table, text, skip=False, ngram=True)
    assert decoded.rate(0, 400) >= 0.985
    assert decoded.rate(400) >= 0.995


def test_both_together_are_faster_than_either() -> None:
    table, text = costs(0.4, 0.02), bursts(4000)
    fresh = random_text(4000, independent(0.8), seed=10)
    text.right[:] = fresh.right
    alone = [run(table, text, skip=False, ngram=True).rate(), run(table, text).rate()]
    assert run(table, text, ngram=True).rate() >= 1.1 * max(alone)


def of_batches(linear: bool) -> CostTable:
    """Sixteen rows cost more than one; wider ones in proportion, or next to nothing."""
    single = costs(0.4, 0.02).by_batch[1]
    slope = 1.0 if linear else 0.02
    many = PassCosts({w: 4.0 * (1 + slope * (w - 1)) for w in range(1, 64)}, 1.6, 0.0, 0.0, 64)
    return CostTable({1: single, 16: many}, depth=3)


def of_rows(table: CostTable, count: int, chance: float) -> float:
    texts = [random_text(500, independent(chance), seed=i) for i in range(count)]
    model = Model(texts)
    proposer = MixedProposer(model, PLAN, table, ngram=False, prior=0.9)  # type: ignore[arg-type]
    vanilla = 1 / table.at(count, 64).verify_cost(1)
    return decode_rows(table, texts, proposer, model).rate(0, 300) / vanilla


def test_batches_draft_while_that_pays() -> None:
    assert of_rows(of_batches(linear=False), 16, 0.9) >= 1.3
    assert of_rows(of_batches(linear=True), 16, 0.9) >= 0.985


@pytest.mark.parametrize("rows", [4, 8])
@pytest.mark.parametrize("slope", [0.1, 0.2])
def test_rows_of_a_batch_draft_together(rows: int, slope: float) -> None:
    """A pass costs the same whoever takes part; rows that sat one out would need another."""
    many = PassCosts({w: 1 + slope * (w - 1) for w in range(1, 64)}, 0.35, 0.0, 0.0, 64)
    chance, table = 0.95, CostTable({rows: many}, depth=3)
    reached = [sum(chance**i for i in range(length + 1)) for length in range(8)]
    best = max(
        tokens / (length * 0.35 + many.verify_cost(length + 1))
        for length, tokens in enumerate(reached)
    )
    assert best > 1.2
    # progress counts by the row that is last
    assert of_rows(table, rows, chance) >= 0.88 * best


@pytest.mark.parametrize("rows", [4, 16])
def test_batches_find_back_to_drafting(rows: int) -> None:
    """An attempt risks a pass of all rows, so more is saved up for it."""

    def bad_then_good(generator: torch.Generator) -> Iterable[tuple[bool, float]]:
        for chance in (0.1, 0.97, 0.97, 0.97, 0.97):
            for _ in range(400):
                yield float(torch.rand((), generator=generator)) < chance, 0.9

    many = PassCosts({w: 1 + 0.02 * (w - 1) for w in range(1, 64)}, 0.4, 0.0, 0.0, 64)
    texts = [random_text(2000, bad_then_good, seed=i) for i in range(rows)]
    model = Model(texts)
    table = CostTable({rows: many}, depth=3)
    proposer = MixedProposer(model, PLAN, table, ngram=False, prior=0.9)  # type: ignore[arg-type]
    decoded = decode_rows(table, texts, proposer, model)
    assert decoded.rate(0, 380) >= 0.95
    assert decoded.rate(1200, 1900) >= 1.3


def test_a_prior_of_nothing_is_no_verdict() -> None:
    table, text = costs(0.3, 0.02), random_text(3000, independent(0.95), seed=12)
    model = Model([text])
    proposer = MixedProposer(model, PLAN, table, ngram=False, prior=0.0)  # type: ignore[arg-type]
    assert decode(table, text, proposer, model).rate(1000) >= 1.3


def test_the_estimates_come_to_what_is_so() -> None:
    table, text = costs(0.3, 0.02), random_text(2000, independent(0.8, 0.93), seed=11)
    model = Model([text])
    proposer = MixedProposer(model, PLAN, table, ngram=False)  # type: ignore[arg-type]
    decode(table, text, proposer, model)
    acceptance, policy = proposer.policy.acceptance, proposer.policy
    assert acceptance.later_token(TextBias()) == pytest.approx(0.8, abs=0.08)
    assert acceptance.drafted_token(0.93, TextBias()) == pytest.approx(0.8, abs=0.08)
    assert policy.rate > 1.2 * policy.costs.vanilla_rate


def test_sampled_texts_are_judged_by_themselves() -> None:
    """What greedy texts repeat says nothing about those that are sampled, which repeat less."""
    model, match = AcceptanceModel(), Match(4, (1, 2, 3), agreed=True)
    before = model.ngram_tokens(match, sampled=True)
    assert before < model.ngram_tokens(match, sampled=False)
    for _ in range(50):
        for update in model.ngram_updates(match, sampled=False):
            for rate in update.rates:
                rate.update(True)
    assert min(model.ngram_tokens(match, sampled=False)) > 0.9
    assert model.ngram_tokens(match, sampled=True) == before


def test_careful_chances_come_to_be_the_plain_ones() -> None:
    model, match = AcceptanceModel(), Match(4, (1,), agreed=True)
    (rate,) = model.ngram_updates(match, sampled=False)[0].rates
    apart = []
    for number in range(400):
        if number in (0, 20, 399):
            (careful,), (plain,) = (
                model.ngram_tokens(match, False, each) for each in (True, False)
            )
            apart.append(plain - careful)
        rate.update(number % 2 == 0)
    assert apart[0] > 0.15
    assert apart[0] > 2 * apart[1] > 3 * apart[2] > 0


def test_careful_chances_stay_chances() -> None:
    """However bad: what is drafted by the way must have one."""
    model, match = AcceptanceModel(), Match(1, (1,), agreed=False)
    (rate,) = model.ngram_updates(match, sampled=True)[0].rates
    for _ in range(300):
        rate.update(False)
        assert 0 < model.ngram_tokens(match, True, conservative=True)[0] < 1
