"""Speculative output, greedy or sampled, is vanilla's, token for token; the cache is that of a
fresh pass.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.errors import InputError
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import Proposer, SkipProposer
from tests import tiny

MIDDLE = st.sets(st.integers(1, tiny.DEPTH - 2))
PLANS = st.builds(SkipPlan.of, MIDDLE, MIDDLE)
# Mistral sees a window only; Gemma 2 has both kinds of layers.
FAMILIES = st.sampled_from(["llama", "mistral", "gemma2"])

SAMPLINGS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([None, 5]),
    top_p=st.sampled_from([None, 0.9]),
    min_p=st.sampled_from([None, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    seed=st.integers(0, 1000),
)


def output(decoder: Decoder, prompt: list[int], count: int, **more: Any) -> list[int]:
    generation = tiny.generation(decoder, prompt, count, **more)
    tiny.steps_of(generation)
    return generation.output


@settings(max_examples=40)
@given(
    family=FAMILIES,
    plan=PLANS,
    size=st.integers(1, 9),
    stop=st.sampled_from([0.0, 0.3, 0.8]),
    count=st.integers(1, 24),
    length=st.integers(1, 20),
    sampling=SAMPLINGS,
    seed=st.integers(0, 1000),
)
def test_skip_drafts(
    family: str,
    plan: SkipPlan,
    size: int,
    stop: float,
    count: int,
    length: int,
    sampling: SamplingParams,
    seed: int,
) -> None:
    decoder, prompt = tiny.decoder(family), tiny.prompt(length, seed)
    proposer = SkipProposer(decoder, plan, size, stop)
    got = output(decoder, prompt, count, sampling=sampling, proposer=proposer)
    assert got == output(decoder, prompt, count, sampling=sampling)
    assert len(got) == count


@settings(max_examples=25)
@given(
    wrong=st.lists(st.booleans(), min_size=1, max_size=7),
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=5),
    sampling=SAMPLINGS,
)
def test_any_drafts_at_all(wrong: list[bool], sizes: list[int], sampling: SamplingParams) -> None:
    """Drafts right and wrong in any pattern, of any length, none at all included."""
    decoder, prompt, count = tiny.decoder("llama"), tiny.prompt(10, 2), 24
    expected = output(decoder, prompt, count, sampling=sampling)

    def propose(text: list[int]) -> list[int]:
        at = len(text) - len(prompt)
        ahead = expected[at : at + sizes[at % len(sizes)]]
        return [
            (token + wrong[(at + i) % len(wrong)]) % tiny.VOCABULARY
            for i, token in enumerate(ahead)
        ]

    proposer = tiny.Scripted(propose)
    assert output(decoder, prompt, count, sampling=sampling, proposer=proposer) == expected


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotations_that_depend_on_the_length_of_a_pass(kind: str) -> None:
    """Beyond the trained length such a model turns all tokens of a pass by angles that the last
    one decides. Up to it output is exact; a text that could grow beyond it is refused.
    """
    trained = 32
    rope: dict[str, object] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
        rope |= {"original_max_position_embeddings": trained}
    longest = trained if kind == "dynamic" else 4 * trained
    sizes = {"max_position_embeddings": longest, "rope_parameters": rope}
    decoder = Decoder(tiny.build(LlamaConfig(**{**tiny.LLAMA_LIKE, **sizes})))
    assert decoder.exact_positions == trained
    for seed in range(3):
        prompt = tiny.prompt(8, seed)
        proposer = SkipProposer(decoder, SkipPlan.of_layers([2]), 7, 0.0)
        speculative = output(decoder, prompt, trained - 8, proposer=proposer)
        assert speculative == tiny.generated(decoder, prompt, trained - 8)
        with pytest.raises(InputError, match="beyond 32"):
            Generation(decoder, GenerationRequest(prompt, trained - 7), proposer=proposer)


def assert_cache_is_fresh(generation: Generation) -> None:
    """Every filled slot holds what one full pass over the text would have put there."""
    filled = len(generation.tokens) - 1
    decoder = generation.decoder
    fresh: KVCache = decoder.new_cache(filled)
    decoder.prefill(torch.tensor([generation.tokens[:-1]]), fresh)
    for layer, expected in zip(generation.cache.layers, fresh.layers, strict=True):
        for got, want in ((layer.keys, expected.keys), (layer.values, expected.values)):
            torch.testing.assert_close(
                got[:, :, :filled], want[:, :, :filled], rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=1.0, seed=3)])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("plan", [SkipPlan.of_layers([1, 3]), SkipPlan.of([2], [1, 2])])
def test_the_cache_after_every_step(family: str, plan: SkipPlan, sampling: SamplingParams) -> None:
    decoder = tiny.decoder(family)
    proposer = SkipProposer(decoder, plan, 4, 0.0)
    generation = Generation(
        decoder, GenerationRequest(tiny.prompt(9, 4), 24, sampling), proposer=proposer
    )
    drafted = accepted = 0
    for step in generation:
        assert_cache_is_fresh(generation)
        drafted, accepted = drafted + step.drafted, accepted + step.accepted
    assert 0 < accepted < drafted


def test_the_cache_after_drafts_all_kept_and_all_refused() -> None:
    decoder, prompt = tiny.decoder("llama"), tiny.prompt(9, 4)
    expected = output(decoder, prompt, 24)
    for offset, kept in ((0, True), (1, False)):

        def propose(text: list[int], offset: int = offset) -> list[int]:
            at = len(text) - len(prompt)
            return [(t + offset) % tiny.VOCABULARY for t in expected[at : at + 5]]

        proposer: Proposer = tiny.Scripted(propose)
        generation = Generation(decoder, GenerationRequest(prompt, 24), proposer=proposer)
        for step in generation:
            assert step.accepted == (step.drafted if kept else 0)
            assert_cache_is_fresh(generation)
        assert generation.output == expected
