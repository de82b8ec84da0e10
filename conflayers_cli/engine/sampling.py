"""Logits → the distribution really sampled from; the rules by which drafts are kept.

Order of the transforms as in transformers: repetition penalty, temperature, top-k, top-p, min-p.
Both the draft's and the target's distribution are taken *after* all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from conflayers_cli.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 is greedy, whatever the other settings.

    Raises:
        InputError: a value is outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more"),
            ("seed", self.seed, 0 <= self.seed < 2**63, "0 to 2^63 − 1"),
            ("top-k", self.top_k, self.top_k is None or self.top_k >= 1, "1 or more"),
            ("top-p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "over 0, at most 1"),
            ("min-p", self.min_p, self.min_p is None or 0 <= self.min_p <= 1, "0 to 1"),
            (
                "repetition-penalty",
                self.repetition_penalty,
                0 < self.repetition_penalty < math.inf,
                "over 0 (1 is none)",
            ),
        )
        for name, value, holds, allowed in checks:
            if not holds:
                raise InputError(f"--{name} {value}: allowed is {allowed}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


class Sampler:
    """The settings at work on one sequence: its random numbers and the tokens it has seen.

    Args:
        settings: how tokens are chosen.
        vocabulary: number of logits per position.
        device: where the logits are.
    """

    def __init__(self, settings: Sampling, vocabulary: int, device: torch.device) -> None:
        self.settings = settings
        self.generator = torch.Generator(device=device).manual_seed(settings.seed)
        self._seen: torch.Tensor | None = None
        if settings.repetition_penalty != 1:
            self._seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)

    @property
    def penalises(self) -> bool:
        """Whether scores depend on the tokens seen."""
        return self._seen is not None

    def saw(self, tokens: Iterable[int]) -> None:
        """Note tokens that are part of the text now (prompt included), for the penalty."""
        if self._seen is not None:
            self._seen[list(tokens)] = True

    def scores(self, logits: torch.Tensor, drafted: Sequence[int] = ()) -> torch.Tensor:
        """Logits with the repetition penalty.

        Args:
            logits: ``[T, V]``.
            drafted: tokens assumed after the text so far; row i has seen the first ``i`` of them
                (rows beyond see all).

        Returns:
            ``[T, V]``; the input itself where there is no penalty.
        """
        if self._seen is None:
            return logits
        rows, penalty = logits.shape[0], self.settings.repetition_penalty
        seen = self._seen[: logits.shape[1]].repeat(rows, 1)
        for i, token in enumerate(drafted):
            seen[i + 1 :, token] = True
        logits = logits.float()
        return torch.where(
            seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits
        )

    def distribution(self, logits: torch.Tensor, drafted: Sequence[int] = ()) -> torch.Tensor:
        """Probabilities really sampled from: float32 ``[T, V]`` of logits ``[T, V]``.

        Only for temperatures above 0. ``drafted`` as in :meth:`scores`.
        """
        settings = self.settings
        scores = self.scores(logits, drafted).float()
        # The maximum first: a tiny temperature must not divide logits to infinity.
        scores = (scores - scores.amax(dim=-1, keepdim=True)) / settings.temperature
        if settings.top_k is not None and settings.top_k < scores.shape[-1]:
            least = scores.topk(settings.top_k, dim=-1).values[..., -1:]
            scores = scores.masked_fill(scores < least, float("-inf"))
        probabilities = torch.softmax(scores, dim=-1)
        if settings.top_p is not None and settings.top_p < 1:
            ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
            before = ordered.cumsum(dim=-1) - ordered
            outside = torch.zeros_like(before, dtype=torch.bool)
            outside.scatter_(-1, order, before >= settings.top_p)
            probabilities = _renormalised(probabilities.masked_fill(outside, 0.0))
        if settings.min_p:
            least = probabilities.amax(dim=-1, keepdim=True) * settings.min_p
            probabilities = _renormalised(probabilities.masked_fill(probabilities < least, 0.0))
        return probabilities

    def choose(self, logits: torch.Tensor) -> int:
        """The next token from the logits ``[1, V]`` of the last position."""
        if self.settings.greedy:
            return int(self.scores(logits).argmax(dim=-1))
        return self.draw(self.distribution(logits)[0])

    def draw(self, probabilities: torch.Tensor) -> int:
        """A token from ``[V]`` probabilities (need not be normalised)."""
        return int(torch.multinomial(probabilities, 1, generator=self.generator))

    def uniform(self, count: int) -> list[float]:
        """``count`` random numbers from [0, 1)."""
        device = self.generator.device
        return torch.rand(count, generator=self.generator, device=device).tolist()


def accept_greedy(drafted: Sequence[int], best: Sequence[int]) -> tuple[int, int]:
    """How many drafts stand, and the token that follows them.

    Args:
        drafted: γ drafted tokens.
        best: the full model's choice at each of the γ+1 positions.

    Returns:
        (k, token): the first k drafts equal the model's choice; ``token`` is its own next one.
    """
    kept = 0
    while kept < len(drafted) and drafted[kept] == best[kept]:
        kept += 1
    return kept, best[kept]


def accept_sampled(
    drafted: Sequence[int], target: torch.Tensor, draft: torch.Tensor | None, sampler: Sampler
) -> tuple[int, int]:
    """Speculative sampling (arXiv 2211.17192, algorithm 1): the result has the target's law.

    Args:
        drafted: γ drafted tokens.
        target: p, ``[γ+1, V]``.
        draft: q, ``[γ, V]``; None where the tokens were not sampled (q is one at the token).
        sampler: gives the random numbers.

    Returns:
        (k, token): k drafts stand; ``token`` comes from the residual max(0, p − q) where a draft
        was refused, from p behind the last one where all stand.
    """
    chances = sampler.uniform(len(drafted))
    for i, (token, chance) in enumerate(zip(drafted, chances, strict=True)):
        p = target[i]
        q_token = 1.0 if draft is None else float(draft[i, token])
        if chance * q_token < float(p[token]):
            continue
        if draft is None:
            residual = p.clone()
            residual[token] = 0.0
        else:
            residual = (p - draft[i]).clamp_(min=0.0)
        # p = q up to rounding leaves nothing to sample from; the rule's limit there is p itself.
        return i, sampler.draw(residual if float(residual.sum()) > 0 else p)
    return len(drafted), sampler.draw(target[len(drafted)])


def _renormalised(probabilities: torch.Tensor) -> torch.Tensor:
    return probabilities / probabilities.sum(dim=-1, keepdim=True)
