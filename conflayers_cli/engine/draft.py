"""Drafters: guess the next few tokens cheaply, and say what distribution they came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from .cache import KVCache
from .decoder import Decoder
from .plan import SkipPlan
from .sampling import Sampler


@dataclass(frozen=True)
class Draft:
    """Drafted tokens and where they came from.

    Attributes:
        tokens: γ token ids, possibly none.
        distribution: q, float32 ``[γ, V]``, where they were sampled; None where each was certain
            (greedy), which acceptance treats as q = 1 at the token.
    """

    tokens: tuple[int, ...] = ()
    distribution: torch.Tensor | None = None


@dataclass(frozen=True)
class Context:
    """What a drafter sees: the text so far and the caches behind it.

    Attributes:
        tokens: prompt and output; the last one is not in the cache yet.
        cache: filled for all tokens but the last.
        sampler: how tokens are chosen.
        end_tokens: ids that end the output; nothing needs to be drafted behind one.
    """

    tokens: list[int]
    cache: KVCache
    sampler: Sampler
    end_tokens: frozenset[int] = frozenset()


class Drafter(Protocol):
    """Drafts up to ``limit`` tokens (≥ 1). May write to the cache behind the filled part."""

    @property
    def name(self) -> str: ...

    def draft(self, context: Context, limit: int) -> Draft: ...


@dataclass(frozen=True)
class SkipDrafter:
    """Drafts a chain with the model itself, some sub-layers left out.

    Source: Draft & Verify, arXiv 2309.08168 §3; the stop rule as in SWIFT, arXiv 2410.06916 §4.2.

    Attributes:
        decoder: the model.
        plan: what is left out.
        max_tokens: the most tokens drafted at once.
        stop_probability: the chain ends after the first token whose draft probability is under
            this; 0 never stops early.
    """

    decoder: Decoder
    plan: SkipPlan
    max_tokens: int = 25
    stop_probability: float = 0.8

    @property
    def name(self) -> str:
        return "skip"

    def draft(self, context: Context, limit: int) -> Draft:
        device, sampler = self.decoder.device, context.sampler
        filled = len(context.tokens) - 1
        token = torch.tensor([[context.tokens[-1]]], device=device)
        position = torch.tensor([[filled]], device=device)
        drafted: list[int] = []
        rows: list[torch.Tensor] = []
        for _ in range(min(limit, self.max_tokens)):
            logits = self.decoder.forward(token, position, context.cache, self.plan)[0]
            chosen, probability, row = self._choose(logits, drafted, sampler)
            drafted.append(chosen)
            if row is not None:
                rows.append(row)
            if probability < self.stop_probability or chosen in context.end_tokens:
                break
            token = torch.tensor([[chosen]], device=device)
            position = position + 1
        return Draft(tuple(drafted), torch.stack(rows) if rows else None)

    def _choose(
        self, logits: torch.Tensor, drafted: list[int], sampler: Sampler
    ) -> tuple[int, float, torch.Tensor | None]:
        """(token, its draft probability, q) from the logits ``[1, V]``."""
        if sampler.settings.greedy:
            scores = _last_row(sampler, logits, drafted)
            token = int(scores.argmax())
            if self.stop_probability <= 0:
                return token, 1.0, None
            scores = scores.float()
            return token, float(torch.exp(scores[token] - torch.logsumexp(scores, 0))), None
        many = logits.expand(len(drafted) + 1, -1) if sampler.penalises else logits
        q = sampler.distribution(many, drafted)[-1]
        token = sampler.draw(q)
        return token, float(q[token]), q


def _last_row(sampler: Sampler, logits: torch.Tensor, drafted: list[int]) -> torch.Tensor:
    """Scores ``[V]`` of the position behind all drafted tokens."""
    if not sampler.penalises:
        return logits[-1]
    return sampler.scores(logits.expand(len(drafted) + 1, -1), drafted)[-1]
