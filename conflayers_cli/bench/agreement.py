"""How far a lossy output agrees with the model's own, token by token."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from conflayers_cli.bench.schema import Agreement


def measure_agreement(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Agreement:
    """Of pairs of token ids (the model's own output, the other).

    Raises:
        ValueError: there are no pairs.
    """
    if not pairs:
        raise ValueError("there are no outputs to compare")
    parted = [first_difference(own, other) for own, other in pairs]
    known = [at for at in parted if at is not None]
    return Agreement(
        equal=statistics.fmean(share_equal(own, other) for own, other in pairs),
        rouge_2=statistics.fmean(rouge_2(own, other) for own, other in pairs),
        first_divergence=statistics.median(known) if known else None,
        identical=parted.count(None),
        prompts=len(pairs),
    )


def share_equal(own: Sequence[int], other: Sequence[int]) -> float:
    """Share of positions with the same token, of the longer output's length."""
    longer = max(len(own), len(other))
    same = sum(a == b for a, b in zip(own, other, strict=False))
    return same / longer if longer else 1.0


def rouge_2(own: Sequence[int], other: Sequence[int]) -> float:
    """F1 of the pairs of neighbouring tokens; outputs without a pair agree if they are equal."""
    pairs, others = Counter(pairwise(own)), Counter(pairwise(other))
    total = pairs.total() + others.total()
    if not total:
        return float(list(own) == list(other))
    return 2 * (pairs & others).total() / total


def first_difference(own: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token that differs or that only one output has; None: they are equal."""
    for i, (a, b) in enumerate(zip(own, other, strict=False)):
        if a != b:
            return i
    shorter = min(len(own), len(other))
    return None if len(own) == len(other) else shorter
