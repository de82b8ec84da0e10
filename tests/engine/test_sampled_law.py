"""Sampled output, end to end: three tokens' law against the target's, enumerated.

With a vocabulary of eight, all 512 continuations of a prompt can be listed with their
probabilities: from the model's own full passes, and transformers' own warpers. Thousands of
speculative generations must then follow that law.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from transformers import (
    LlamaConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from conflayers_cli.engine import decode
from conflayers_cli.engine.cache import KVCache
from conflayers_cli.engine.decode import Generation
from conflayers_cli.engine.decoder import FULL, Decoder
from conflayers_cli.engine.draft import Drafter, SkipDrafter
from conflayers_cli.engine.plan import SkipPlan
from conflayers_cli.engine.sampling import Sampler, Sampling, accept_sampled
from tests import tiny
from tests.tiny import chi_square

VOCABULARY = 8
PROMPT = (1, 2, 3)
RUNS = 4000
LENGTH = 3
SETTINGS = {
    "temperature 0.7": Sampling(0.7),
    "top-p 0.8": Sampling(1.0, top_p=0.8),
    "top-k 5": Sampling(1.0, top_k=5),
    "min-p 0.15": Sampling(1.0, min_p=0.15),
    "repetition penalty 1.3": Sampling(1.0, repetition_penalty=1.3),
}
TRUNCATED = ("top-p 0.8", "top-k 5", "min-p 0.15")
PLAN = SkipPlan.of_layers([1])


@functools.cache
def model() -> Any:
    sizes = {"vocab_size": VOCABULARY, "num_hidden_layers": 3}
    return tiny.build(LlamaConfig(**{**tiny.LLAMA_LIKE, **sizes}), seed=2, gain=0.8)


class Remembering(Decoder):
    """Computes the logits of a text once: few texts, thousands of generations.

    It keeps account of which token stands at which slot of a cache, and which plan put it there.
    """

    def __init__(self, model: Any) -> None:
        self._known: dict[object, torch.Tensor] = {}
        self._slots: WeakKeyDictionary[KVCache, list[tuple[int, SkipPlan]]] = WeakKeyDictionary()
        super().__init__(model)

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        cache: KVCache,
        plan: SkipPlan = FULL,
        *,
        last_only: bool = False,
    ) -> torch.Tensor:
        slots, count = self._slots.setdefault(cache, []), tokens.shape[1]
        del slots[int(positions[0, 0]) :]
        slots += [(token, plan) for token in tokens[0].tolist()]
        key = (*slots, count)
        if key not in self._known:
            self._known[key] = self._compute(slots)[:, -count:]
        logits = self._known[key]
        return logits[:, -1:] if last_only else logits

    def _compute(self, slots: Sequence[tuple[int, SkipPlan]]) -> torch.Tensor:
        cache, begin, logits = self.new_cache(len(slots)), 0, torch.empty(0)
        for plan, group in itertools.groupby(slots, key=lambda slot: slot[1]):
            tokens = torch.tensor([[token for token, _ in group]])
            end = begin + tokens.shape[1]
            logits = super().forward(tokens, torch.arange(begin, end)[None], cache, plan)
            begin = end
        return logits


@functools.cache
def remembering() -> Remembering:
    return Remembering(model())


@functools.cache
def next_token(text: tuple[int, ...], setting: Sampling) -> torch.Tensor:
    """The target's distribution behind a text, by transformers alone."""
    chain = LogitsProcessorList()
    if setting.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(setting.repetition_penalty))
    chain.append(TemperatureLogitsWarper(setting.temperature))
    if setting.top_k:
        chain.append(TopKLogitsWarper(setting.top_k))
    if setting.top_p:
        chain.append(TopPLogitsWarper(setting.top_p))
    if setting.min_p:
        chain.append(MinPLogitsWarper(setting.min_p))
    ids = torch.tensor([text])
    with remembering().plain() as plain, torch.inference_mode():
        logits = plain(ids, use_cache=False).logits[:, -1]
    return torch.softmax(chain(ids, logits).double(), dim=-1)[0]


@functools.cache
def law(setting: Sampling) -> dict[tuple[int, ...], float]:
    probabilities: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(LENGTH):
        probabilities = {
            (*start, token): probability * chance
            for start, probability in probabilities.items()
            for token, chance in enumerate(next_token(PROMPT + start, setting).tolist())
        }
    return probabilities


def start_of(generation: Generation) -> tuple[tuple[int, ...], int, int]:
    """(first three tokens, drafts, drafts kept). Where we stop does not touch what was drawn."""
    drafted = accepted = 0
    for step in generation:
        drafted, accepted = drafted + step.drafted, accepted + step.accepted
        if len(generation.output) >= LENGTH:
            break
    return tuple(generation.output[:LENGTH]), drafted, accepted


def sample(
    setting: Sampling, drafter: Drafter | None
) -> tuple[Counter[tuple[int, ...]], float | None]:
    """(counts of the starts, share of drafts kept)."""
    counts: Counter[tuple[int, ...]] = Counter()
    drafted = accepted = 0
    for seed in range(RUNS):
        own_seed = Sampling(**{**vars(setting), "seed": seed})
        generation = Generation(
            remembering(), PROMPT, max_new_tokens=4, sampling=own_seed, drafter=drafter
        )
        tokens, more_drafted, more_accepted = start_of(generation)
        counts[tokens] += 1
        drafted, accepted = drafted + more_drafted, accepted + more_accepted
    return counts, accepted / drafted if drafted else None


def skip(plan: SkipPlan, stop_probability: float = 0.0) -> SkipDrafter:
    return SkipDrafter(remembering(), plan, max_tokens=2, stop_probability=stop_probability)


each_setting = pytest.mark.parametrize("name", SETTINGS)


@each_setting
def test_with_a_layer_left_out(name: str) -> None:
    counts, share = sample(SETTINGS[name], skip(PLAN))
    assert share is not None and 0.2 < share < 0.95
    assert chi_square(counts, law(SETTINGS[name])) > 1e-4


def test_with_chains_that_end_at_unlikely_tokens() -> None:
    """How far a draft goes depends on what was drawn, and must not show in the output."""
    setting = SETTINGS["temperature 0.7"]
    counts, _ = sample(setting, skip(PLAN, stop_probability=0.4))
    assert chi_square(counts, law(setting)) > 1e-4


@each_setting
def test_all_drafts_accepted(name: str) -> None:
    """Drafts by the full model itself: q is p, but for the rounding of other passes."""
    counts, share = sample(SETTINGS[name], skip(FULL))
    assert share is not None and share > 0.999
    assert chi_square(counts, law(SETTINGS[name])) > 1e-4


@pytest.mark.parametrize("name", TRUNCATED)
def test_all_drafts_refused(name: str) -> None:
    """The draft is the least likely token, which the target cuts away."""

    def least(text: list[int]) -> list[int]:
        first = int(next_token(tuple(text), SETTINGS[name]).argmin())
        return [first, int(next_token((*text, first), SETTINGS[name]).argmin())]

    counts, share = sample(SETTINGS[name], tiny.Scripted(least))
    assert share == 0
    assert chi_square(counts, law(SETTINGS[name])) > 1e-4


def test_without_drafts() -> None:
    counts, share = sample(SETTINGS["temperature 0.7"], None)
    assert share is None
    assert chi_square(counts, law(SETTINGS["temperature 0.7"])) > 1e-4


def test_a_wrong_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sample with the residual replaced by p itself."""
    right = accept_sampled

    def wrong(
        drafted: Sequence[int], p: torch.Tensor, q: torch.Tensor | None, sampler: Sampler
    ) -> tuple[int, int]:
        kept, token = right(drafted, p, q, sampler)
        return kept, token if kept == len(drafted) else sampler.draw(p[kept])

    monkeypatch.setattr(decode, "accept_sampled", wrong)
    counts, _ = sample(SETTINGS["temperature 0.7"], skip(PLAN))
    assert chi_square(counts, law(SETTINGS["temperature 0.7"])) < 1e-8


@each_setting
def test_the_remembering_decoder_changes_nothing(name: str) -> None:
    """With equal seeds, the decoder itself says the same, step by step."""
    plain = Decoder(copy.deepcopy(model()))
    for seed in range(10):
        setting = Sampling(**{**vars(SETTINGS[name]), "seed": seed})
        starts = [
            start_of(
                Generation(
                    decoder,
                    PROMPT,
                    max_new_tokens=4,
                    sampling=setting,
                    drafter=SkipDrafter(decoder, PLAN, 2, 0.0),
                )
            )
            for decoder in (plain, remembering())
        ]
        assert starts[0] == starts[1]
