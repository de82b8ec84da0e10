"""The metrics by which a bench is compared with an earlier one. Imports nothing heavy."""

from __future__ import annotations

from enum import Enum

TOLERANCE = 0.05
"""The share by which a metric may be lower, unless another is asked for."""


class RegressionMetric(Enum):
    """A metric by which a regression may be judged."""

    SPEEDUP = "speedup"
    ACCEPTANCE = "acceptance"
    SPEED = "speed"

    @property
    def label(self) -> str:
        """Its name in tables and messages."""
        return {
            RegressionMetric.SPEEDUP: "speed-up over vanilla",
            RegressionMetric.ACCEPTANCE: "accepted drafts",
            RegressionMetric.SPEED: "tokens/s, speculative",
        }[self]
