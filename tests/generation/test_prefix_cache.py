"""A chat's turns on one cache: each answer is what its whole conversation, read anew, gives."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.errors import InputError
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.prefix_cache import PrefixCache, common_length
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import Proposer, SkipProposer
from conflayers_cli.spec_decode.tree import PAPER_SHAPE
from tests import tiny
from tests.engine import test_bfloat16
from tests.kernels.tape import TapeRecorder
from tests.spec_decode.test_mixed import mixed

PLAN = SkipPlan.of_layers([1, 3])
DRAFTERS: dict[str, Callable[[Decoder], Proposer | None]] = {
    "none": lambda decoder: None,
    "skip": lambda decoder: SkipProposer(decoder, PLAN, 5, 0.0),
    "tree": lambda decoder: SkipProposer(decoder, PLAN, 5, 0.0, PAPER_SHAPE),
    "ngram": lambda decoder: mixed(decoder, None),
    "mixed": lambda decoder: mixed(decoder, PLAN, tree=PAPER_SHAPE),
}


def fresh(decoder: Decoder, prompt: list[int], count: int, **more: Any) -> list[int]:
    """What plain decoding of the whole text gives."""
    generation = tiny.generation(decoder, prompt, count, **more)
    tiny.steps_of(generation)
    return generation.output


def check_turns(decoder: Decoder, proposer: Proposer | None, seed: int, turns: int = 4) -> int:
    """Turns of a chat, some left early, some with earlier parts rendered anew; tokens kept."""
    conversation = PrefixCache(decoder)
    vocabulary = decoder.vocabulary
    text: list[int] = []
    kept = 0
    for turn in range(turns):
        if turn == 2:  # as a template does that leaves thoughts out
            text = text[: len(text) // 2] + text[len(text) // 2 + 2 :]
        text = [*text, *tiny.prompt(7 + turn, seed + turn, vocabulary)]
        generation = conversation.begin(GenerationRequest(text, 16), proposer=proposer)
        kept += generation.num_cached
        for _ in islice(generation, 3 if turn == 1 else None):
            pass
        expected = fresh(decoder, text, 16)
        assert generation.output == expected[: len(generation.output)]
        assert len(generation.output) == 16 or turn == 1
        text = [*text, *generation.output]
    return kept


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2", "gpt-oss", "qwen2-mixed"])
@pytest.mark.parametrize("proposer", DRAFTERS)
def test_every_turn_is_that_of_a_fresh_decode(family: str, proposer: str) -> None:
    decoder = tiny.decoder(family)
    # all but what is new and the last token, and in the third turn what was rendered anew
    assert check_turns(decoder, DRAFTERS[proposer](decoder), seed=5) > 60


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), proposer=st.sampled_from(list(DRAFTERS)))
def test_in_bfloat16_to_the_bit(seed: int, proposer: str) -> None:
    decoder = test_bfloat16.decoder()
    check_turns(decoder, DRAFTERS[proposer](decoder), seed)


def test_with_recorded_passes_while_the_cache_grows() -> None:
    """A longer cache is other memory, which passes recorded before know nothing of."""
    config = LlamaConfig(**{**tiny.LLAMA_LIKE, "max_position_embeddings": 2048})
    decoder = Decoder(tiny.build(config), recorder=TapeRecorder())
    conversation = PrefixCache(decoder)
    proposer = SkipProposer(decoder, PLAN, 4, 0.0)
    text: list[int] = []
    capacities = []
    for turn in range(4):
        text = [*text, *tiny.prompt(220, turn)]
        generation = conversation.begin(GenerationRequest(text, 40), proposer=proposer)
        tiny.steps_of(generation)
        assert generation.output == fresh(decoder, text, 40)
        text = generation.tokens
        capacities.append(generation.cache.capacity)
    assert capacities == [512, 1024, 1024, 2048]


def test_a_longer_text_than_the_cache_holds() -> None:
    decoder = test_bfloat16.decoder()
    conversation = PrefixCache(decoder, limit=1024)
    text = tiny.prompt(480, 1, decoder.vocabulary)
    first = conversation.begin(GenerationRequest(text, 8))
    tiny.steps_of(first)
    text = [*text, *first.output, *tiny.prompt(40, 2, decoder.vocabulary)]
    second = conversation.begin(GenerationRequest(text, 8))
    tiny.steps_of(second)
    assert second.cache.capacity > first.cache.capacity
    assert second.num_cached == 487
    assert second.output == fresh(decoder, text, 8)


@pytest.mark.parametrize("proposer", ["none", "skip", "mixed"])
@pytest.mark.parametrize("passes", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("written", [False, True])
def test_an_interruption_around_a_pass(
    monkeypatch: pytest.MonkeyPatch, proposer: str, passes: int, written: bool
) -> None:
    """Whatever Ctrl-C cut off, what is said to be held is held: nothing wrong is built upon it."""
    decoder = tiny.decoder("gemma2")
    conversation = PrefixCache(decoder)
    text = tiny.prompt(9, passes)
    tiny.steps_of(conversation.begin(GenerationRequest(text, 6)))
    text = [*conversation.cached_tokens, *tiny.prompt(11, passes + 1)]
    left, drafts = passes, DRAFTERS[proposer](decoder)
    run = decoder.runner.run

    def interrupted(*arguments: object, **more: object) -> torch.Tensor:
        nonlocal left
        left -= 1
        if not left and not written:
            raise KeyboardInterrupt
        logits = run(*arguments, **more)  # type: ignore[arg-type]
        if not left:
            raise KeyboardInterrupt
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(decoder.runner, "run", interrupted)
        cut = conversation.begin(GenerationRequest(text, 40), proposer=drafts)
        with pytest.raises(KeyboardInterrupt):
            tiny.steps_of(cut)
    assert conversation.cached_tokens == cut.tokens[:-1] if cut.output else text[: cut.num_cached]
    text = [*text, *cut.output, *tiny.prompt(5, passes + 2)]
    assert cut.num_cached > 0
    again = conversation.begin(GenerationRequest(text, 12), proposer=drafts)
    tiny.steps_of(again)
    assert again.output == fresh(decoder, text, 12)


def test_only_what_is_new_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny.decoder("llama")
    conversation = PrefixCache(decoder)
    first = conversation.begin(GenerationRequest(tiny.prompt(30), 4))
    tiny.steps_of(first)
    read: list[int] = []
    prefill = decoder.prefill

    def spying(tokens: torch.Tensor, *arguments: object, **more: object) -> torch.Tensor:
        read.append(tokens.shape[1])
        return prefill(tokens, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(decoder, "prefill", spying)
    # the answer's last token has not been run yet
    tiny.steps_of(conversation.begin(GenerationRequest([*first.tokens, 7, 8], 1)))
    tiny.steps_of(conversation.begin(GenerationRequest([*first.tokens, 7, 8], 1)))
    assert read == [3, 1]


def test_sampled_answers_and_penalties_know_the_whole_text() -> None:
    decoder = tiny.decoder("llama")
    sampling = SamplingParams(temperature=0.9, repetition_penalty=1.5, seed=4)
    conversation = PrefixCache(decoder)
    first = conversation.begin(GenerationRequest(tiny.prompt(20), 12))
    tiny.steps_of(first)
    text = [*first.tokens, 3, 4]
    second = conversation.begin(GenerationRequest(text, 20, sampling))
    tiny.steps_of(second)
    assert second.num_cached > 20
    assert second.output == fresh(decoder, text, 20, sampling=sampling)


def test_a_refused_text_costs_nothing_of_what_is_held() -> None:
    conversation = PrefixCache(tiny.decoder("llama"))
    tiny.steps_of(conversation.begin(GenerationRequest(tiny.prompt(8), 4)))
    held = conversation.cached_tokens
    with pytest.raises(InputError, match="token id 100"):
        conversation.begin(GenerationRequest([*held, 100], 4))
    with pytest.raises(InputError, match="no tokens"):
        conversation.begin(GenerationRequest([], 4))
    assert conversation.cached_tokens == held != []


def test_a_cache_that_does_not_fit() -> None:
    decoder = tiny.decoder("llama")
    cache = decoder.new_cache(100)
    for num_cached, memory in ((5, cache), (-1, cache), (1, None)):
        with pytest.raises(ValueError, match="of 5 prompt tokens"):
            Generation(decoder, GenerationRequest([1] * 5, 2), cache=memory, num_cached=num_cached)
    with pytest.raises(ValueError, match="positions for a text of"):
        Generation(decoder, GenerationRequest([1] * 5, cache.capacity), cache=cache)


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2, 3], [1, 2], 2), ([1, 5], [1, 6], 1), ([2], [1], 0)],
)
def test_common_length(one: list[int], other: list[int], shared: int) -> None:
    assert common_length(one, other) == shared
