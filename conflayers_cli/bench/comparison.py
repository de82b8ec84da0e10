"""What a bench has to say when it is compared with an earlier one (see :mod:`conflayers_cli.bench.runner.regression`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from conflayers_cli.bench.metrics import Judged
from conflayers_cli.utils.statistics import Change

Verdict = Literal["held", "unclear", "regression", "unknown"]


@dataclass(frozen=True)
class Row:
    """One figure compared.

    Attributes:
        figure: which one.
        change: old, new and their ratio.
        verdict: by the rule above; "unknown" where one of the values is missing.
        judged: whether a regression here fails.
    """

    figure: Judged
    change: Change
    verdict: Verdict
    judged: bool

    @property
    def regressed(self) -> bool:
        lost = self.verdict == "unknown" and self.figure is not Judged.ACCEPTANCE
        return self.judged and (lost or self.verdict == "regression")


@dataclass(frozen=True)
class Comparison:
    """What changed since an earlier bench.

    Attributes:
        old: the earlier one's name.
        prompts: how many were compared.
        tolerance: the share by which a figure may be lower.
        rows: the figures.
        remarks: what else differs, in sentences.
    """

    old: str
    prompts: int
    tolerance: float
    rows: tuple[Row, ...]
    remarks: tuple[str, ...]

    @property
    def headline(self) -> str:
        count = f"{self.prompts} prompt{'s' if self.prompts > 1 else ''}"
        return f"compared with {self.old}: {count}, tolerance {100 * self.tolerance:.3g} %"

    @property
    def regressions(self) -> tuple[str, ...]:
        """What got worse, in words; empty where nothing that is judged did.

        A speed that can't be compared, for want of one, is worse than one that can.
        """
        return tuple(_regression(row, self) for row in self.rows if row.regressed)

    def as_json(self) -> dict[str, Any]:
        """The comparison as JSON takes it."""
        return {
            "old": self.old,
            "prompts": self.prompts,
            "tolerance": self.tolerance,
            "figures": {
                row.figure.value: {
                    "old": row.change.old,
                    "new": row.change.new,
                    "ratio": row.change.ratio,
                    "low": row.change.low,
                    "high": row.change.high,
                    "judged": row.judged,
                    "verdict": row.verdict,
                }
                for row in self.rows
            },
            "remarks": list(self.remarks),
        }


def _regression(row: Row, comparison: Comparison) -> str:
    change = row.change
    if change.ratio is None:
        return f"{row.figure.label} could not be measured here and in {comparison.old}"
    ends = f" (95 % interval {change.low:.3f}–{change.high:.3f})" if change.low is not None else ""
    return (
        f"{row.figure.label} is {change.ratio:.3f} of what it was in {comparison.old}{ends}, under "
        f"{1 - comparison.tolerance:.3g}"
    )
