"""Options of a calibration: plain values that need no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

DEFAULT_BUDGET = 600.0
"""Seconds that the strategies of ``auto`` share."""
DEFAULT_MEMORY = 1024
"""MiB that a calibration may take beside the model."""
AUTO = "auto"
UNIFIED = "unified"
LOCAL = "local"


class DraftWeights(Enum):
    """What drafts compute with; AUTO takes what is predicted to be faster."""

    AUTO = "auto"
    OWN = "own"
    INT4 = "int4"


@dataclass(frozen=True)
class SearchOptions:
    """How plans are searched for.

    Attributes:
        strategy: a name of `registry.STRATEGIES`, or ``FILE.py:CLASS``.
        skip_ratio, search_interval, max_iterations, patience, context_window, target_speedup:
            settings of single strategies; None: the strategy's own default.
        budget: seconds after which the best plan by then is the answer; None: as long as it takes,
            or for ``auto`` `DEFAULT_BUDGET`.
        judged_prompts: prompts that plans are judged by; None: as many as are enough.
        memory: MiB that it may take beside the model's weights (see `search.texts`).
        refine: improve the found plan layer by layer; None: yes, except for ``unified``.
        refine_limit: the most plans scored in refinement.
        tree: also look for side candidates that pay.
        draft_weights: what drafts compute with.
        seed: of everything drawn at random.
    """

    strategy: str = LOCAL
    target_speedup: float | None = None
    budget: float | None = None
    skip_ratio: float | None = None
    search_interval: int | None = None
    max_iterations: int | None = None
    patience: int | None = None
    context_window: int | None = None
    refine: bool | None = None
    refine_limit: int = 500
    tree: bool = True
    draft_weights: DraftWeights = DraftWeights.AUTO
    judged_prompts: int | None = None
    memory: int = DEFAULT_MEMORY
    seed: int = 0

    @property
    def max_refined(self) -> int:
        """The most plans scored in refinement; 0: it is left out."""
        refine = self.strategy != UNIFIED if self.refine is None else self.refine
        return self.refine_limit if refine else 0

    @property
    def budget_seconds(self) -> float:
        """Seconds that several strategies share."""
        return self.budget or DEFAULT_BUDGET
