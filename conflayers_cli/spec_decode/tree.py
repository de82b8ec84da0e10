"""Tree drafts: how many leaves are verified beside each token of a drafted chain, and which.

Beside each drafted token the tree has its alternatives, leaves without successors (ConfLayers,
arXiv 2604.14612; SWIFT, arXiv 2410.06916 §4.2). One full pass verifies the chain and all leaves.
The chain's tokens use the slots of their positions, the leaves those behind the whole chain; each
attends to the text, the chain before it, and itself. An accepted chain needs no copy, an accepted
leaf moves one slot.

In half precision a leaf's attention sums its keys in another order (its own key is in another
slot), so the token behind it may be rounded differently: keeping both changed 3 of 240 greedy
bfloat16 texts of tiny models and 1 of 12 of SmolLM2, deepened. So there only the leaf is kept,
which is the model's choice to the bit; the token behind it opens the next draft, without a draft
pass, and is verified in its own slot (counted among that step's drafts). Then none changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

VerifyCost = Callable[[int], float]
"""Seconds of a full pass by its number of tokens."""

Probabilities = Sequence[float] | npt.NDArray[np.floating]


@dataclass(frozen=True)
class TreeShape:
    """How many leaves are wanted beside a drafted token, by the draft's top probability there.

    Attributes:
        thresholds: ``(over, leaves)`` by falling ``over``, the last one 0: the first entry whose
            ``over`` the top probability exceeds holds.

    Raises:
        ValueError: no thresholds, a number out of its range, or thresholds that don't fall to 0.
    """

    thresholds: tuple[tuple[float, int], ...]

    def __post_init__(self) -> None:
        overs = [over for over, _ in self.thresholds]
        if not overs or overs[-1] != 0 or not all(0 <= over < 1 for over in overs):
            raise ValueError(
                f"thresholds must be from 0 to under 1, the last one 0: {self.thresholds}"
            )
        if overs != sorted(set(overs), reverse=True):
            raise ValueError(f"thresholds must fall: {self.thresholds}")
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for _, n in self.thresholds):
            raise ValueError(f"thresholds need whole numbers of leaves: {self.thresholds}")

    def leaves(self, top: float) -> int:
        """How many are wanted where the draft's top probability is ``top``."""
        return next((leaves for over, leaves in self.thresholds if top > over), 0)

    @property
    def max_leaves(self) -> int:
        """The most leaves wanted beside any token."""
        return max(leaves for _, leaves in self.thresholds)


PAPER_SHAPE = TreeShape(((0.95, 3), (0.8, 5), (0.5, 8), (0.0, 10)))
"""The papers' counts for greedy drafts, and ours for sampled ones, which are verified alike."""


def leaf_counts(
    chain: Probabilities,
    beside: Sequence[Probabilities] | npt.NDArray[np.floating],
    shape: TreeShape,
    verify_cost: VerifyCost | None = None,
    draft_seconds: float = 0.0,
    max_leaves: int | None = None,
    *,
    only_draft: bool = False,
) -> tuple[int, ...]:
    """How many leaves to verify beside each drafted token.

    With costs, only leaves that earn theirs stay. A leaf's gain is its share times the product of
    the shares of the chain's tokens before it; a token is worth the
    seconds that the chain alone is expected to take for one, or, where it only opens the next
    draft, those of drafting it. Leaves are added by falling gain, as many as maximise gain less
    extra cost (over all numbers: passes get dearer in leaps).

    Args:
        chain: the share of each drafted token (`TokenChoice`), γ of them.
        beside: for each, the largest shares of other tokens, falling; at least as many as the shape
            wants, or all there are.
        shape: how many are wanted.
        verify_cost: None: all that are wanted stay.
        draft_seconds: of drafting one token.
        max_leaves: the most in all; None: no bound.
        only_draft: the token behind a leaf is not kept, but drafted already (half precision).

    Returns:
        γ counts; a leaf of share 0 is never counted.
    """
    survival, expected = 1.0, 1.0
    gains: list[tuple[float, int]] = []
    for at, (own, others) in enumerate(zip(chain, beside, strict=True)):
        top = max(float(own), *map(float, others[:1]), 0.0)
        gains += [(survival * float(p), at) for p in others[: shape.leaves(top)] if p > 0]
        survival *= float(own)
        expected += survival
    gains.sort(key=lambda entry: -entry[0])  # stable: earlier positions, likelier leaves first
    gains = gains[:max_leaves]
    if verify_cost is not None:
        width = len(chain) + 1
        alone = verify_cost(width)
        worth = draft_seconds if only_draft else (len(chain) * draft_seconds + alone) / expected
        gained = worth * np.cumsum([0.0, *(gain for gain, _ in gains)])
        cost = [verify_cost(width + more) - alone for more in range(len(gains) + 1)]
        gains = gains[: int(np.argmax(gained - cost))]
    counts = [0] * len(chain)
    for _, at in gains:
        counts[at] += 1
    return tuple(counts)
