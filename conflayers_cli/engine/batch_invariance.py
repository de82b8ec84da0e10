"""How many rows a pass runs at the least, so that a token's logits have the same bits in all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

CANDIDATES = (1, 2, 4, 8, 16, 32, 64)
"""Least numbers of rows tried, the cheapest first."""
PROBED_WIDTHS = (2, 3, 4, 5, 6, 8, 9, 12, 16, 17, 24, 26, 32, 48, 64)
"""Widths of the passes that are compared with passes of one token, those of recorded passes (see
`.runner.WIDTHS`) among them."""
PROBED_TOKENS = 20
"""Tokens that are run one by one to compare with."""

Logits = Callable[[int, int, int], torch.Tensor]
"""Logits ``[width, V]`` of the tokens from a place on: (least rows, place, width)."""


@dataclass(frozen=True)
class BatchInvariance:
    """How many rows, tokens of all sequences together, a pass runs at the least.

    Kernels are chosen by the number of rows, and may round otherwise. On a CPU only a single
    half-precision row gets other bits than the same row among several; a pass of one token
    therefore runs it twice, which costs the same. On a GPU there is no such rule to rely on: it is
    found by trying (:func:`probe_min_rows`). Passes up to ``least`` tokens then all have one shape.

    Attributes:
        least: how many.
        bitwise: whether a token's logits have the same bits in every pass.
    """

    least: int
    bitwise: bool

    @classmethod
    def for_cpu(cls, dtype: torch.dtype) -> BatchInvariance:
        return NOT_INVARIANT if dtype == torch.float32 else cls(2, bitwise=True)


NOT_INVARIANT = BatchInvariance(1, bitwise=False)
"""Bits don't matter, or nothing keeps them."""


def probe_min_rows(logits: Logits) -> BatchInvariance:
    """The least number of rows with which the same tokens get the same bits in passes of any width.

    Passes over one token each, and passes over many, from the first token on and from a later one
    (so that a row's place among the others changes), are compared bit for bit.

    Args:
        logits: runs the tokens of one text from a place on, on top of those before it.

    Returns:
        `NOT_INVARIANT` where no number of rows does it.
    """
    for least in CANDIDATES:
        if _agrees(logits, least):
            return BatchInvariance(least, bitwise=True)
    return NOT_INVARIANT


def _agrees(logits: Logits, least: int) -> bool:
    alone = torch.stack([logits(least, place, 1)[0] for place in range(PROBED_TOKENS)])
    for width in PROBED_WIDTHS:
        for place in (0, 1):
            count = min(width, PROBED_TOKENS - place)
            among = logits(least, place, width)[:count]
            if not torch.equal(among, alone[place : place + count]):
                return False
    return True
