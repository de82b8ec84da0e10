"""Decoding with side candidates, replayed on paper."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from conflayers_cli.engine.cost_model import PassCosts
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.search.corpus import Continuation
from conflayers_cli.search.forced_text import SideTrace, Trace
from conflayers_cli.search.objective import DraftParams, Objective, Replay, replay
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import SkipProposer
from conflayers_cli.spec_decode.tree import PAPER_SHAPE, TreeShape
from tests import tiny

FLAT = PassCosts({1: 10.0, 40: 10.0}, floor=0.5, attention=0.2, mlp=0.2, context=256)
STEEP = PassCosts({1: 10.0, 2: 20.0, 40: 400.0}, floor=0.5, attention=0.2, mlp=0.2, context=256)
TWO = TreeShape(((0.0, 2),))


def side(ranks: list[int], count: int = 2) -> SideTrace:
    return SideTrace(np.full((len(ranks), count), 0.2), np.array(ranks))


def replay_tree(
    traced: list[tuple[Trace, SideTrace]],
    setting: DraftParams,
    draft_cost: float,
    costs: PassCosts,
    *,
    only_draft: bool = False,
) -> Replay:
    traces, sides = zip(*traced, strict=True)
    return replay(traces, setting, draft_cost, costs, sides, only_draft=only_draft)


def trace(agrees: str) -> Trace:
    marks = np.array([mark == "1" for mark in agrees])
    return Trace(marks, np.full(len(agrees), 0.6), np.zeros(len(agrees)))


def test_a_refused_token_whose_alternative_stands_gains_one() -> None:
    # 1 1 0 1 1: the third is refused; beside it the right one stands
    with_leaf = replay_tree(
        [(trace("11011"), side([2, 2, 1, 2, 2]))], DraftParams(3, 0.0, TWO), 1.0, FLAT
    )
    assert (with_leaf.steps, with_leaf.drafted, with_leaf.accepted) == (2, 4, 4)
    assert with_leaf.tokens == 6
    without = replay_tree([(trace("11011"), side([2] * 5))], DraftParams(3, 0.0, TWO), 1.0, FLAT)
    chain = replay([trace("11011")], DraftParams(3, 0.0), 1.0, FLAT)
    assert (without.steps, without.accepted) == (chain.steps, chain.accepted)


def test_where_wider_passes_cost_more_than_they_earn_it_is_the_chain() -> None:
    traced = [(trace("1101101"), side([0] * 7))]
    tree = replay_tree(traced, DraftParams(3, 0.0, TWO), 1.0, STEEP)
    chain = replay([traced[0][0]], DraftParams(3, 0.0), 1.0, STEEP)
    assert tree == chain
    assert replay_tree(traced, DraftParams(3, 0.0, TWO), 1.0, FLAT).steps < chain.steps


def objective(costs: PassCosts) -> Objective:
    decoder = tiny.decoder("llama")
    prompt = tiny.prompt(9, 3)
    output = tiny.generated(decoder, prompt, 80)
    return Objective(decoder, costs, [Continuation(tuple(prompt), tuple(output))])


def test_traced_ranks_are_the_drafts_own() -> None:
    judged = objective(FLAT)
    plan = SkipPlan.of_layers([2])
    (traced,), (sides,) = judged.traces(plan), judged.side_traces(plan, 99)
    assert sides.rank[traced.agrees].tolist() == [99] * int(traced.agrees.sum())
    assert (sides.rank[~traced.agrees] < 99).all()
    assert (np.diff(sides.beside, axis=1) <= 0).all()


def test_a_tree_is_taken_only_where_it_pays() -> None:
    plan = SkipPlan.of_layers([1, 2])
    cheap = objective(FLAT)
    score = replace(cheap.score(plan), setting=DraftParams(3, 0.0))
    score = replace(score, speedup=min(score.speedup, 0.9))
    taken = cheap.with_tree(score, PAPER_SHAPE)
    assert taken is not None and taken.setting.tree == PAPER_SHAPE
    assert taken.speedup > score.speedup
    dear = objective(STEEP)
    assert dear.with_tree(dear.score(plan), PAPER_SHAPE) is None
    assert cheap.with_tree(cheap.score(SkipPlan()), PAPER_SHAPE) is None


def test_paper_and_decoding_agree_on_tokens_per_step() -> None:
    plan, tree = SkipPlan.of_layers([2]), TreeShape(((0.0, 4),))
    judged = objective(FLAT)
    traced = list(zip(judged.traces(plan), judged.side_traces(plan, 4), strict=True))
    played = replay_tree(traced, DraftParams(4, 0.0, tree), 1.0, FLAT)
    decoder = tiny.decoder("llama")
    proposer = SkipProposer(decoder, plan, 4, 0.0, tree)
    steps = list(Generation(decoder, GenerationRequest(tiny.prompt(9, 3), 80), proposer=proposer))[
        1:
    ]
    real = sum(len(step.tokens) for step in steps) / len(steps)
    # on paper the draft sees its own keys along the whole text, so the two differ a little
    assert played.tokens / played.steps == pytest.approx(real, rel=0.2)


def test_where_only_the_next_draft_is_won_a_leaf_saves_its_drafting() -> None:
    traced = [(trace("11011"), side([2, 2, 1, 2, 2]))]
    setting = DraftParams(3, 0.0, TWO)
    whole = replay_tree(traced, setting, 1.0, FLAT)
    drafted = replay_tree(traced, setting, 1.0, FLAT, only_draft=True)
    chain = replay([traced[0][0]], DraftParams(3, 0.0), 1.0, FLAT)
    assert (drafted.steps, drafted.accepted) == (chain.steps, chain.accepted)
    assert drafted.seconds == chain.seconds - 1.0
    assert whole.drafted == drafted.drafted - 1  # it is one token further
