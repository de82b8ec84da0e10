"""Tokens in the situation of a first drafted token, several drafts of them as rows."""

import functools

import pytest
import torch

from conflayers_cli.engine.layer_skipping import LayerCall
from conflayers_cli.search.corpus import Continuation
from conflayers_cli.search.strategies import knapsack_window as module
from conflayers_cli.search.strategies.knapsack_window import TokenWindow
from conflayers_cli.skip_plan import SkipPlan
from tests import tiny

LENGTHS = ((9, 30), (23, 17), (14, 25))
"""Tokens of prompt and output; longer than the families' sliding windows."""


@functools.cache
def samples(family: str) -> tuple[Continuation, ...]:
    decoder = tiny.decoder(family)
    found = []
    for seed, (prompt, output) in enumerate(LENGTHS):
        tokens = tiny.prompt(prompt, seed)
        found.append(Continuation(tuple(tokens), tuple(tiny.generated(decoder, tokens, output))))
    return tuple(found)


def plain_states(family: str, at: TokenWindow) -> tuple[torch.Tensor, torch.Tensor]:
    """What transformers itself makes of the window's tokens, each alone at the end of its text.

    Returns:
        States after every layer, ``[L, T, d]``, and logits ``[T, V]``.
    """
    decoder, states, logits = tiny.decoder(family), [], []
    for token, position in zip(at.tokens[0].tolist(), at.positions[0].tolist(), strict=True):
        texts = [(*s.prompt, *s.output) for s in samples(family)]
        (text,) = [t for t in texts if len(t) > position and t[position] == token][:1]
        seen: list[torch.Tensor] = []

        def keep(
            m: object, args: object, out: torch.Tensor, into: list[torch.Tensor] = seen
        ) -> None:
            into.append((out[0] if isinstance(out, tuple) else out)[0, -1])

        handles = [layer.register_forward_hook(keep) for layer in decoder.stack.layers]
        with torch.inference_mode(), decoder.plain() as model:
            ids = torch.tensor([text[: position + 1]])
            logits.append(model(input_ids=ids, use_cache=False).logits[0, -1])
        for handle in handles:
            handle.remove()
        states.append(torch.stack(seen))
    return torch.stack(states, dim=1), torch.stack(logits)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_full_models_states_and_choices_are_its_own(family: str) -> None:
    decoder = tiny.decoder(family)
    window = TokenWindow(decoder, samples(family)[:1], 10)
    seen: list[torch.Tensor] = []

    def run(i: int, hidden: torch.Tensor, layer: LayerCall) -> torch.Tensor:
        # three rows, of which the middle one is the model's: rows must not see each other
        rows = torch.cat([hidden.flip(1), hidden, 2 * hidden])
        seen.append(layer(rows)[1])
        return seen[-1][None]

    window.forward(run)
    states, logits = plain_states(family, window)
    torch.testing.assert_close(torch.stack(seen), states, atol=2e-4, rtol=1e-3)
    last = seen[-1]
    choices = window.choices(torch.stack([last.flip(0), last]))
    assert choices.tolist() == [logits.argmax(-1).flip(0).tolist(), logits.argmax(-1).tolist()]
    assert choices[1].equal(window.following), "the text is the model's own greedy output"


def test_texts_side_by_side_are_as_each_alone() -> None:
    for family in ("llama", "gemma3"):
        decoder = tiny.decoder(family)
        window = TokenWindow(decoder, samples(family), 12)
        last = torch.empty(0)

        def run(i: int, hidden: torch.Tensor, layer: LayerCall) -> torch.Tensor:
            nonlocal last
            last = layer(hidden)
            return last

        window.forward(run)
        states, _ = plain_states(family, window)
        torch.testing.assert_close(last[0], states[-1], atol=2e-4, rtol=1e-3)
        assert window.choices(last)[0].equal(window.following)


def test_tokens_are_spread_over_all_texts_and_all_of_the_output() -> None:
    texts = samples("llama")
    window = TokenWindow(tiny.decoder("llama"), texts, 12)
    assert window.size == 12
    at = window.positions[0].tolist()
    for i, text in enumerate(texts):
        own = at[4 * i : 4 * i + 4]
        first, last = len(text.prompt), len(text.prompt) + len(text.output) - 2
        assert own == sorted(set(own))
        assert first <= own[0] < first + len(text.output) / 4
        assert last - len(text.output) / 4 < own[-1] <= last
        whole = (*text.prompt, *text.output)
        assert window.tokens[0, 4 * i : 4 * i + 4].tolist() == [whole[p] for p in own]
        assert window.following[4 * i : 4 * i + 4].tolist() == [whole[p + 1] for p in own]


def test_short_texts_give_what_they_have_and_too_few_tokens_leave_texts_out() -> None:
    decoder = tiny.decoder("llama")
    short = Continuation(samples("llama")[0].prompt, samples("llama")[0].output[:4])
    assert TokenWindow(decoder, [short], 12).size == 3
    assert TokenWindow(decoder, [Continuation((1, 2), (3,)), short], 12).size == 3
    assert TokenWindow(decoder, samples("llama"), 2).size == 2


def test_the_bound_holds_back_states_and_choices_stay_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    window = TokenWindow(tiny.decoder("llama"), samples("llama"), 12)
    states = torch.randn(5, 12, 32, generator=torch.Generator().manual_seed(0))
    at_once, choices = window.states_at_once, window.choices(states)
    monkeypatch.setattr(module, "MAX_BYTES", module.MAX_BYTES // 4)
    assert at_once // 4 - 1 <= window.states_at_once <= at_once // 4
    monkeypatch.setattr(module, "MAX_BYTES", 1)
    assert window.states_at_once == 1
    assert window.choices(states).equal(choices)


def test_the_model_is_itself_again_after_an_error() -> None:
    decoder = tiny.decoder("llama")
    window = TokenWindow(decoder, samples("llama"), 4)
    ids, positions = torch.tensor([[5, 6, 7]]), torch.arange(3)[None]
    before = decoder.forward(ids, positions, decoder.new_cache(8))

    def fail(i: int, hidden: torch.Tensor, layer: LayerCall) -> torch.Tensor:
        with decoder.stack.without(SkipPlan.of(attention=[i])):
            if i == 2:
                raise RuntimeError("stop")
            return layer(hidden)

    with pytest.raises(RuntimeError, match="stop"):
        window.forward(fail)
    assert decoder.forward(ids, positions, decoder.new_cache(8)).equal(before)


def test_attention_is_reused_for_the_same_hidden_states_only() -> None:
    decoder = tiny.decoder("llama")
    window = TokenWindow(decoder, samples("llama"), 4)

    def run(i: int, hidden: torch.Tensor, layer: LayerCall) -> torch.Tensor:
        others = [hidden, hidden.flip(1), hidden.flip(1), hidden]
        expected = [layer(each) for each in others]
        with decoder.stack.caching_attention(i):
            for each, known in zip(others, expected, strict=True):
                assert layer(each).equal(known)
        return expected[0]

    window.forward(run)
