"""How far a lossy output agrees with the model's own, token by token."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Output = Sequence[int]


@dataclass(frozen=True)
class Agreement:
    """Of outputs with the model's own; means over the prompts, unless said otherwise.

    Attributes:
        equal: share of positions with the same token; positions that only one has count as
            different.
        rouge_2: F1 of the pairs of neighbouring tokens (ROUGE-2, Lin 2004, over token ids).
        first_divergence: median index of the first token that differs, over the outputs that
            differ; None where none does.
        identical, prompts: outputs that are the same, and all.
    """

    equal: float
    rouge_2: float
    first_divergence: float | None
    identical: int
    prompts: int

    @classmethod
    def of(cls, pairs: Sequence[tuple[Output, Output]]) -> Agreement:
        """Of pairs (the model's own output, the other).

        Raises:
            ValueError: there are no pairs.
        """
        if not pairs:
            raise ValueError("there are no outputs to compare")
        parted = [first_difference(own, other) for own, other in pairs]
        known = [at for at in parted if at is not None]
        return cls(
            equal=statistics.fmean(share_equal(own, other) for own, other in pairs),
            rouge_2=statistics.fmean(rouge_2(own, other) for own, other in pairs),
            first_divergence=statistics.median(known) if known else None,
            identical=parted.count(None),
            prompts=len(pairs),
        )


def share_equal(own: Output, other: Output) -> float:
    """Share of positions with the same token, of the longer output's length."""
    longer = max(len(own), len(other))
    same = sum(a == b for a, b in zip(own, other, strict=False))
    return same / longer if longer else 1.0


def rouge_2(own: Output, other: Output) -> float:
    """F1 of the pairs of neighbouring tokens; outputs without a pair agree if they are equal."""
    pairs, others = Counter(pairwise(own)), Counter(pairwise(other))
    total = pairs.total() + others.total()
    if not total:
        return float(list(own) == list(other))
    return 2 * (pairs & others).total() / total


def first_difference(own: Output, other: Output) -> int | None:
    """Index of the first token that differs or that only one output has; None: they are equal."""
    for i, (a, b) in enumerate(zip(own, other, strict=False)):
        if a != b:
            return i
    shorter = min(len(own), len(other))
    return None if len(own) == len(other) else shorter
