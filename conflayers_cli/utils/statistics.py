"""Middle values of measured figures, and the 95 % confidence intervals about them.

Two kinds. A figure by itself is a median, with a percentile bootstrap, which asks for no law of the
figures. A change between two measurements is a geometric mean of ratios, with Student's t on their
logarithms: with the handful of pairs that a CI job has, a bootstrap's intervals are too narrow.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import scipy.stats
from pydantic import BaseModel, ConfigDict, Field

MIN_RATIOS = 3
"""Fewer than this say nothing about an interval."""
CONFIDENCE = 0.95


PositiveFigure = Annotated[float, Field(gt=1e-9, lt=1e9)]
"""A ratio or a speed."""


class _Figures(BaseModel):
    """Checked strictly, also where they are read from a file; keys not known here are kept."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="allow")


class Interval(_Figures):
    """A median and its 95 % confidence interval; None where there is too little to tell."""

    median: PositiveFigure | None
    low: PositiveFigure | None
    high: PositiveFigure | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Of paired ratios or other figures, by a percentile bootstrap of their median, seeded."""
        if not values:
            return cls(median=None, low=None, high=None)
        median = statistics.median(values)
        if len(values) < MIN_RATIOS:
            return cls(median=median, low=None, high=None)
        found = scipy.stats.bootstrap(
            (np.asarray(values),),
            np.median,
            method="percentile",
            confidence_level=CONFIDENCE,
            rng=np.random.default_rng(0),
        )
        interval = found.confidence_interval
        return cls(median=median, low=float(interval.low), high=float(interval.high))


class Spread(_Figures):
    """Median, least and greatest of some figures; None where there are none."""

    median: PositiveFigure | None
    min: PositiveFigure | None
    max: PositiveFigure | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of figures, possibly none."""
        if not values:
            return cls(median=None, min=None, max=None)
        return cls(median=statistics.median(values), min=min(values), max=max(values))


@dataclass(frozen=True)
class Change:
    """New over old, as a ratio, and its 95 % confidence interval.

    Attributes:
        old, new: the two middle values, ``new / old`` being the ratio.
        ratio: None where one of them is missing.
        low, high: None where there is too little to tell, or where nothing is left to chance.
    """

    old: float | None
    new: float | None
    ratio: float | None
    low: float | None = None
    high: float | None = None

    @classmethod
    def paired(cls, new: Sequence[float], old: Sequence[float]) -> Change:
        """Of positive figures in pairs: geometric means, and Student's t on the log ratios."""
        if not new:
            return cls(None, None, None)
        logs = np.log(new) - np.log(old)
        error = scipy.stats.sem(logs) if len(new) >= MIN_RATIOS else None
        return cls._of_logs(new, old, float(np.mean(logs)), error, len(new) - 1)

    @classmethod
    def unpaired(cls, new: Sequence[float], old: Sequence[float]) -> Change:
        """Of figures in two lots that don't pair: geometric means, and Welch's t on the logs."""
        if not new or not old:
            return cls(None, None, None)
        lots = [np.log(new), np.log(old)]
        shift = float(np.mean(lots[0]) - np.mean(lots[1]))
        if min(len(new), len(old)) < MIN_RATIOS:
            return cls._of_logs(new, old, shift, None, 1)
        squares = [float(np.var(lot, ddof=1)) / len(lot) for lot in lots]
        total = sum(squares)
        # Welch–Satterthwaite; figures that don't vary at all have no error whatever their number
        below = sum(s**2 / (len(lot) - 1) for s, lot in zip(squares, lots, strict=True))
        freedom = total**2 / below if below > 0 else 1.0
        return cls._of_logs(new, old, shift, total**0.5, freedom)

    @classmethod
    def _of_logs(
        cls,
        new: Sequence[float],
        old: Sequence[float],
        shift: float,
        error: float | None,
        freedom: float,
    ) -> Change:
        """From the mean log ratio and its standard error, None where that isn't known."""
        change = cls(
            old=statistics.geometric_mean(old),
            new=statistics.geometric_mean(new),
            ratio=float(np.exp(shift)),
        )
        if error is None:
            return change
        reach = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * float(error)
        return replace(change, low=float(np.exp(shift - reach)), high=float(np.exp(shift + reach)))
