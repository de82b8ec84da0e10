"""Passes that begin with kept hidden states give what whole passes give, bit by bit."""

import functools
import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from conflayers_cli.kernels.native_library import unavailable_reason
from conflayers_cli.search.corpus import Continuation
from conflayers_cli.search.forced_text import MAX_POSITIONS, ForcedText, judged_blocks
from conflayers_cli.search.objective import Objective
from conflayers_cli.search.texts import states_stride
from conflayers_cli.skip_plan import SkipPlan
from tests import tiny
from tests.search import planted

LONG = 200
"""Tokens of an answer of which only a part is judged."""


@functools.cache
def continuation(tokens: int = 30) -> Continuation:
    prompt = tiny.prompt(9, 3)
    return Continuation(tuple(prompt), tuple(tiny.generated(planted.decoder(), prompt, tokens)))


def plans(count: int) -> list[SkipPlan]:
    draw, inner = random.Random(5), range(1, planted.DEPTH - 1)
    made = []
    for _ in range(count):
        attention, mlp = (draw.sample(inner, draw.randint(0, 6)) for _ in range(2))
        made.append(SkipPlan.of(attention, mlp))
    return made


def test_a_long_answer_is_judged_in_blocks_spread_over_it() -> None:
    assert judged_blocks(MAX_POSITIONS) == [range(MAX_POSITIONS)]
    for share in (0.0, 0.4, 1.0):
        first, second = judged_blocks(LONG - 1, share)
        assert len(first) + len(second) == MAX_POSITIONS
        assert first.start >= 0 and first.stop <= (LONG - 1) // 2 <= second.start
        assert second.stop <= LONG - 1
    assert judged_blocks(LONG - 1, 1.0)[1].stop >= LONG - 2


def test_a_block_is_judged_as_what_it_is_in_its_text() -> None:
    """Fed token by token to a draft on the whole model's keys, the model chooses the same."""
    decoder, text = planted.decoder(), ForcedText(planted.decoder(), continuation(LONG), 1, 0.7)
    plan, given = SkipPlan.of([2, 5], [4, 9]), continuation(LONG)
    prompt, output = given.prompt, given.output
    judged = {i for block in judged_blocks(LONG - 1, 0.7) for i in block}
    cache, agrees, margins = decoder.new_cache(len(prompt) + LONG), [], []
    decoder.prefill(torch.tensor([prompt]), cache)
    for i, (token, following) in enumerate(pairwise(output)):
        tokens, at = torch.tensor([[token]]), torch.tensor([[len(prompt) + i]])
        logits = decoder.forward(tokens, at, cache, plan)[0, 0].float()
        if i in judged:
            others = logits.clone()
            others[following] = -torch.inf
            agrees.append(int(logits.argmax()) == following)
            margins.append(float(logits[following] - others.max()))
        decoder.forward(tokens, at, cache)
    found = text.trace(plan)
    assert found.agrees.tolist() == agrees
    assert 0 < sum(agrees) < len(agrees)
    near = [(own, each) for own, each in zip(found.margin, margins, strict=True) if each >= 0]
    assert all(own == pytest.approx(each, abs=1e-3) for own, each in near)
    assert all(own >= each - 1e-3 for own, each in zip(found.margin, margins, strict=True))
    assert ((found.margin >= 0) == found.agrees).all()
    alone = text.chained_trace(plan, 1)
    assert np.array_equal(alone.agrees, found.agrees)
    assert np.allclose(alone.margin, found.margin, atol=1e-3)


@pytest.mark.parametrize(("stride", "tokens"), [(1, LONG), (3, 30), (7, 30)])
def test_kept_states_change_no_bit(stride: int, tokens: int) -> None:
    given = continuation(tokens)
    text, fresh = (ForcedText(planted.decoder(), given, n) for n in (stride, 0))
    for number, plan in enumerate(plans(12)):
        found, whole = text.trace(plan, anchor=number % 3 == 0), fresh.trace(plan)
        assert np.array_equal(found.agrees, whole.agrees), plan
        assert np.array_equal(found.probability, whole.probability), plan


@pytest.mark.skipif(unavailable_reason() is not None, reason="no native library")
def test_a_plan_like_the_anchor_runs_only_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, text = planted.decoder(), ForcedText(planted.decoder(), continuation())
    text.trace(SkipPlan.of_layers([2, 9]), anchor=True)
    begun: list[int] = []
    choose = type(decoder).choose

    def watched(self: object, *args: object, **how: object) -> object:
        begun.append(how["resume"].begin)  # type: ignore[attr-defined]
        return choose(decoder, *args, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(type(decoder), "choose", watched)
    for plan in (
        SkipPlan.of_layers([2, 8, 9]),
        SkipPlan.of([2, 9], [2, 7, 9]),
        SkipPlan.of_layers([2]),
        SkipPlan.of([9], [2, 9]),
    ):
        text.trace(plan)
    assert begun == [16, 15, 18, 4]


def test_planted_layers_change_least() -> None:
    judged = Objective(planted.decoder(), planted.COSTS, [continuation()])
    effects = judged.effects()
    of_planted = [effects[i, kind] for i in planted.PLANTED for kind in ("attention", "mlp")]
    others = [effect for (i, _), effect in effects.items() if i and i not in planted.PLANTED]
    assert max(of_planted) < min(others) / 10
    assert judged.effects() == effects


def test_states_are_kept_as_far_as_they_fit() -> None:
    decoder = planted.decoder()
    every = 2 * planted.DEPTH * 100 * decoder.config.hidden_size * decoder.dtype.itemsize
    assert states_stride(decoder, 100, every) == 1
    assert states_stride(decoder, 100, every // 3) == 3
    assert states_stride(decoder, 100, 8) == 0
