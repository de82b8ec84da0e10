"""Passes that begin with kept hidden states give what whole passes give, bit by bit."""

import random

import numpy as np
import pytest

from conflayers_cli.kernels.native_library import unavailable_reason
from conflayers_cli.search.corpus import Continuation
from conflayers_cli.search.forced_text import ForcedText
from conflayers_cli.search.objective import Objective
from conflayers_cli.search.texts import states_stride
from conflayers_cli.skip_plan import SkipPlan
from tests import tiny
from tests.search import planted


def continuation() -> Continuation:
    prompt = tiny.prompt(9, 3)
    return Continuation(tuple(prompt), tuple(tiny.generated(planted.decoder(), prompt, 30)))


def plans(count: int) -> list[SkipPlan]:
    draw, inner = random.Random(5), range(1, planted.DEPTH - 1)
    made = []
    for _ in range(count):
        attention, mlp = (draw.sample(inner, draw.randint(0, 6)) for _ in range(2))
        made.append(SkipPlan.of(attention, mlp))
    return made


@pytest.mark.parametrize("stride", [1, 3, 7])
def test_kept_states_change_no_bit(stride: int) -> None:
    text, fresh = (ForcedText(planted.decoder(), continuation(), n) for n in (stride, 0))
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
