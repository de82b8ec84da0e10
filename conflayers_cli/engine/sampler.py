"""Logits → tokens: the likeliest one, or one sampled by a race that drafts can't change.

Order of the transforms as in transformers: repetition penalty, temperature, top-k, top-p, min-p.
What a caller adds to the logits (`LogitAdjustments`) comes behind the repetition penalty.

A token is sampled as the winner of a race (drafter-invariant speculative decoding, Daliri et al.,
arXiv 2408.07978): ``argmax_i p_i / E_i``, whose exponentials E depend on the text's seed, its
prompt, the position and the token alone. That is a sample of p. A draft races with the same E and
its own probabilities, so it mostly names the same winner; it is accepted where it does. In
logarithms, and without normalising p: the greatest of ``logit_i - temperature * log E_i``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from conflayers_cli.engine.argmax import float_row, greedy_tokens, most_likely
from conflayers_cli.engine.noise import BLOCK, ExponentialNoise, stream_key
from conflayers_cli.engine.race import SCALES, Race, dense_winners
from conflayers_cli.sampling_params import NO_ADJUSTMENTS, LogitAdjustments, SamplingParams


class Sampler:
    """How the tokens of one sequence are chosen: its random numbers, the tokens it has seen.

    Args:
        settings: with a seed, unless greedy.
        vocabulary: the number of logits per position.
        device: that of the logits.
        prompt: the sequence's prompt.
        answer: which of several answers to the prompt it is.
        adjustments: what is added to the logits.

    Raises:
        ValueError: tokens are sampled, and there is no seed.
    """

    def __init__(
        self,
        settings: SamplingParams,
        vocabulary: int,
        device: torch.device,
        prompt: Sequence[int] = (),
        answer: int = 0,
        adjustments: LogitAdjustments = NO_ADJUSTMENTS,
    ) -> None:
        self.settings = settings
        self._adjustments = adjustments
        self._noise: ExponentialNoise | None = None
        if not settings.greedy:
            if settings.seed is None:
                raise ValueError("tokens are sampled, but there is no seed")
            key = stream_key(settings.seed, tuple(prompt), answer)
            self._noise = ExponentialNoise(key, vocabulary)
        self._seen: torch.Tensor | None = None
        if settings.repetition_penalty != 1:
            self._seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        self._counts: torch.Tensor | None = None
        self.mark_seen(prompt)
        if adjustments.presence_penalty or adjustments.frequency_penalty:
            self._counts = torch.zeros(vocabulary, dtype=torch.float32, device=device)
        self._bias: tuple[torch.Tensor, torch.Tensor] | None = None
        if known := [each for each in adjustments.logit_bias if each[0] < vocabulary]:
            tokens, biases = zip(*known, strict=True)
            self._bias = torch.tensor(tokens, device=device), torch.tensor(biases, device=device)

    @property
    def has_penalty(self) -> bool:
        """Whether scores are others than the logits."""
        return self._seen is not None or bool(self._adjustments)

    @property
    def takes_best(self) -> bool:
        """Whether the token of the highest logit is chosen, whatever the text."""
        return self.settings.greedy and not self.has_penalty

    def mark_seen(self, tokens: Iterable[int]) -> None:
        """Tokens that are part of the text now, for the penalties."""
        tokens = list(tokens)
        if self._seen is not None:
            self._seen[tokens] = True
        if self._counts is not None:
            for token in tokens:
                self._counts[token] += 1

    def scores(
        self,
        logits: torch.Tensor,
        drafted: Sequence[int] = (),
        parents: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Logits with the penalties and what else is added to them.

        Args:
            logits: ``[T, V]``, one more than there are drafted tokens: logits 0 follow the text.
            drafted: tokens assumed after the text; logits i + 1 follow ``drafted[i]`` and what the
                logits of its parent follow.
            parents: of each drafted token the index of its parent's logits, ≤ i; None: a chain.

        Returns:
            ``[T, V]``; the input itself where nothing is added.
        """
        if not self.has_penalty:
            return logits
        parents = range(len(drafted)) if parents is None else parents
        return self._adjusted(self._penalized(logits, drafted, parents), drafted, parents)

    def _adjusted(
        self, logits: torch.Tensor, drafted: Sequence[int], parents: Sequence[int]
    ) -> torch.Tensor:
        """Logits with the adjustments; arguments as of `scores`."""
        given, logits = self._adjustments, logits.float()
        if self._counts is not None:
            counts = self._counts[: logits.shape[1]].repeat(logits.shape[0], 1)
            for row, (token, parent) in enumerate(zip(drafted, parents, strict=True), 1):
                counts[row] = counts[parent]
                counts[row, token] += 1
            logits = logits - given.frequency_penalty * counts
            logits -= given.presence_penalty * (counts > 0)
        if self._bias is not None:
            logits = logits.index_add(1, self._bias[0], self._bias[1].expand(len(logits), -1))
        return logits

    def _penalized(
        self, logits: torch.Tensor, drafted: Sequence[int], parents: Sequence[int]
    ) -> torch.Tensor:
        """Logits with the repetition penalty; arguments as of `scores`."""
        if self._seen is None:
            return logits
        # Beyond these bounds numbers would overflow, and nothing else be any different.
        penalty = min(max(self.settings.repetition_penalty, SCALES[0]), SCALES[1])
        seen = self._seen[: logits.shape[1]].repeat(logits.shape[0], 1)
        for row, (token, parent) in enumerate(zip(drafted, parents, strict=True), 1):
            seen[row] = seen[parent]
            seen[row, token] = True
        logits = logits.float()
        return torch.where(
            seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits
        )

    def choose(
        self,
        logits: torch.Tensor,
        position: int,
        drafted: Sequence[int] = (),
        parents: Sequence[int] | None = None,
    ) -> list[int]:
        """The next token by each of the logits ``[T, V]``; `INVALID_TOKEN` where they are NaN or
        infinite.

        ``position`` is that of the token that logits 0 decide; other arguments as of `scores`.
        """
        scores = self.scores(logits, drafted, parents)
        if self.settings.greedy:
            greedy: list[int] = greedy_tokens(scores).tolist()
            return greedy
        depths = [0]
        for parent in range(len(drafted)) if parents is None else parents:
            depths.append(depths[parent] + 1)
        return self.sample(scores, [position + depth for depth in depths])

    def sample(self, scores: torch.Tensor, positions: Sequence[int]) -> list[int]:
        """The winners of races by scores ``[T, V]`` for tokens at these positions."""
        noise = self._sampling_noise
        if scores.device.type != "cpu":
            return dense_winners(self.settings, scores, noise.dense(positions, scores.device))
        return [
            race.winner(noise.minima(position))
            for race, position in zip(self._races(scores), positions, strict=True)
        ]

    def candidates(
        self, scores: torch.Tensor, positions: Sequence[int], count: int
    ) -> list[list[tuple[int, float]]]:
        """The ``count`` ≥ 2 tokens that are ahead by scores ``[T, V]``, and their shares.

        The first is what `choose` returns. A token's share is a guess how likely it is to be the
        choice by somewhat different scores: a softmax over what is compared, of the tokens named
        alone. Fewer tokens where others are far behind; none where the scores are not finite.
        """
        if self.settings.greedy:
            return [most_likely(float_row(row), count) for row in scores.cpu()]
        noise = self._sampling_noise
        return [
            race.leaders(noise.minima(position), count)
            for race, position in zip(self._races(scores.cpu()), positions, strict=True)
        ]

    @property
    def _sampling_noise(self) -> ExponentialNoise:
        if self._noise is None:
            raise ValueError("greedy tokens need no random numbers")
        return self._noise

    def _races(self, scores: torch.Tensor) -> Iterator[Race]:
        for row in scores:
            numbers = float_row(row)
            padding = (0, -len(numbers) % BLOCK)
            blocks = np.pad(numbers, padding, constant_values=-math.inf).reshape(-1, BLOCK)
            yield Race(self.settings, blocks, blocks.max(axis=-1))
