"""Matchness: one parallel pass against the draft token by token."""

import torch

from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.search.matchness import MIN_WINDOW, matchness, window_size
from conflayers_cli.skip_plan import SkipPlan
from tests import tiny


def generation(family: str = "llama", tokens: int = 60, done: int = 40) -> Generation:
    begun = Generation(tiny.decoder(family), GenerationRequest(tiny.prompt(9, 3), tokens))
    while len(begun.output) < done:
        begun.step()
    return begun


def by_hand(text: Generation, plan: SkipPlan, window: int) -> float:
    """Each token drafted alone, on the full model's cache of all that precedes it."""
    decoder, hits = text.decoder, 0
    for at in range(len(text.tokens) - 1 - window, len(text.tokens) - 1):
        cache = decoder.new_cache(len(text.tokens))
        decoder.prefill(torch.tensor([text.tokens[:at]]), cache)
        token = torch.tensor([[text.tokens[at]]])
        logits = decoder.forward(token, torch.tensor([[at]]), cache, plan)
        hits += int(logits.argmax()) == text.tokens[at + 1]
    return hits / window


def test_is_the_share_of_first_draft_tokens_that_agree() -> None:
    for family in ("llama", "gemma2", "gpt2"):
        text = generation(family)
        for plan in (SkipPlan.of_layers([2]), SkipPlan.of([1], [3]), SkipPlan.of_layers([1, 2, 3])):
            assert matchness(text.decoder, plan, text, 20) == by_hand(text, plan, 20), family


def test_nothing_left_out_agrees_everywhere() -> None:
    text = generation()
    assert matchness(text.decoder, SkipPlan(), text, 30) == 1.0


def test_the_text_goes_on_as_if_nothing_had_been_measured() -> None:
    text, undisturbed = generation(), generation()
    matchness(text.decoder, SkipPlan.of_layers([1, 2]), text, 30)
    list(text)
    list(undisturbed)
    assert text.tokens == undisturbed.tokens
    for one, other in zip(text.cache.layers, undisturbed.cache.layers, strict=True):
        filled = len(text.tokens) - 1
        assert torch.equal(one.keys[:, :, :filled], other.keys[:, :, :filled])


def test_a_window_needs_text_before_and_room_behind_it() -> None:
    text = generation()
    assert window_size(text, 30) == 30
    assert window_size(text, 100) == len(text.output) - 1
    assert window_size(generation(done=MIN_WINDOW), 30) == 0
    full = Generation(tiny.decoder("llama"), GenerationRequest(tiny.prompt(470), 40))
    while len(full.output) < 35:
        full.step()
    assert full.cache.capacity == 512
    assert window_size(full, 30) == 0
