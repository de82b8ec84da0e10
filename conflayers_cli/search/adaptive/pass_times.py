"""What passes cost, learnt from the decoding itself: nothing is measured apart from its use.

Before a width was seen its cost follows from the nearest one that was, and from how passes grow
where weights are read once for all tokens.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Mapping
from math import log

from conflayers_cli.engine.cost_model import CostTable, PassCosts

GROWTH = ((1, 1.0), (2, 1.08), (3, 1.12), (5, 1.3), (9, 2.0), (17, 3.8), (26, 5.8))
"""(width, seconds over those of one token), as with native kernels on two kinds of processor."""
REMEMBERED = 15
"""Passes of a kind that count, the latest ones."""
MIN_SEEN = 2
"""Passes of a width before it is believed: a single one may have been disturbed."""
FAST_SHARE = 0.25
"""Of the passes of a kind this share was faster than what counts: a busy machine only adds."""


class PassTimes:
    """Seconds of passes by their width in tokens.

    A pass over several sequences counts as one as wide as all their tokens together, which is what
    reads weights alike; their attention differs.
    """

    def __init__(self, known: Mapping[int, float] | None = None) -> None:
        self._times: dict[int, deque[float]] = {}
        for width, seconds in (known or {}).items():
            self._times[width] = deque([seconds] * MIN_SEEN, REMEMBERED)

    def add(self, width: int, seconds: float) -> None:
        self._times.setdefault(width, deque(maxlen=REMEMBERED)).append(seconds)

    @property
    def known(self) -> dict[int, float]:
        """Seconds by the widths seen."""
        return {
            width: fast(times)
            for width, times in sorted(self._times.items())
            if len(times) >= MIN_SEEN
        }

    def costs(self, widths: Iterable[int]) -> dict[int, float]:
        """Seconds by width, never falling; 1 for a single token where no pass was seen."""
        ratios = [(log(width), own / _growth(width)) for width, own in self.known.items()]
        found, slowest = {}, 0.0
        for width in sorted(widths):
            found[width] = slowest = max(slowest, _growth(width) * _between(ratios, log(width)))
        return found


def cost_table(
    verify: PassTimes, draft: Mapping[int, float], depth: int, rows: Iterable[int]
) -> CostTable:
    """Costs as a draft length policy takes them, for each number of sequences decoded at once.

    ``draft``: seconds of a draft pass of one token a sequence, likewise.
    """
    widths = [width for width, _ in GROWTH]
    by_batch = {}
    for batch in rows:
        wide = verify.costs([width * batch for width in widths])
        own = {width: wide[width * batch] for width in widths}
        by_batch[batch] = PassCosts(own, floor=draft[batch], attention=0.0, mlp=0.0, context=0)
    return CostTable(by_batch, depth)


def fast(times: Iterable[float]) -> float:
    """The seconds that a share of passes of a kind were faster than."""
    ordered = sorted(times)
    at = FAST_SHARE * (len(ordered) - 1)
    low = ordered[int(at)]
    return statistics.fmean([low, ordered[min(int(at) + 1, len(ordered) - 1)]]) if at % 1 else low


def _growth(width: int) -> float:
    return _between([(float(known), grown) for known, grown in GROWTH], float(width), beyond=True)


def _between(points: list[tuple[float, float]], at: float, *, beyond: bool = False) -> float:
    """The value at a place by straight lines; 1 without points. Outside that of the nearest one,
    or with ``beyond`` in proportion to the place behind the last."""
    if not points:
        return 1.0
    number = bisect_left([place for place, _ in points], at)
    if number == len(points):
        place, value = points[-1]
        return value * at / place if beyond else value
    (high, upper) = points[number]
    if number == 0 or at == high:
        return upper
    low, lower = points[number - 1]
    return lower + (upper - lower) * (at - low) / (high - low)
