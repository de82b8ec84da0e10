"""Replay on paper, and the score it gives a plan."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conflayers_cli.engine.cost_model import PassCosts
from conflayers_cli.search.corpus import Continuation
from conflayers_cli.search.forced_text import Trace
from conflayers_cli.search.objective import DraftParams, Objective, replay
from conflayers_cli.skip_plan import SkipPlan
from tests import tiny

COSTS = PassCosts({1: 10.0, 2: 11.0, 4: 15.0}, floor=1.0, attention=0.5, mlp=0.5, context=256)


def trace(agrees: str, probability: list[float] | None = None) -> Trace:
    """A trace from a text of 1s (agrees) and 0s."""
    marks = np.array([mark == "1" for mark in agrees])
    return Trace(marks, np.array(probability or [1.0] * len(marks)), np.zeros(len(marks)))


def test_replay_counts_by_hand() -> None:
    # 110|1|: two drafts kept and the third refused, then one draft that ends the text
    played = replay([trace("1101")], DraftParams(3, 0.0), 2.0, COSTS)
    assert (played.steps, played.drafted, played.accepted, played.tokens) == (2, 4, 3, 5)
    assert played.seconds == 3 * 2.0 + 15.0 + 1 * 2.0 + 11.0


def test_replay_stops_after_the_first_unsure_token() -> None:
    played = replay(
        [trace("111111", [0.9, 0.4, 0.9, 0.9, 0.9, 0.9])], DraftParams(9, 0.5), 1.0, COSTS
    )
    # drafts the sure and the unsure one, both stand; behind them the rest of the text
    assert (played.steps, played.drafted, played.accepted) == (2, 5, 5)


@given(
    st.lists(st.tuples(st.booleans(), st.floats(0, 1)), min_size=1, max_size=60),
    st.integers(1, 12),
    st.floats(0, 1),
)
def test_replay_covers_the_text_exactly(
    positions: list[tuple[bool, float]], length: int, stop: float
) -> None:
    agrees, probability = (np.array(part) for part in zip(*positions, strict=True))
    text = Trace(agrees, probability, np.zeros(len(agrees)))
    played = replay([text], DraftParams(length, stop), 1.0, COSTS)
    assert played.accepted <= played.drafted <= played.steps * length
    assert played.tokens == played.accepted + played.steps
    # the last step may decide one token more than the text holds
    assert len(positions) <= played.tokens <= len(positions) + 1
    assert played.accepted <= agrees.sum()


def test_a_sure_draft_that_always_agrees_takes_the_longest_length() -> None:
    free = PassCosts({1: 10.0, 26: 10.0}, floor=0.1, attention=0.0, mlp=0.0, context=256)
    short = replay([trace("1" * 60)], DraftParams(2, 0.0), 0.1, free)
    long = replay([trace("1" * 60)], DraftParams(16, 0.0), 0.1, free)
    assert long.seconds < short.seconds


def objective(costs: PassCosts = COSTS) -> Objective:
    decoder = tiny.decoder("llama")
    prompt = tiny.prompt(9, 3)
    output = tiny.generated(decoder, prompt, 40)
    return Objective(decoder, costs, [Continuation(tuple(prompt), tuple(output))])


def test_the_empty_plan_is_vanilla() -> None:
    score = objective().score(SkipPlan())
    assert (score.speedup, score.setting.max_tokens) == (1.0, 0)


def test_agreement_is_that_of_a_draft_pass_token_by_token() -> None:
    import torch

    judged = objective()
    plan = SkipPlan.of_layers([2])
    score = judged.score(plan)
    # the same text fed one token at a time under the plan, on the prompt's full cache
    decoder = judged.decoder
    prompt = tiny.prompt(9, 3)
    output = tiny.generated(decoder, prompt, 40)
    cache = decoder.new_cache(60)
    decoder.prefill(torch.tensor([prompt]), cache)
    hits = []
    for i, (token, following) in enumerate(pairwise(output)):
        at = torch.tensor([[len(prompt) + i]])
        logits = decoder.forward(torch.tensor([[token]]), at, cache, plan)
        hits.append(int(logits.argmax()) == following)
    assert score.agreement == pytest.approx(sum(hits) / len(hits))
    assert 0 < score.agreement < 1


def test_the_modest_setting_is_nearly_as_good_and_drafts_no_more() -> None:
    judged = objective(
        PassCosts({1: 10.0, 26: 11.0}, floor=0.5, attention=0.1, mlp=0.1, context=256)
    )
    plan = SkipPlan.of_layers([2])
    best, conservative_score = judged.score(plan), judged.conservative_score(plan)
    assert best.speedup * 0.985 <= conservative_score.speedup <= best.speedup
    assert conservative_score.replay.drafted <= best.replay.drafted


def test_scores_are_kept_and_passes_counted() -> None:
    judged = objective()
    plan = SkipPlan.of_layers([1])
    before = judged.decoder.draft_passes
    assert judged.score(plan) is judged.score(plan)
    assert judged.decoder.draft_passes - before == 1


def test_cheaper_drafts_score_higher() -> None:
    dear = PassCosts({1: 10.0, 26: 11.0}, floor=9.0, attention=0.1, mlp=0.1, context=256)
    cheap = PassCosts({1: 10.0, 26: 11.0}, floor=0.1, attention=0.1, mlp=0.1, context=256)
    plan = SkipPlan.of_layers([2])
    assert objective(cheap).score(plan).speedup > objective(dear).score(plan).speedup


def test_the_expected_speed_is_that_of_drafts_with_their_own_keys() -> None:
    import torch

    cheap = PassCosts({1: 10.0, 26: 11.0}, floor=0.1, attention=0.1, mlp=0.1, context=256)
    judged, plan = objective(cheap), SkipPlan.of_layers([2])
    score = replace(judged.score(plan), setting=DraftParams(4, 0.0))
    expected = judged.as_decoded(score)
    # drafts of four tokens, each fed to the skipped model one by one
    decoder = judged.decoder
    prompt = tiny.prompt(9, 3)
    text = [*prompt, *tiny.generated(decoder, prompt, 40)]
    hits = []
    for i in range(len(prompt), len(text) - 1, 4):
        cache = decoder.new_cache(60)
        decoder.prefill(torch.tensor([text[:i]]), cache)
        for at in range(i, min(i + 4, len(text) - 1)):
            token, place = torch.tensor([[text[at]]]), torch.tensor([[at]])
            logits = decoder.forward(token, place, cache, plan)
            hits.append(int(logits.argmax()) == text[at + 1])
    assert expected.agreement == pytest.approx(sum(hits) / len(hits))
    assert (expected.plan, expected.setting) == (score.plan, score.setting)
    assert judged.as_decoded(judged.score(SkipPlan())) == judged.score(SkipPlan())
    assert judged.score(plan).agreement == objective(cheap).score(plan).agreement  # cache restored
