"""The mixed drafter on real (tiny) models: output stays the model's own, whoever drafts.

How much it drafts is a matter of costs; here they are such that drafting looks worth while.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conflayers_cli.engine.cost_model import CostTable, PassCosts
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.sampler import Sampler
from conflayers_cli.generation.sequence import Step
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.history import MIN_REMEMBERED
from conflayers_cli.spec_decode.mixed import MixedProposer
from conflayers_cli.spec_decode.proposer import Context, Draft
from conflayers_cli.spec_decode.tree import PAPER_SHAPE, TreeShape
from tests import tiny
from tests.engine import test_bfloat16
from tests.engine.test_lossless import SAMPLINGS

MIDDLE = st.sets(st.integers(1, tiny.DEPTH - 2))
PLANS = st.builds(SkipPlan.of, MIDDLE, MIDDLE)


def costs(draft: float = 0.1, slope: float = 0.01) -> CostTable:
    """A full pass takes a second; drafts and further tokens next to nothing."""
    verify = {width: 1.0 + slope * (width - 1) for width in (1, 2, 64)}
    return CostTable({1: PassCosts(verify, draft, 0.0, 0.0, 64)}, tiny.DEPTH)


def repetitive(length: int, seed: int, vocabulary: int = tiny.VOCABULARY) -> list[int]:
    """A prompt in which n-grams come again."""
    part = tiny.prompt(max(2, length // 3), seed, vocabulary)
    return (part * 4)[:length]


def mixed(decoder: Decoder, plan: SkipPlan | None, **more: object) -> MixedProposer:
    return MixedProposer(decoder, plan, costs(), **{"prior": 0.9, **more})  # type: ignore[arg-type]


def decoded(
    decoder: Decoder, prompt: list[int], count: int, **more: Any
) -> tuple[list[int], list[Step]]:
    generation = tiny.generation(decoder, prompt, count, **more)
    steps = tiny.steps_of(generation)
    return generation.output, steps


@settings(max_examples=40)
@given(
    family=st.sampled_from(["llama", "mistral", "gemma2"]),
    plan=PLANS,
    ngram=st.booleans(),
    tree=st.sampled_from([None, PAPER_SHAPE]),
    count=st.integers(1, 30),
    length=st.integers(1, 30),
    sampling=SAMPLINGS,
    most=st.integers(1, 25),
    seed=st.integers(0, 1000),
)
def test_output_is_vanillas(
    family: str,
    plan: SkipPlan,
    ngram: bool,
    tree: TreeShape | None,
    count: int,
    length: int,
    sampling: SamplingParams,
    most: int,
    seed: int,
) -> None:
    decoder, prompt = tiny.decoder(family), repetitive(length, seed)
    proposer = mixed(decoder, plan, ngram=ngram, tree=tree, max_tokens=most)
    for _ in range(2):  # the second time it knows more
        got, steps = decoded(decoder, prompt, count, sampling=sampling, proposer=proposer)
        assert got == decoded(decoder, prompt, count, sampling=sampling)[0]
        assert len(got) == count
        assert all(step.accepted <= step.drafted <= most for step in steps)


@settings(max_examples=15)
@given(
    plan=PLANS,
    tree=st.sampled_from([None, PAPER_SHAPE]),
    length=st.integers(1, 40),
    sampling=SAMPLINGS,
    seed=st.integers(0, 1000),
)
def test_in_bfloat16_too(
    plan: SkipPlan, tree: TreeShape | None, length: int, sampling: SamplingParams, seed: int
) -> None:
    decoder = test_bfloat16.decoder()
    prompt = repetitive(length, seed, test_bfloat16.VOCABULARY)
    proposer = mixed(decoder, plan, tree=tree)
    got, _ = decoded(decoder, prompt, 30, sampling=sampling, proposer=proposer)
    assert got == decoded(decoder, prompt, 30, sampling=sampling)[0]


def test_end_tokens_and_budget() -> None:
    decoder, prompt = tiny.decoder("llama"), repetitive(18, 1)
    text, _ = decoded(decoder, prompt, 40)
    for end in set(text[5:30]):
        proposer = mixed(decoder, SkipPlan.of_layers([2]))
        got, steps = decoded(decoder, prompt, 40, proposer=proposer, end_tokens=frozenset([end]))
        assert got == text[: text.index(end) + 1]
        assert steps[-1].finish == "stop"


class Recorded(MixedProposer):
    """Keeps what it drafted."""

    def propose_batch(self, contexts: Sequence[Context], limits: Sequence[int]) -> list[Draft]:
        drafts = super().propose_batch(contexts, limits)
        self.drafts = [*getattr(self, "drafts", []), *drafts]
        return drafts


@pytest.mark.parametrize(
    "sampling", [SamplingParams(), SamplingParams(0.7, seed=1)], ids=["greedy", "sampled"]
)
def test_both_draft_and_say_so(sampling: SamplingParams) -> None:
    decoder = tiny.decoder("llama")
    proposer = Recorded(decoder, SkipPlan.of_layers([2]), costs(), prior=0.9)
    for seed in range(4):
        decoded(decoder, repetitive(24, seed), 40, sampling=sampling, proposer=proposer)
    drafts = [draft for draft in proposer.drafts if draft.tokens]
    assert proposer.name == "mixed"
    sources = {source for draft in drafts for source in draft.sources}
    assert sources == {"skip", "ngram"}
    assert any(len(set(draft.sources)) == 2 for draft in drafts)
    for draft in drafts:
        assert len(draft.sources) == len(draft.tokens)


def test_names() -> None:
    decoder, plan = tiny.decoder("llama"), SkipPlan.of_layers([2])
    assert mixed(decoder, None).name == mixed(decoder, SkipPlan()).name == "ngram"
    assert mixed(decoder, plan, ngram=False).name == "skip"


def test_nothing_drafted_is_vanilla() -> None:
    """Where drafts cost more than they can gain, no pass of the skipped model is run."""
    decoder = tiny.decoder("llama")
    proposer = MixedProposer(decoder, SkipPlan.of_layers([2]), costs(2.0, 1.0), ngram=False)
    before = decoder.draft_passes
    _, steps = decoded(decoder, tiny.prompt(9), 40, proposer=proposer)
    assert decoder.draft_passes == before
    assert all(step.proposer in ("prefill", "none") for step in steps)


def row_of(decoder: Decoder, cache: object, text: list[int], sampling: SamplingParams) -> Context:
    sampler = Sampler(sampling, decoder.vocabulary, decoder.device, text)
    return Context(list(text), cache, sampler)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "sampling",
    [SamplingParams(), SamplingParams(repetition_penalty=1.2)],
    ids=["greedy", "penalty"],
)
def test_rows_draft_as_they_would_alone(sampling: SamplingParams) -> None:
    """Rows of different lengths share the passes; none disturbs another, and a limit of 0 holds."""
    decoder, plan = tiny.decoder("llama"), SkipPlan.of_layers([2])
    prompts = [repetitive(length, length) for length in (21, 9, 30, 14)]
    limits = [6, 0, 3, 6]
    cache = decoder.new_cache(64, batch=len(prompts))
    padded = torch.tensor([(prompt[:-1] + [0] * 30)[:30] for prompt in prompts])
    decoder.prefill(padded, cache)
    filled = [layer.keys.clone() for layer in cache.layers]
    contexts = [row_of(decoder, cache, prompt, sampling) for prompt in prompts]
    together = mixed(decoder, plan, max_tokens=8).propose_batch(contexts, limits)
    for layer, before in zip(cache.layers, filled, strict=True):
        for i, prompt in enumerate(prompts):
            assert torch.equal(layer.keys[i, :, : len(prompt) - 1], before[i, :, : len(prompt) - 1])
    assert not together[1].tokens
    assert sum(bool(draft.tokens) for draft in together) == 3
    for prompt, limit, draft in zip(prompts, limits, together, strict=True):
        assert len(draft.tokens) <= limit
        own = decoder.new_cache(64)
        decoder.prefill(torch.tensor([prompt[:-1]]), own)
        chain = check_chain(decoder, plan, row_of(decoder, own, prompt, sampling), draft)
        assert chain == [
            token
            for token, source in zip(draft.tokens, draft.sources, strict=True)
            if source == "skip"
        ]


def check_chain(decoder: Decoder, plan: SkipPlan, context: Context, draft: Draft) -> list[int]:
    """The skipped model's choices where it drafted, by one pass over the whole chain."""
    tokens = torch.tensor([[context.tokens[-1], *draft.tokens]])
    last = len(context.tokens) - 1
    positions = torch.arange(last, last + tokens.shape[1])[None]
    logits = decoder.forward(tokens, positions, context.cache, plan)[0]
    best = context.sampler.scores(logits, draft.tokens).argmax(-1).tolist()
    return [best[i] for i, source in enumerate(draft.sources) if source == "skip"]


def test_texts_are_forgotten_but_those_at_hand() -> None:
    decoder = tiny.decoder("llama")
    proposer = mixed(decoder, None)
    contexts = [
        row_of(decoder, decoder.new_cache(64), tiny.prompt(6, i), SamplingParams())
        for i in range(40)
    ]
    for context in contexts:
        proposer.propose(context, 4)
    assert len(proposer._histories.by_id) == MIN_REMEMBERED
    proposer.propose_batch(contexts[:20], [4] * 20)
    known = {id(each.tokens) for each in proposer._histories.by_id.values()}
    assert all(id(context.tokens) in known for context in contexts[:20])
