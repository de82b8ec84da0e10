"""Searching while generating: what is generated, what is found, what it costs."""

from __future__ import annotations

from typing import get_args

import pytest

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.errors import InputError
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.search import online as module
from conflayers_cli.search.online import METHODS, AdaptiveProposer, DecodeStats, Method
from conflayers_cli.skip_plan import SkipPlan
from tests import tiny
from tests.engine.test_bfloat16 import decoder as bfloat16
from tests.search import planted

PROMPTS = [tiny.prompt(9, seed) for seed in range(8)]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter intervals than are good for real models, so that a short stream sees it all."""
    for name, value in (
        ("INTERVAL", 8),
        ("VANILLA_STEPS", 4),
        ("CHECK_INTERVAL", 12),
        ("PATIENCE", 3),
    ):
        monkeypatch.setattr(module, name, value)


class Clock:
    """Time as the planted model's layers would take it, were they large: deterministic."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.now = 0.0
        self._forward = decoder.forward

    def forward(self, tokens, positions, cache, plan=SkipPlan(), **more):  # type: ignore[no-untyped-def]  # noqa: B008
        kept = 2 * self.decoder.depth - len(plan)
        self.now += (1.0 + kept) * (1 + 0.01 * tokens.shape[1])
        return self._forward(tokens, positions, cache, plan, **more)

    def __call__(self, device: object) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    decoder = planted.decoder()
    made = Clock(decoder)
    tiny.through_logits(decoder, monkeypatch)
    monkeypatch.setattr(decoder, "forward", made.forward)
    monkeypatch.setattr(module, "clock", made)
    return made


def stream(proposer: AdaptiveProposer, rounds: int = 1, tokens: int = 50) -> None:
    for prompt in PROMPTS * rounds:
        list(Generation(planted.decoder(), GenerationRequest(prompt, tokens), proposer=proposer))


@pytest.mark.parametrize("method", METHODS)
def test_the_text_is_the_models_own(method: Method) -> None:
    proposer = AdaptiveProposer(planted.decoder(), method, budget=0.5)
    for prompt in PROMPTS[:5]:
        adapted = Generation(planted.decoder(), GenerationRequest(prompt, 50), proposer=proposer)
        plain = Generation(planted.decoder(), GenerationRequest(prompt, 50))
        list(adapted)
        list(plain)
        assert adapted.tokens == plain.tokens
    assert proposer.tried > 1


@pytest.mark.parametrize("method", METHODS)
def test_the_text_is_the_models_own_to_the_bit(method: Method) -> None:
    """In bfloat16 the keys of the text must stay those that decoding wrote."""
    decoder = bfloat16()
    for seed in range(2):
        prompt = tiny.prompt(20 + 3 * seed, seed, 500)
        proposer = AdaptiveProposer(decoder, method, budget=1.0, seed=seed)
        adapted = Generation(decoder, GenerationRequest(prompt, 100), proposer=proposer)
        plain = Generation(decoder, GenerationRequest(prompt, 100))
        list(adapted)
        list(plain)
        assert proposer.tried
        assert adapted.tokens == plain.tokens


def test_conflayers_finds_the_planted_layers_and_settles(clock: Clock) -> None:
    proposer = AdaptiveProposer(planted.decoder(), "conflayers", budget=0.2)
    stream(proposer, rounds=2)
    assert proposer.settled
    assert set(planted.PLANTED) & set(proposer.plan.layers)
    assert proposer.best.speed > 1.1 * proposer.vanilla.speed
    assert proposer.setting.max_tokens > 0


@pytest.mark.parametrize("budget", [0.02, 0.05, 0.3])
@pytest.mark.parametrize("method", METHODS)
def test_the_search_keeps_to_its_share(clock: Clock, method: Method, budget: float) -> None:
    proposer = AdaptiveProposer(planted.decoder(), method, budget=budget)
    spent, later = 0.0, []
    for prompt in PROMPTS * (2 if budget < 0.05 else 1):  # until the first piece is made up for
        for _ in Generation(planted.decoder(), GenerationRequest(prompt, 50), proposer=proposer):
            if spent and proposer.search_seconds > spent:
                later.append(proposer.search_share)
            spent = proposer.search_seconds
    assert 0 < proposer.search_share <= budget
    # the very first piece of search, whose length nobody knows, may overstep; later ones may by
    # as much as they are longer than all before, until decoding has caught up
    assert later and max(later) <= 1.3 * budget


def test_decodes_plainly_where_no_plan_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny.decoder("llama")
    now = [0.0]

    def forward(tokens, positions, cache, plan=SkipPlan(), **more):  # type: ignore[no-untyped-def]  # noqa: B008
        now[0] += 1.0  # leaving layers out saves nothing
        return plain(tokens, positions, cache, plan, **more)

    plain = decoder.forward
    tiny.through_logits(decoder, monkeypatch)
    monkeypatch.setattr(decoder, "forward", forward)
    monkeypatch.setattr(module, "clock", lambda device: now[0])
    proposer = AdaptiveProposer(decoder, "conflayers", budget=0.5)
    settled = []
    for prompt in PROMPTS:
        before = proposer.settled
        steps = list(Generation(decoder, GenerationRequest(prompt, 40), proposer=proposer))
        if before and proposer.settled:
            settled.append({step.proposer for step in steps[1:]})
    assert not proposer.plan
    assert len(settled) > 2
    assert all(drafters == {"none"} for drafters in settled)


def test_starts_from_a_given_plan(clock: Clock) -> None:
    start = SkipPlan.of_layers(planted.PLANTED)
    proposer = AdaptiveProposer(planted.decoder(), "conflayers", budget=0.05, start=start)
    stream(proposer)
    assert proposer.plan == start or len(proposer.plan) > len(start)


def test_looks_again_when_decoding_has_become_slow(clock: Clock) -> None:
    proposer = AdaptiveProposer(planted.decoder(), "conflayers", budget=0.2)
    stream(proposer, rounds=2)
    assert proposer.settled and proposer.plan
    tried, forward = proposer.tried, clock.forward

    def slow(tokens, positions, cache, plan=SkipPlan(), **more):  # type: ignore[no-untyped-def]  # noqa: B008
        clock.now += 20.0 if plan else 0.0  # drafts have become dear
        return forward(tokens, positions, cache, plan, **more)

    planted.decoder().forward = slow  # type: ignore[method-assign]
    stream(proposer, rounds=2)
    assert proposer.tried > tried
    assert proposer.best.speed <= 1.05 * proposer.vanilla.speed or not proposer.plan


def test_sampled_texts_are_searched_along_too() -> None:
    proposer = AdaptiveProposer(planted.decoder(), "conflayers", budget=0.5)
    for seed, prompt in enumerate(PROMPTS):
        sampling = SamplingParams(temperature=0.8, seed=seed)
        generation = Generation(
            planted.decoder(), GenerationRequest(prompt, 40, sampling), proposer=proposer
        )
        list(generation)
        assert len(generation.output) == 40
    assert proposer.tried > 0


def test_a_stall_of_the_machine_does_not_count() -> None:
    step = DecodeStats(1, 2, 2, 3, 1.0, 0.5)
    stalled = DecodeStats(1, 2, 2, 3, 60.0, 0.5)
    assert DecodeStats.sum([step] * 9 + [stalled]).seconds == pytest.approx(10.0)
    assert DecodeStats.sum([]).speed == 0.0


def test_what_cannot_run_is_refused_before_anything_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from conflayers_cli.search.strategies import swift

    monkeypatch.setattr(swift, "has_sklearn", lambda: False)
    with pytest.raises(InputError, match="scikit-learn"):
        AdaptiveProposer(planted.decoder(), "swift")
    assert get_args(Method) == METHODS
