"""Side candidates: which leaves stand beside a drafted chain, and whether they earn their cost.

Beside each drafted token the tree has its alternatives, leaves without successors (ConfLayers,
arXiv 2604.14612; SWIFT, arXiv 2410.06916 §4.2). One full pass verifies the chain and all leaves.
The chain's tokens lie in the slots of their positions, the leaves behind the whole chain; each sees
the text, the chain before it, and itself. So an accepted chain is in its place already, and one key
moves where a leaf is accepted.

How many leaves stand beside a token is decided by the draft's sorted probabilities and the chain
alone, before it is known which tokens the leaves will be: only then does testing them in turn leave
the target's distribution untouched.

In half precision one thing is not vanilla's to the bit: a leaf sees its own key in another slot, so
its attention sums in another order, and the token behind it may be rounded differently. Taken as it
is, that token and the leaf's moved key changed 3 of 240 greedy bfloat16 texts of tiny models (96
tokens each, 6,569 leaves accepted) and 1 of 12 of SmolLM2, deepened (80 tokens each, 27 leaves).
Greedy decoding in half precision therefore keeps only the leaf, which *is* the model's choice to
the bit; the token behind it opens the next draft, for no draft pass, and is verified there with
everything in its place (counted among that step's drafts). With that none of these texts changed.
Elsewhere the leaf and the token behind it are kept at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from conflayers_cli.engine.sampler import Sampler

VerifyCost = Callable[[int], float]
"""Seconds of a full pass by its number of tokens."""

Probabilities = Sequence[float] | npt.NDArray[np.floating]


@dataclass(frozen=True)
class TreeShape:
    """How many leaves are wanted beside a drafted token, by how sure the draft was there.

    Attributes:
        rungs: ``(over, leaves)`` by falling ``over``, the last one 0: the first rung whose ``over``
            the draft's top probability exceeds says how many.

    Raises:
        ValueError: no rungs, a number out of its range, or rungs that don't fall to 0.
    """

    rungs: tuple[tuple[float, int], ...]

    def __post_init__(self) -> None:
        overs = [over for over, _ in self.rungs]
        if not overs or overs[-1] != 0 or not all(0 <= over < 1 for over in overs):
            raise ValueError(
                f"rungs need probabilities from 0 to under 1, the last one 0: {self.rungs}"
            )
        if overs != sorted(set(overs), reverse=True):
            raise ValueError(f"the probabilities of rungs must fall: {self.rungs}")
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for _, n in self.rungs):
            raise ValueError(f"rungs need whole numbers of leaves, 0 or more: {self.rungs}")

    def leaves(self, top: float) -> int:
        """How many are wanted where the draft's top probability is ``top``."""
        return next((leaves for over, leaves in self.rungs if top > over), 0)

    @property
    def most(self) -> int:
        """The most leaves wanted beside any token."""
        return max(leaves for _, leaves in self.rungs)


GREEDY_SHAPE = TreeShape(((0.95, 3), (0.8, 5), (0.5, 8), (0.0, 10)))
"""The papers' counts for greedy drafts."""
SAMPLING_SHAPE = TreeShape(((0.95, 1), (0.8, 3), (0.5, 5), (0.0, 10)))
"""The papers' counts for sampled drafts."""


def leaf_counts(
    chain: Probabilities,
    beside: Sequence[Probabilities] | npt.NDArray[np.floating],
    shape: TreeShape,
    verify_cost: VerifyCost | None = None,
    draft_seconds: float = 0.0,
    room: int | None = None,
    *,
    only_draft: bool = False,
) -> tuple[int, ...]:
    """How many leaves stand beside each drafted token.

    The shape says how many are wanted. With costs, only those stay that earn theirs. A leaf gains
    one token where it is right: its draft probability, times the chance that verification gets
    there, the product of the draft's probabilities of the chain's tokens before. A token is worth
    the seconds that the chain alone is expected to take for one; where it only opens the next
    draft, those of drafting it. Leaves are added by falling gain;
    their number is the one at which gain less extra cost is greatest, of all numbers, since
    passes get dearer in leaps.

    Args:
        chain: the draft's probability of each drafted token, γ of them.
        beside: for each, the draft's largest probabilities of other tokens, falling; at least as
            many as the shape wants, or all there are.
        shape: how many are wanted.
        verify_cost: seconds of a full pass by width; None: all that are wanted stay.
        draft_seconds: of drafting one token.
        room: the most leaves in all, where there is a bound.
        only_draft: the token behind a leaf is not kept, but drafted already (half precision).

    Returns:
        γ counts; a leaf of probability 0 is never counted.
    """
    reach, expected = 1.0, 1.0
    gains: list[tuple[float, int]] = []
    for at, (own, others) in enumerate(zip(chain, beside, strict=True)):
        top = max(float(own), *map(float, others[:1]), 0.0)
        gains += [(reach * float(p), at) for p in others[: shape.leaves(top)] if p > 0]
        reach *= float(own)
        expected += reach
    gains.sort(key=lambda entry: -entry[0])  # stable: earlier positions, likelier leaves first
    gains = gains[:room]
    if verify_cost is not None:
        tokens = len(chain) + 1
        alone = verify_cost(tokens)
        token = (len(chain) * draft_seconds + alone) / expected
        worth = draft_seconds if only_draft else token
        gained = worth * np.cumsum([0.0, *(gain for gain, _ in gains)])
        cost = [verify_cost(tokens + more) - alone for more in range(len(gains) + 1)]
        gains = gains[: int(np.argmax(gained - cost))]
    counts = [0] * len(chain)
    for _, at in gains:
        counts[at] += 1
    return tuple(counts)


def leaves_beside(
    chain: Sequence[int],
    rows: torch.Tensor,
    sampler: Sampler,
    shape: TreeShape,
    verify_cost: VerifyCost | None = None,
    draft_seconds: float = 0.0,
    room: int | None = None,
    *,
    only_draft: bool = False,
) -> tuple[tuple[int, ...], ...]:
    """The leaves beside a drafted chain: the next-best tokens, or drawn where tokens are sampled.

    Args:
        chain: γ drafted tokens, one at least.
        rows: the draft's probabilities, float32 ``[γ, V]``; drawn leaves come from them, without
            replacement, after the chain's token.
        sampler: says whether tokens are sampled, and draws them.
        shape, verify_cost, draft_seconds, room, only_draft: as in :func:`leaf_counts`.

    Returns:
        For each drafted token its leaves, in the order in which they are to be tried.
    """
    chosen = torch.tensor(chain, device=rows.device)[:, None]
    others = rows.scatter(1, chosen, 0.0)
    best = others.topk(min(shape.most, rows.shape[1]), dim=1)
    own = rows.gather(1, chosen)[:, 0].tolist()
    counts = leaf_counts(
        own,
        best.values.tolist(),
        shape,
        verify_cost,
        draft_seconds,
        room,
        only_draft=only_draft,
    )
    if sampler.settings.greedy:
        ranked = best.indices.tolist()
        return tuple(tuple(row[:count]) for row, count in zip(ranked, counts, strict=True))
    return tuple(
        tuple(sampler.draw_distinct(row, count)) if count else ()
        for row, count in zip(others, counts, strict=True)
    )
