"""Decoding simulated in expectation: what a draft is worth, without the luck of single positions.

A draft's logits are the model's with a small error, another one for every plan. Whether the draft
agrees at a position is a toss where the model's two best tokens are close, and of a hundred plans
the one with the luckiest tosses looks some per cent faster than it is. So agreement is expected,
not counted: a plan's errors are measured at all positions, and any position could have had any of
them. Where the model's margin is ``m``, the chance of agreement is the share of errors that leave
``m`` plus error at zero or more (a U-statistic of margins and errors, Hoeffding 1948).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from conflayers_cli.engine.cost_model import PassCosts

Floats = npt.NDArray[np.float64]


def agreement_chances(margins: Sequence[Floats], drafted: Sequence[Floats]) -> list[Floats]:
    """The chance at every position that the draft chooses the text's next token.

    Args:
        margins: by text ``[n]``: how far the model's logit of that token is above all others'.
        drafted: the same of the draft's logits; below 0 where it chooses another token.

    Returns:
        By text, float64 ``[n]`` of 0 to 1.
    """
    if not margins:
        return []
    every = np.nan_to_num(np.concatenate(margins), nan=-np.inf)
    with np.errstate(invalid="ignore"):
        errors = np.concatenate(drafted) - every
    errors = np.sort(np.nan_to_num(errors, nan=-np.inf))  # invalid logits agree with nothing
    chances = 1.0 - np.searchsorted(errors, -every, side="left") / len(errors)
    return np.split(chances, np.cumsum([len(each) for each in margins])[:-1])


@dataclass(frozen=True)
class ExpectedText:
    """Texts of which is known how likely a draft agrees at each position.

    Attributes:
        chances: by text, ``[n]``.
        longest: tokens of a draft at the most.
    """

    chances: Sequence[Floats]
    longest: int

    @property
    def size(self) -> int:
        """Positions of the longest text."""
        return max(map(len, self.chances), default=0)

    @cached_property
    def runs(self) -> Floats:
        """Chance that the draft agrees at the first k positions from each on, ``[T, n, k]``."""
        found = np.zeros((len(self.chances), self.size, self.longest + 2))
        for own, chances in zip(found, self.chances, strict=True):
            padded = np.append(chances, np.zeros(self.size + self.longest + 1 - len(chances)))
            own[:, 0] = 1.0
            for k in range(self.longest + 1):
                own[:, k + 1] = own[:, k] * padded[k : k + self.size]
        return found


@dataclass(frozen=True)
class ExpectedReplays:
    """Counts and seconds of decodings in expectation, one for each way of drafting, ``[S]``."""

    steps: Floats
    drafted: Floats
    accepted: Floats
    seconds: Floats

    @property
    def tokens(self) -> Floats:
        return self.steps + self.accepted


def expected_replays(
    texts: ExpectedText, lengths: npt.NDArray[np.int64], draft_cost: float, costs: PassCosts
) -> ExpectedReplays:
    """Greedy decoding of texts in expectation.

    Args:
        texts: how likely drafts agree.
        lengths: tokens drafted where a step begins, by way of drafting, text and position,
            ``[S, T, n]``, at most ``texts.longest``; 0 behind a text's end.
        draft_cost: seconds per drafted token.
        costs: of verification.
    """
    ways, count, size = lengths.shape
    kept, width = np.arange(texts.longest + 1), texts.longest + 1
    verify = np.array([costs.verify_cost(1 + drafts) for drafts in range(width)])
    inside = np.array([np.arange(size) < len(each) for each in texts.chances])
    begins = np.zeros((ways, count, size + width))  # chance that a step begins there
    begins[:, :, 0] = 1.0
    totals = np.zeros((4, ways))
    for at in range(size):
        begin, drafts = begins[:, :, at] * inside[:, at], lengths[:, :, at]
        run = texts.runs[:, at]
        chances = np.where(kept < drafts[..., None], run[:, :-1] - run[:, 1:], 0.0)
        chances += np.where(kept == drafts[..., None], run[:, :-1], 0.0)
        begins[:, :, at + 1 : at + 1 + width] += begin[..., None] * chances
        seconds = drafts * draft_cost + verify[drafts]
        for total, each in zip(totals, (1.0, drafts, chances @ kept, seconds), strict=True):
            total += (begin * each).sum(-1)
    return ExpectedReplays(*totals)
