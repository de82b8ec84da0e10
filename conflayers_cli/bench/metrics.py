"""The figures that a bench is compared with an earlier one by."""

from __future__ import annotations

from enum import Enum

TOLERANCE = 0.05
"""The share by which a figure may be lower, unless another is asked for."""


class Judged(Enum):
    """A figure that a regression may be judged by."""

    SPEEDUP = "speedup"
    ACCEPTANCE = "acceptance"
    SPEED = "speed"

    @property
    def label(self) -> str:
        """What people call it."""
        return {
            Judged.SPEEDUP: "speed-up over vanilla",
            Judged.ACCEPTANCE: "accepted drafts",
            Judged.SPEED: "tokens/s, speculative",
        }[self]
