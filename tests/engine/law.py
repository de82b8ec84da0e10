"""A model small enough that the law of its sampled output can be written down.

With a vocabulary of eight, all 512 continuations of a prompt can be listed with their
probabilities: from the model's own full passes, and transformers' own warpers. Thousands of
generations must then follow that law.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

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

from conflayers_cli.engine.decoder import FULL, Decoder
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.draft_store import DraftStore
from conflayers_cli.spec_decode.proposer import Proposer
from tests import tiny

VOCABULARY = 8
PROMPT = (1, 2, 3)
RUNS = 4000
LENGTH = 3
SETTINGS = {
    "temperature 0.7": SamplingParams(0.7),
    "top-p 0.8": SamplingParams(1.0, top_p=0.8),
    "top-k 5": SamplingParams(1.0, top_k=5),
    "min-p 0.15": SamplingParams(1.0, min_p=0.15),
    "repetition penalty 1.3": SamplingParams(1.0, repetition_penalty=1.3),
    "all": SamplingParams(0.9, 6, 0.9, 0.02, 1.2),
}
PLAN = SkipPlan.of_layers([1])


@functools.cache
def model() -> Any:
    sizes = {"vocab_size": VOCABULARY, "num_hidden_layers": 3}
    return tiny.build(LlamaConfig(**{**tiny.LLAMA_LIKE, **sizes}), seed=2, gain=0.8)


Written = tuple[int, SkipPlan]
"""A token in the cache, and which plan put it there."""


class Account(KVCache):
    """A cache that knows what stands in its slots."""

    def __init__(self, depth: int, batch: int, capacity: int) -> None:
        super().__init__(depth, batch, capacity)
        self.written: dict[int, Written] = {}

    def move(self, source: int, target: int) -> None:
        super().move(source, target)
        self.written[target] = self.written[source]


class Remembering(Decoder):
    """Computes the logits behind a text once: few texts, thousands of generations.

    A text is what a token sees: the slots below its position, and itself.
    """

    def __init__(self, model: Any) -> None:
        self._known: dict[tuple[Written, ...], torch.Tensor] = {}
        super().__init__(model)

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        return Account(self.depth, batch, capacity)

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        cache: KVCache,
        plan: SkipPlan = FULL,
        *,
        slots: torch.Tensor | None = None,
        last_only: bool = False,
    ) -> torch.Tensor:
        assert isinstance(cache, Account)
        places = (positions if slots is None else slots)[0].tolist()
        new = [(token, plan) for token in tokens[0].tolist()]
        cache.written.update(zip(places, new, strict=True))
        seen = [
            (*(cache.written[slot] for slot in range(position)), own)
            for position, own in zip(positions[0].tolist(), new, strict=True)
        ]
        for text in seen:
            if text not in self._known:
                self._known[text] = self._compute(text)
        logits = torch.stack([self._known[text] for text in seen])[None]
        return logits[:, -1:] if last_only else logits

    def choose(self, *args: Any, **more: Any) -> None:
        """Everything goes through the logits."""

    def _compute(self, text: Sequence[Written]) -> torch.Tensor:
        cache, begin, logits = self.new_cache(len(text)), 0, torch.empty(0)
        for plan, group in itertools.groupby(text, key=lambda written: written[1]):
            tokens = torch.tensor([[token for token, _ in group]])
            end = begin + tokens.shape[1]
            logits = super().forward(tokens, torch.arange(begin, end)[None], cache, plan)
            begin = end
        return logits[0, -1]


@functools.cache
def remembering() -> Remembering:
    return Remembering(model())


@functools.cache
def next_token(text: tuple[int, ...], setting: SamplingParams) -> torch.Tensor:
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
def law(setting: SamplingParams) -> dict[tuple[int, ...], float]:
    probabilities: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(LENGTH):
        probabilities = {
            (*start, token): probability * chance
            for start, probability in probabilities.items()
            for token, chance in enumerate(next_token(PROMPT + start, setting).tolist())
        }
    return probabilities


def start_of(generation: Generation) -> tuple[tuple[int, ...], int, int]:
    """(first three tokens, drafts, drafts kept)."""
    drafted = accepted = 0
    for step in generation:
        drafted, accepted = drafted + step.drafted, accepted + step.accepted
        if len(generation.output) >= LENGTH:
            break
    return tuple(generation.output[:LENGTH]), drafted, accepted


def sample(
    setting: SamplingParams, proposer: Proposer | None, store: DraftStore | None = None
) -> tuple[Counter[tuple[int, ...]], float | None]:
    """(counts of the starts, share of drafts kept)."""
    counts: Counter[tuple[int, ...]] = Counter()
    drafted = accepted = 0
    for seed in range(RUNS):
        request = GenerationRequest(PROMPT, 4, replace(setting, seed=seed), store=store)
        generation = Generation(remembering(), request, proposer=proposer)
        tokens, more_drafted, more_accepted = start_of(generation)
        counts[tokens] += 1
        drafted, accepted = drafted + more_drafted, accepted + more_accepted
    return counts, accepted / drafted if drafted else None
