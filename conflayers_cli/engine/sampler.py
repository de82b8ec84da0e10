"""Logits → the distribution really sampled from.

Order of the transforms as in transformers: repetition penalty, temperature, top-k, top-p, min-p.
Both the draft's and the target's distribution are taken *after* all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from conflayers_cli.engine.argmax import INVALID_TOKEN, greedy_tokens
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.utils.distributed import agreed

LEAST_SCALE = 1e-30
"""What scores are divided by at the least: float32 has few smaller numbers."""


class Sampler:
    """The settings at work on one sequence: its random numbers and the tokens it has seen.

    Args:
        settings: how tokens are chosen.
        vocabulary: number of logits per position.
        device: where the logits are.
    """

    def __init__(self, settings: SamplingParams, vocabulary: int, device: torch.device) -> None:
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

    def scores(
        self,
        logits: torch.Tensor,
        drafted: Sequence[int] = (),
        parents: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Logits with the repetition penalty.

        Args:
            logits: ``[T, V]``, one row more than there are drafts: row 0 stands behind the text.
            drafted: tokens assumed after the text so far; row i + 1 has seen ``drafted[i]`` and
                what the row it stands behind has seen.
            parents: that row, ≤ i, for each draft; None: each stands behind the one before it.

        Returns:
            ``[T, V]``; the input itself where there is no penalty.
        """
        if self._seen is None:
            return logits
        rows = logits.shape[0]
        # Beyond these bounds numbers would overflow, and nothing else be any different.
        penalty = min(max(self.settings.repetition_penalty, LEAST_SCALE), 1 / LEAST_SCALE)
        seen = self._seen[: logits.shape[1]].repeat(rows, 1)
        behind = range(len(drafted)) if parents is None else parents
        for row, (token, parent) in enumerate(zip(drafted, behind, strict=True), 1):
            seen[row] = seen[parent]
            seen[row, token] = True
        logits = logits.float()
        return torch.where(
            seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits
        )

    def distribution(
        self,
        logits: torch.Tensor,
        drafted: Sequence[int] = (),
        parents: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Probabilities really sampled from: float32 ``[T, V]`` of logits ``[T, V]``; all of a
        row's NaN where its logits are not numbers.

        Only for temperatures above 0. ``drafted`` and ``parents`` as in :meth:`scores`.
        """
        settings = self.settings
        scores = self.scores(logits, drafted, parents).float()
        # The maximum first: a tiny temperature must not divide logits to infinity.
        scores = scores - scores.amax(dim=-1, keepdim=True)
        scores = scores / max(settings.temperature, LEAST_SCALE)
        if settings.top_k is not None and settings.top_k < scores.shape[-1]:
            least = scores.topk(settings.top_k, dim=-1).values[..., -1:]
            scores = scores.masked_fill(scores < least, float("-inf"))
        probabilities = torch.softmax(scores, dim=-1)
        if settings.top_p is not None and settings.top_p < 1:
            ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
            before = ordered.cumsum(dim=-1) - ordered
            outside = torch.zeros_like(before, dtype=torch.bool)
            outside.scatter_(-1, order, before >= settings.top_p)
            # On a GPU sums in order differ in their last bits from one time to the next.
            probabilities = agreed(renormalised(probabilities.masked_fill(outside, 0.0)))
        if settings.min_p:
            least = probabilities.amax(dim=-1, keepdim=True) * settings.min_p
            probabilities = renormalised(probabilities.masked_fill(probabilities < least, 0.0))
        return probabilities

    def choose(self, logits: torch.Tensor) -> int:
        """The next token from the logits ``[1, V]`` of the last position, or `INVALID_TOKEN`."""
        if self.settings.greedy:
            return int(greedy_tokens(self.scores(logits)))
        return self.draw(self.distribution(logits)[0])

    def draw(self, probabilities: torch.Tensor) -> int:
        """A token from ``[V]`` probabilities (need not be normalised); `INVALID_TOKEN` of NaN.

        By the inverse of their sums: an eighteenth of what ``multinomial`` takes on a CPU.
        Sums in float64 keep the tail; a token of probability 0 adds nothing and is never the first
        beyond a threshold.
        """
        sums = probabilities.cumsum(dim=-1, dtype=torch.float64)
        shape, device = (1,), self.generator.device
        uniform = torch.rand(shape, generator=self.generator, device=device, dtype=torch.float64)
        place = torch.searchsorted(sums, uniform * sums[-1:], right=True)
        # Rounding up to the whole sum is as good as impossible, and would be no token at all.
        last = torch.searchsorted(sums, sums[-1:])
        token = torch.minimum(place, last).masked_fill_(sums[-1:].isnan(), INVALID_TOKEN)
        return int(agreed(token))

    def draw_distinct(self, probabilities: torch.Tensor, count: int) -> list[int]:
        """``count`` tokens drawn one after another from ``[V]`` probabilities, none twice.

        As many must have a probability over 0 (they need not be normalised).
        """
        drawn: list[int] = torch.multinomial(
            probabilities, count, generator=self.generator
        ).tolist()
        return drawn

    def uniform(self, count: int) -> torch.Tensor:
        """``count`` random numbers from [0, 1), float32."""
        return torch.rand(count, generator=self.generator, device=self.generator.device)


def renormalised(probabilities: torch.Tensor) -> torch.Tensor:
    """Probabilities ``[..., V]`` that sum to one again."""
    return probabilities / probabilities.sum(dim=-1, keepdim=True)
