"""What passes cost, learnt from the decoding itself: nothing is measured apart from its use.

Before a width was seen its cost follows from the nearest one that was, and from how passes grow
where weights are read once for all tokens.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Mapping
from math import exp, log

from conflayers_cli.engine.cost_model import CostTable, PassCosts

GROWTH = ((1, 1.0), (2, 1.08), (3, 1.12), (5, 1.3), (9, 2.0), (17, 3.8), (26, 5.8))
"""(width, seconds over those of one token), as with native kernels on two kinds of processor."""
REMEMBERED = 256
"""Passes that count, the latest ones: contexts grow, and what else the machine does changes."""
MIN_SEEN = 2
"""Passes of a width before it is believed: a single one may have been disturbed."""
MOST_WEIGHT = 15
"""Passes of a width beyond which more of them say no more."""
BREADTH = 0.35
"""How far passes tell of those of other widths, in logarithms of the width."""


class PassTimes:
    """Seconds of passes by their width in tokens.

    A pass over several sequences counts as one as wide as all their tokens together, which is what
    reads weights alike; their attention differs.
    """

    def __init__(self, known: Mapping[int, float] | None = None) -> None:
        self._passes: deque[tuple[int, float]] = deque(maxlen=REMEMBERED)
        for width, seconds in (known or {}).items():
            self._passes.extend([(width, seconds)] * MIN_SEEN)

    def add(self, width: int, seconds: float) -> None:
        self._passes.append((width, seconds))

    @property
    def known(self) -> dict[int, float]:
        """Median seconds by the widths seen."""
        return {width: statistics.median(times) for width, times in self._by_width().items()}

    def costs(self, widths: Iterable[int]) -> dict[int, float]:
        """Seconds by width, never falling; 1 for a single token where no pass was seen.

        What passes take over their usual growth is averaged over neighbouring widths: of each
        there are few, and what disturbs one of them must not look like a step.
        """
        ratios = [
            (log(width), statistics.median(times) / _growth(width), min(len(times), MOST_WEIGHT))
            for width, times in self._by_width().items()
        ]
        found, slowest = {}, 0.0
        for width in sorted(widths):
            found[width] = slowest = max(slowest, _growth(width) * _average(ratios, log(width)))
        return found

    def _by_width(self) -> dict[int, list[float]]:
        times: dict[int, list[float]] = {}
        for width, seconds in self._passes:
            times.setdefault(width, []).append(seconds)
        return {width: own for width, own in sorted(times.items()) if len(own) >= MIN_SEEN}


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


def _average(ratios: list[tuple[float, float, int]], at: float) -> float:
    """The average of (place, value, weight) by nearness to a place; 1 where there are none."""
    if not ratios:
        return 1.0
    nearest = min(abs(place - at) for place, _, _ in ratios)
    weights = [
        weight * exp((nearest**2 - (place - at) ** 2) / (2 * BREADTH**2))
        for place, _, weight in ratios
    ]
    total = sum(w * value for w, (_, value, _) in zip(weights, ratios, strict=True))
    return total / sum(weights)


def _growth(width: int) -> float:
    """The usual seconds of a pass over those of one token: by straight lines, and beyond the last
    width in proportion."""
    number = bisect_left([known for known, _ in GROWTH], width)
    if number == len(GROWTH):
        known, grown = GROWTH[-1]
        return grown * width / known
    high, upper = GROWTH[number]
    if number == 0 or width == high:
        return upper
    low, lower = GROWTH[number - 1]
    return lower + (upper - lower) * (width - low) / (high - low)
