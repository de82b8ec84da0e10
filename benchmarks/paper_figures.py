"""What the papers report, with the place of each figure, to compare with ours.

Speed-ups are over transformers' eager `generate`, on the authors' GPUs and models: they are to be
compared with this benchmark's column over `generate`, not with the one over this engine's own
plain decoding, which is faster. The papers give them as ranges over their models and tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """A published figure.

    Attributes:
        strategies: whose it is, by the names of ``--strategies``.
        source: the paper, and where in it or beside it.
        models, tasks: which the figure is for; empty: a range over the paper's own.
        speedup: over eager `generate`, as it is given.
        tokens_per_step: the mean of a verify step, the model's own token included.
        acceptance_rate: drafted tokens kept, of all drafted.
    """

    strategies: tuple[str, ...]
    source: str
    models: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    speedup: str | None = None
    tokens_per_step: float | None = None
    acceptance_rate: float | None = None

    @property
    def text(self) -> str:
        """The figures on one line."""
        parts = [f"{self.speedup}×"] if self.speedup else []
        if self.tokens_per_step is not None:
            parts.append(f"{self.tokens_per_step:.2f} tokens/step")
        if self.acceptance_rate is not None:
            parts.append(f"{self.acceptance_rate:.1%} accepted")
        return ", ".join(parts)

    def as_json(self) -> Mapping[str, Any]:
        """The figure as results hold it: what is not given is left out."""
        return {key: value for key, value in asdict(self).items() if value not in (None, ())}


_CONFLAYERS = ("conflayers", "published")
_LOGS = "ConfLayers, arXiv 2604.14612, the authors' released logs"
FIGURES = (
    Published(_CONFLAYERS, _LOGS, ("llama-2-13b",), ("cnndm",), None, 4.33, 0.972),
    Published(_CONFLAYERS, _LOGS, ("llama-2-13b",), ("gsm8k",), None, 3.39, 0.860),
    Published(_CONFLAYERS, _LOGS, ("llama-2-70b",), ("gsm8k",), None, 3.62, 0.946),
    Published(_CONFLAYERS, "ConfLayers, arXiv 2604.14612, the paper's range", speedup="up to 1.4"),
    Published(("swift",), "SWIFT, arXiv 2410.06916, the paper's range", speedup="1.3–1.6"),
    Published(("clasp",), "CLaSp, arXiv 2505.24196, the paper's range", speedup="1.3–1.7"),
    Published(("knapsack",), "KnapSpec, arXiv 2602.20217, the paper's range", speedup="up to 1.47"),
)
"""Of `unified`, `greedy` and `auto` none: Unified Layer Skipping (arXiv 2404.06954) is lossy where
it is published, and the other two are this project's."""


def published(strategy: str, model: str, task: str) -> list[Published]:
    """The figures that a cell may be compared with, those for the very model and task first."""
    fitting = [
        figure
        for figure in FIGURES
        if strategy in figure.strategies
        and (not figure.models or model in figure.models)
        and (not figure.tasks or task in figure.tasks)
    ]
    return sorted(fitting, key=lambda figure: (not figure.models, not figure.tasks))
