"""Logits → the distribution that tokens are sampled from.

Order of the transforms as in transformers: repetition penalty, temperature, top-k, top-p, min-p.
Both the draft's and the target's distribution are taken *after* all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from conflayers_cli.engine.argmax import INVALID_TOKEN, greedy_tokens
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.utils.distributed import broadcast_rank0

MIN_SCALE = 1e-30
"""Scores are divided by no less: float32 has few smaller numbers."""


class Sampler:
    """Sampling of one sequence: its random numbers and the tokens it has seen.

    ``vocabulary`` is the number of logits per position, ``device`` that of the logits.
    """

    def __init__(self, settings: SamplingParams, vocabulary: int, device: torch.device) -> None:
        self.settings = settings
        self.generator = torch.Generator(device=device).manual_seed(settings.seed)
        self._seen: torch.Tensor | None = None
        if settings.repetition_penalty != 1:
            self._seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)

    @property
    def has_penalty(self) -> bool:
        """Whether scores depend on the tokens seen."""
        return self._seen is not None

    def mark_seen(self, tokens: Iterable[int]) -> None:
        """Tokens that are part of the text now (prompt included), for the penalty."""
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
            logits: ``[T, V]``, one more than there are drafted tokens: logits 0 follow the text.
            drafted: tokens assumed after the text; logits i + 1 follow ``drafted[i]`` and what the
                logits of its parent follow.
            parents: of each drafted token the index of its parent's logits, ≤ i; None: a chain.

        Returns:
            ``[T, V]``; the input itself where there is no penalty.
        """
        if self._seen is None:
            return logits
        # Beyond these bounds numbers would overflow, and nothing else be any different.
        penalty = min(max(self.settings.repetition_penalty, MIN_SCALE), 1 / MIN_SCALE)
        seen = self._seen[: logits.shape[1]].repeat(logits.shape[0], 1)
        parents = range(len(drafted)) if parents is None else parents
        for row, (token, parent) in enumerate(zip(drafted, parents, strict=True), 1):
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
        """Probabilities float32 ``[T, V]`` of logits ``[T, V]``; NaN where those are not finite.

        Only for temperatures above 0. ``drafted`` and ``parents`` as in :meth:`scores`.
        """
        settings = self.settings
        scores = self.scores(logits, drafted, parents).float()
        # The maximum first: a tiny temperature must not divide logits to infinity.
        scores = scores - scores.amax(dim=-1, keepdim=True)
        scores = scores / max(settings.temperature, MIN_SCALE)
        if settings.top_k is not None and settings.top_k < scores.shape[-1]:
            least = scores.topk(settings.top_k, dim=-1).values[..., -1:]
            scores = scores.masked_fill(scores < least, float("-inf"))
        probabilities = torch.softmax(scores, dim=-1)
        if settings.top_p is not None and settings.top_p < 1:
            ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
            before = ordered.cumsum(dim=-1) - ordered
            outside = torch.zeros_like(before, dtype=torch.bool)
            outside.scatter_(-1, order, before >= settings.top_p)
            # On a GPU cumulative sums differ in their last bits from one time to the next.
            probabilities = broadcast_rank0(renormalize(probabilities.masked_fill(outside, 0.0)))
        if settings.min_p:
            least = probabilities.amax(dim=-1, keepdim=True) * settings.min_p
            probabilities = renormalize(probabilities.masked_fill(probabilities < least, 0.0))
        return probabilities

    def choose(self, logits: torch.Tensor) -> int:
        """The next token from the logits ``[1, V]`` of the last position, or `INVALID_TOKEN`."""
        if self.settings.greedy:
            return int(greedy_tokens(self.scores(logits)))
        return self.draw(self.distribution(logits)[0])

    def draw(self, probabilities: torch.Tensor) -> int:
        """A token from ``[V]`` probabilities (need not be normalised); `INVALID_TOKEN` of NaN.

        By inverse transform sampling: an eighteenth of what ``multinomial`` takes on a CPU. Sums in
        float64 keep the tail; a token of probability 0 is never the first beyond a threshold.
        """
        sums = probabilities.cumsum(dim=-1, dtype=torch.float64)
        shape, device = (1,), self.generator.device
        uniform = torch.rand(shape, generator=self.generator, device=device, dtype=torch.float64)
        token = torch.searchsorted(sums, uniform * sums[-1:], right=True)
        # Should rounding reach the whole sum, the last token with a probability is taken.
        last = torch.searchsorted(sums, sums[-1:])
        token = torch.minimum(token, last).masked_fill_(sums[-1:].isnan(), INVALID_TOKEN)
        return int(broadcast_rank0(token))

    def draw_distinct(self, probabilities: torch.Tensor, count: int) -> list[int]:
        """``count`` different tokens from ``[V]`` probabilities (need not be normalised), of which
        at least as many are above 0."""
        drawn: list[int] = torch.multinomial(
            probabilities, count, generator=self.generator
        ).tolist()
        return drawn

    def uniform(self, count: int) -> torch.Tensor:
        """``count`` random numbers from [0, 1), float32."""
        return torch.rand(count, generator=self.generator, device=self.generator.device)


def renormalize(probabilities: torch.Tensor) -> torch.Tensor:
    """Probabilities ``[..., V]`` scaled to a sum of one."""
    return probabilities / probabilities.sum(dim=-1, keepdim=True)
