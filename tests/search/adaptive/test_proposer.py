"""Drafting that learns: the text stays the model's own, and the planted layers are found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.generation.batch import Batch
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.search.adaptive import proposer as module
from conflayers_cli.search.adaptive.proposer import AutoProposer, Learnt
from conflayers_cli.search.adaptive.report import describe
from conflayers_cli.search.open_proposer import BUDGET
from conflayers_cli.skip_plan import SkipPlan
from tests import tiny
from tests.search import planted

PROMPTS = [tiny.prompt(9, seed) for seed in range(12)]


class Clock:
    """Time as a large model's layers would take it; a pass's width costs next to nothing."""

    def __init__(self, decoder: Decoder) -> None:
        self.now = 0.0
        self._decoder, self._forward = decoder, decoder.forward

    def forward(
        self, tokens: Any, positions: Any, cache: Any, plan: Any = None, **more: Any
    ) -> Any:
        plan = SkipPlan() if plan is None else plan
        kept = 2 * self._decoder.depth - len(plan)
        self.now += (1.0 + kept) * (1 + 0.01 * tokens.shape[1])
        return self._forward(tokens, positions, cache, plan, **more)

    def __call__(self, *device: object) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    from conflayers_cli.spec_decode import mixed

    decoder = planted.decoder()
    made = Clock(decoder)
    tiny.through_logits(decoder, monkeypatch)
    monkeypatch.setattr(decoder, "forward", made.forward)
    monkeypatch.setattr(module, "clock", made)
    monkeypatch.setattr(mixed, "perf_counter", made)
    yield made


def stream(proposer: AutoProposer, rounds: int = 1, tokens: int = 60) -> list[list[int]]:
    outputs = []
    for prompt in PROMPTS * rounds:
        text = Generation(planted.decoder(), GenerationRequest(prompt, tokens), proposer=proposer)
        tiny.steps_of(text)
        outputs.append(text.output)
    return outputs


def test_the_planted_layers_are_found(clock: Clock) -> None:
    kept: list[Learnt] = []
    proposer = AutoProposer(planted.decoder(), budget=0.1, keep=kept.append)
    stream(proposer, rounds=3)
    assert proposer.settled and proposer.settled_after
    left_out = {*proposer.best.plan.attention, *proposer.best.plan.mlp}
    assert len(left_out & set(planted.PLANTED)) >= 4
    assert len(left_out - set(planted.PLANTED)) <= 1
    assert proposer.expected_speedup > 1.2
    assert kept and kept[-1].plan == proposer.best.plan and kept[-1].settled
    assert "settled after" in describe(proposer, planted.DEPTH)


def test_a_second_run_begins_where_the_first_ended(clock: Clock) -> None:
    first: list[Learnt] = []
    stream(AutoProposer(planted.decoder(), budget=0.1, keep=first.append), rounds=3)
    before = clock.now
    stream(AutoProposer(planted.decoder(), budget=BUDGET))
    cold, before = clock.now - before, clock.now
    second = AutoProposer(planted.decoder(), budget=BUDGET, learnt=first[-1])
    stream(second)
    assert clock.now - before < 0.95 * cold
    assert second.settled and not second.tried
    assert "earlier run" in describe(second, planted.DEPTH)


def test_the_search_keeps_to_its_share(clock: Clock) -> None:
    proposer = AutoProposer(planted.decoder(), budget=0.05)
    for _ in range(3):
        stream(proposer)
        assert proposer.search_share <= 0.06
    assert proposer.search_seconds > 0


def test_a_short_answer_is_decoded_as_without_drafts(clock: Clock) -> None:
    decoder = planted.decoder()
    text = Generation(decoder, GenerationRequest(PROMPTS[0], 8))
    before = clock.now
    tiny.steps_of(text)
    plain, before = clock.now - before, clock.now
    one = Generation(
        decoder, GenerationRequest(PROMPTS[0], 8), proposer=AutoProposer(decoder, budget=BUDGET)
    )
    tiny.steps_of(one)
    assert clock.now - before <= 1.02 * plain


def test_when_the_plan_is_refused_another_is_looked_for(clock: Clock) -> None:
    """What was remembered is of another task, as it were: nearly all that it drafts is wrong."""
    wrong = SkipPlan.of_layers([1, 4, 5, 8, 10])
    proposer = AutoProposer(
        planted.decoder(), budget=0.2, learnt=Learnt(wrong, acceptance=0.9, settled=True)
    )
    stream(proposer, rounds=5)
    assert proposer.best.plan != wrong


@settings(max_examples=12)
@given(seed=st.integers(0, 99), temperature=st.sampled_from([0.0, 0.8]), budget=st.integers(1, 90))
def test_the_text_is_the_models_own(seed: int, temperature: float, budget: int) -> None:
    decoder, sampling = planted.decoder(), SamplingParams(temperature=temperature, seed=seed)
    prompt = tiny.prompt(5 + seed % 7, seed)
    plain = tiny.generation(decoder, prompt, budget, sampling)
    tiny.steps_of(plain)
    proposer = AutoProposer(decoder, budget=1.0)
    for _ in range(2):  # the second time with what was learnt of the first
        request = GenerationRequest(prompt, budget, sampling)
        text = Generation(decoder, request, proposer=proposer)
        tiny.steps_of(text)
        assert text.output == plain.output


def check_same_text(decoder: Decoder, request: GenerationRequest, proposer: AutoProposer) -> None:
    """The text is that without drafts."""
    plain, text = (Generation(decoder, request, proposer=p) for p in (None, proposer))
    tiny.steps_of(plain)
    tiny.steps_of(text)
    assert text.output == plain.output


@pytest.mark.parametrize("native", [True, False])
def test_half_precision_to_the_bit(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at the hidden states leaves the keys and values of the text as they were."""
    model = planted.decoder().model
    decoder = Decoder(tiny.build(model.config, seed=4, dtype=torch.bfloat16))
    if not native:
        tiny.through_logits(decoder, monkeypatch)
    proposer = AutoProposer(decoder, budget=1.0)
    for seed in range(3):
        request = GenerationRequest(tiny.prompt(20, seed), 80)
        check_same_text(decoder, request, proposer)
    assert proposer.search_seconds > 0


def test_a_batch_is_decoded_as_its_texts_alone() -> None:
    decoder = planted.decoder()
    requests = [GenerationRequest(prompt, 20 + 9 * i) for i, prompt in enumerate(PROMPTS[:5])]
    alone = []
    for request in requests:
        text = Generation(decoder, request)
        tiny.steps_of(text)
        alone.append(text.output)
    batch = Batch(decoder, requests, size=3, proposer=AutoProposer(decoder, budget=1.0))
    batch.run()
    assert batch.outputs == alone


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_shallow_models(depth: int) -> None:
    import transformers as hf

    config = hf.LlamaConfig(**{**tiny.LLAMA_LIKE, "num_hidden_layers": depth})
    decoder = Decoder(tiny.build(config))
    proposer = AutoProposer(decoder, budget=1.0)
    for seed in range(4):
        request = GenerationRequest(tiny.prompt(9, seed), 60)
        check_same_text(decoder, request, proposer)
