"""The race by which a token is sampled: for one row of scores on the CPU, for all on a GPU.

The winner is ``argmax_i p_i / E_i`` with p after temperature, top-k, top-p and min-p. In logarithms
neither p's normalisation nor its tail is needed: only blocks of tokens are looked at whose highest
score and least exponential could win. A winner that the filters rule out rules out all tokens that
are no likelier; the race is run again without them.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from conflayers_cli.engine.argmax import INVALID_TOKEN
from conflayers_cli.engine.noise import BLOCK, BlockMinima, ExponentialNoise, Floats, Ints
from conflayers_cli.sampling_params import SamplingParams

SCALES = 1e-30, 1e30
"""Bounds of what scores are divided by: beyond them numbers overflow and nothing is any different.
"""
FIRST_BLOCKS = 8
"""Blocks that a race begins with."""
MAX_MARGIN = 4.0
"""How far behind the winner, in units of log p, others are sure to be among the leaders."""

Row = npt.NDArray[np.float32]


class Race:
    """Races among the tokens of one row.

    Args:
        settings: temperature above 0, and the filters.
        scores: float32 ``[blocks, BLOCK]``, those beyond the vocabulary minus infinity.
        highest: ``[blocks]``, the highest score of each block.
    """

    def __init__(self, settings: SamplingParams, scores: Row, highest: Row) -> None:
        self._settings = settings
        self._temperature = scale(settings.temperature)
        self._scores, self._highest = scores, highest
        self._top = float(highest.max())
        self._filtered = any(
            each is not None for each in (settings.top_k, settings.top_p, settings.min_p)
        )

    def winner(self, minima: BlockMinima) -> int:
        """The token, `INVALID_TOKEN` where the scores are not finite."""
        tokens, results = self._run(minima, 0.0)
        return int(tokens[results.argmax()]) if len(tokens) else INVALID_TOKEN

    def leaders(self, minima: BlockMinima, count: int) -> list[tuple[int, float]]:
        """The first ``count`` tokens and their shares (see `Sampler.candidates`)."""
        tokens, results = self._run(minima, MAX_MARGIN)
        if not len(tokens):
            return []
        order = np.argsort(-results, kind="stable")[:count]
        order = order[np.isfinite(results[order])]
        shares = np.exp((results[order] - results[order[0]]) / self._temperature)
        shares /= shares.sum()
        return list(zip(tokens[order].tolist(), shares.tolist(), strict=True))

    def _run(self, minima: BlockMinima, margin: float) -> tuple[Ints, Floats]:
        """Tokens that were looked at, and their results; the winner and all within the margin of
        it are among them. None where the scores are not finite."""
        if not math.isfinite(self._top):
            return np.empty(0, np.int64), np.empty(0)
        scores, highest = self._scores, self._highest
        while True:
            tokens, results = self._leading(scores, highest, minima, margin)
            score = scores.flat[tokens[results.argmax()]]
            if not self._filtered or self._allows(float(score)):
                return tokens, results
            scores = np.where(scores > score, scores, np.float32(-np.inf))
            highest = scores.max(axis=1)

    def _leading(
        self, scores: Row, highest: Row, minima: BlockMinima, margin: float
    ) -> tuple[Ints, Floats]:
        bounds = highest - self._temperature * minima.log_min
        begin = max(len(bounds) - FIRST_BLOCKS, 0)
        blocks = np.argpartition(bounds, begin)[begin:]
        results = self._results(scores, minima, blocks)
        reach = results.max() - margin * self._temperature
        if np.count_nonzero(bounds > reach) > np.count_nonzero(bounds[blocks] > reach):
            blocks = np.union1d(blocks, np.flatnonzero(bounds > reach))
            results = self._results(scores, minima, blocks)
        tokens = (blocks[:, None] * BLOCK + np.arange(BLOCK)).ravel()
        return tokens, results.ravel()

    def _results(self, scores: Row, minima: BlockMinima, blocks: Ints) -> Floats:
        logs = ExponentialNoise.log_exponentials(minima, blocks)
        results: Floats = scores[blocks] - self._temperature * logs
        return results

    def _allows(self, score: float) -> bool:
        """Whether the filters leave tokens of this score in. Of equal scores all are in or out."""
        settings = self._settings
        if score == self._top:
            return True
        if settings.top_k and np.count_nonzero(self._scores > score) >= settings.top_k:
            return False
        if settings.min_p and score < self._top + self._temperature * math.log(settings.min_p):
            return False
        if settings.top_p is None or settings.top_p >= 1:
            return True
        weights = self._weights
        before = weights[self._scores > score].sum(dtype=np.float64)
        return bool(before < settings.top_p * self._total)

    @cached_property
    def _weights(self) -> Row:
        """Probabilities after temperature and top-k, times a constant."""
        with np.errstate(over="ignore"):
            weights: Row = np.exp((self._scores - self._top) / np.float32(self._temperature))
        top_k = self._settings.top_k
        if top_k is not None and top_k < weights.size:
            least = np.partition(self._scores.ravel(), -top_k)[-top_k]
            weights[self._scores < least] = 0.0
        return weights

    @cached_property
    def _total(self) -> float:
        return float(self._weights.sum(dtype=np.float64))


def scale(temperature: float) -> float:
    """What scores are divided by for a temperature."""
    return min(max(temperature, SCALES[0]), SCALES[1])


def dense_winners(
    settings: SamplingParams, scores: torch.Tensor, log_exponentials: torch.Tensor
) -> list[int]:
    """The winners of races, run on any device over all tokens; the rule is that of `Race`.

    Args:
        settings: temperature above 0, and the filters.
        scores: ``[T, V]``.
        log_exponentials: float64 ``[T, ≥ V]``, by `ExponentialNoise.dense`.

    Returns:
        T tokens; `INVALID_TOKEN` where the scores are not finite.
    """
    scores = scores.double()
    top = scores.amax(dim=-1, keepdim=True)
    temperature = scale(settings.temperature)
    results = scores - temperature * log_exponentials[:, : scores.shape[1]]
    outside = torch.zeros_like(scores, dtype=torch.bool)
    while True:
        tokens = results.masked_fill(outside, -math.inf).argmax(dim=-1, keepdim=True)
        score = scores.gather(-1, tokens)
        ruled_out = _ruled_out(settings, scores, top, score) & (score < top)
        if not ruled_out.any():
            tokens.masked_fill_(~top.isfinite(), INVALID_TOKEN)
            winners: list[int] = tokens[:, 0].tolist()
            return winners
        outside |= ruled_out & (scores <= score)


def _ruled_out(
    settings: SamplingParams, scores: torch.Tensor, top: torch.Tensor, score: torch.Tensor
) -> torch.Tensor:
    """Whether the filters rule out tokens of a score ``[T, 1]`` in each row."""
    temperature, over = scale(settings.temperature), scores > score
    out = torch.zeros_like(score, dtype=torch.bool)
    if settings.top_k is not None:
        out |= over.sum(dim=-1, keepdim=True) >= settings.top_k
    if settings.min_p:
        out |= score < top + temperature * math.log(settings.min_p)
    if settings.top_p is not None and settings.top_p < 1:
        weights = torch.exp((scores - top) / temperature)
        if settings.top_k is not None and settings.top_k < scores.shape[1]:
            least = scores.topk(settings.top_k, dim=-1).values[:, -1:]
            weights = weights.masked_fill(scores < least, 0.0)
        before = (weights * over).sum(dim=-1, keepdim=True)
        out |= before >= settings.top_p * weights.sum(dim=-1, keepdim=True)
    return out
