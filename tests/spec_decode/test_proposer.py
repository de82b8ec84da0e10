"""The skip drafter: its chain, where it ends.

Wrong drafts never show in the output, only in the speed; so what is drafted is checked by itself.
"""

from __future__ import annotations

import pytest
import torch

from conflayers_cli.engine.decoder import FULL, Decoder
from conflayers_cli.engine.sampler import Sampler
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import Context, SkipProposer
from tests import tiny

PLANS = (SkipPlan.of_layers([2]), SkipPlan.of([1], [2, 3]))
TEXT = tiny.prompt(12, 6)
GREEDY, SAMPLED = SamplingParams(), SamplingParams(0.8, top_k=20, repetition_penalty=1.2, seed=4)

each_plan = pytest.mark.parametrize("plan", PLANS)
each_sampling = pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])


def context(decoder: Decoder, sampling: SamplingParams) -> Context:
    """A text whose tokens but the last are in the cache, by the full model."""
    cache = decoder.new_cache(64)
    decoder.prefill(torch.tensor([TEXT[:-1]]), cache)
    sampler = Sampler(sampling, decoder.vocabulary, decoder.device, TEXT)
    return Context(list(TEXT), cache, sampler)


def chain_logits(decoder: Decoder, plan: SkipPlan, drafted: tuple[int, ...]) -> torch.Tensor:
    """The skipped model's logits behind the text and behind each draft, in a single pass."""
    last, cache = len(TEXT) - 1, decoder.new_cache(64)
    decoder.prefill(torch.tensor([TEXT[:-1]]), cache)
    tokens = torch.tensor([[TEXT[-1], *drafted]])
    positions = torch.arange(last, last + tokens.shape[1])[None]
    return decoder.forward(tokens, positions, cache, plan)[0]


@each_plan
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_greedy_drafts_are_the_skipped_models_choices(family: str, plan: SkipPlan) -> None:
    decoder = tiny.decoder(family)
    draft = SkipProposer(decoder, plan, 6, 0.0).propose(context(decoder, GREEDY), 20)
    assert len(draft.tokens) == 6
    expected = chain_logits(decoder, plan, draft.tokens).argmax(-1)
    assert list(draft.tokens) == expected[:6].tolist()


@each_plan
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_sampled_drafts_are_those_of_the_skipped_model_alone(family: str, plan: SkipPlan) -> None:
    """By the same random numbers as if it were the whole model."""
    decoder = tiny.decoder(family)
    draft = SkipProposer(decoder, plan, 6, 0.0).propose(context(decoder, SAMPLED), 20)
    logits = chain_logits(decoder, plan, draft.tokens)
    chosen = context(decoder, SAMPLED).sampler.choose(logits, len(TEXT), draft.tokens)
    assert list(draft.tokens) == chosen[:6]


@each_sampling
@pytest.mark.parametrize(("limit", "most", "count"), [(3, 8, 3), (8, 3, 3), (1, 1, 1)])
def test_no_more_than_asked_for(
    sampling: SamplingParams, limit: int, most: int, count: int
) -> None:
    decoder = tiny.decoder("llama")
    draft = SkipProposer(decoder, PLANS[0], most, 0.0).propose(context(decoder, sampling), limit)
    assert len(draft.tokens) == count


@each_sampling
@pytest.mark.parametrize("stop", [0.1, 0.3, 0.6, 1.1])
def test_a_chain_ends_after_the_first_unlikely_token(sampling: SamplingParams, stop: float) -> None:
    decoder = tiny.decoder("llama")
    whole = SkipProposer(decoder, PLANS[0], 8, 0.0).propose(context(decoder, sampling), 20)
    logits = chain_logits(decoder, PLANS[0], whole.tokens)
    scores = context(decoder, sampling).sampler.scores(logits, whole.tokens)
    rows = torch.softmax(scores / (sampling.temperature or 1.0), -1)
    unlikely = [i for i, token in enumerate(whole.tokens) if rows[i, token] < stop]
    count = unlikely[0] + 1 if unlikely else 8
    draft = SkipProposer(decoder, PLANS[0], 8, stop).propose(context(decoder, sampling), 20)
    assert draft.tokens == whole.tokens[:count]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_full_model_drafts_without_fault(
    family: str, penalty: float, temperature: float
) -> None:
    """Drafting with nothing left out, all is accepted: draft and verification agree on positions,
    cache and penalty.
    """
    decoder = tiny.decoder(family)
    generation = Generation(
        decoder,
        GenerationRequest(TEXT, 30, SamplingParams(temperature, repetition_penalty=penalty)),
        proposer=SkipProposer(decoder, FULL, 4, 0.0),
    )
    steps = tiny.steps_of(generation)
    assert sum(step.drafted for step in steps) > 20
    assert all(step.accepted == step.drafted for step in steps)
