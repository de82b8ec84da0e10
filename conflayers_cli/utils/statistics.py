"""Medians, means of ratios, and their 95 % confidence intervals.

A figure by itself is a median with a percentile bootstrap, which assumes no distribution. A change
between two measurements is a geometric mean of ratios with Student's t on their logarithms: for the
handful of pairs that a CI job has, intervals of a bootstrap are too narrow.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import scipy.stats
from pydantic import BaseModel, ConfigDict, Field

MIN_RATIOS = 3
"""Fewer give no interval."""
CONFIDENCE = 0.95

PositiveFigure = Annotated[float, Field(gt=1e-9, lt=1e9)]
"""A ratio or a speed."""


class _Figures(BaseModel):
    """Checked strictly, also where they are read from a file; keys not known here are kept."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="allow")


class Interval(_Figures):
    """A median and its 95 % confidence interval; None where there are too few values."""

    median: PositiveFigure | None
    low: PositiveFigure | None
    high: PositiveFigure | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """By a percentile bootstrap of the median, seeded."""
        if not values:
            return cls(median=None, low=None, high=None)
        median = statistics.median(values)
        if len(values) < MIN_RATIOS:
            return cls(median=median, low=None, high=None)
        interval = scipy.stats.bootstrap(
            (np.asarray(values),),
            np.median,
            method="percentile",
            confidence_level=CONFIDENCE,
            rng=np.random.default_rng(0),
        ).confidence_interval
        return cls(median=median, low=float(interval.low), high=float(interval.high))


class Spread(_Figures):
    """Median, minimum and maximum; None where there are no values."""

    median: PositiveFigure | None
    min: PositiveFigure | None
    max: PositiveFigure | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if not values:
            return cls(median=None, min=None, max=None)
        return cls(median=statistics.median(values), min=min(values), max=max(values))


@dataclass(frozen=True)
class Change:
    """New over old, as a ratio, and its 95 % confidence interval.

    Attributes:
        old, new: the two geometric means; the ratio is ``new / old``.
        ratio: None where one of them is missing.
        low, high: None where there are too few values, or where nothing is random.
    """

    old: float | None
    new: float | None
    ratio: float | None
    low: float | None = None
    high: float | None = None

    @classmethod
    def paired(cls, new: Sequence[float], old: Sequence[float]) -> Change:
        """Of pairs of positive figures, by Student's t on the log ratios."""
        if not new:
            return cls(None, None, None)
        logs = np.log(new) - np.log(old)
        low, high = _interval(lambda: scipy.stats.ttest_1samp(logs, popmean=0.0), len(new))
        return cls(_mean(old), _mean(new), float(np.exp(np.mean(logs))), low, high)

    @classmethod
    def unpaired(cls, new: Sequence[float], old: Sequence[float]) -> Change:
        """Of two samples of positive figures, by Welch's t on the logarithms."""
        if not new or not old:
            return cls(None, None, None)
        logs, old_logs = np.log(new), np.log(old)
        low, high = _interval(
            lambda: scipy.stats.ttest_ind(logs, old_logs, equal_var=False), min(len(new), len(old))
        )
        ratio = float(np.exp(np.mean(logs) - np.mean(old_logs)))
        return cls(_mean(old), _mean(new), ratio, low, high)


_mean = statistics.geometric_mean


def _interval(test: Callable[[], Any], count: int) -> tuple[float, float] | tuple[None, None]:
    """The confidence interval that a t test of ``count`` log ratios gives, as ratios."""
    if count < MIN_RATIOS:
        return None, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on the precision of figures that don't vary
        found = test().confidence_interval(CONFIDENCE)
    return float(np.exp(found.low)), float(np.exp(found.high))
