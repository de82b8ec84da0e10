"""The result of comparing a bench with an earlier one (see :mod:`.regression`)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from conflayers_cli.bench.metrics import RegressionMetric
from conflayers_cli.utils.statistics import Change

Verdict = Literal["held", "unclear", "regression", "unknown"]


@dataclass(frozen=True)
class ComparedMetric:
    """One metric compared.

    Attributes:
        metric: which one.
        change: old, new and their ratio.
        verdict: by the rule of `regression`; "unknown" where one of the values is missing.
        judged: whether a regression here fails.
    """

    metric: RegressionMetric
    change: Change
    verdict: Verdict
    judged: bool

    @property
    def regressed(self) -> bool:
        """Whether this fails the comparison."""
        lost = self.verdict == "unknown" and self.metric is not RegressionMetric.ACCEPTANCE
        return self.judged and (lost or self.verdict == "regression")


@dataclass(frozen=True)
class Comparison:
    """What changed since an earlier bench.

    Attributes:
        old: the earlier one's name.
        prompts: how many were compared.
        tolerance: the share by which a metric may be lower.
        metrics: old against new, metric by metric.
        remarks: what else differs, in sentences.
    """

    old: str
    prompts: int
    tolerance: float
    metrics: tuple[ComparedMetric, ...]
    remarks: tuple[str, ...]

    @property
    def headline(self) -> str:
        """What was compared, in one line."""
        count = f"{self.prompts} prompt{'s' if self.prompts > 1 else ''}"
        return f"compared with {self.old}: {count}, tolerance {100 * self.tolerance:.3g} %"

    @property
    def regressions(self) -> tuple[str, ...]:
        """What got worse, in words; empty where nothing that is judged did.

        A speed that can't be compared, for want of one, is worse than one that can.
        """
        return tuple(_regression(compared, self) for compared in self.metrics if compared.regressed)

    def as_json(self) -> dict[str, Any]:
        """The comparison as JSON takes it."""
        return {
            "old": self.old,
            "prompts": self.prompts,
            "tolerance": self.tolerance,
            "figures": {
                compared.metric.value: {
                    **asdict(compared.change),
                    "judged": compared.judged,
                    "verdict": compared.verdict,
                }
                for compared in self.metrics
            },
            "remarks": list(self.remarks),
        }


def _regression(compared: ComparedMetric, comparison: Comparison) -> str:
    change = compared.change
    if change.ratio is None:
        return f"{compared.metric.label} could not be measured here and in {comparison.old}"
    ends = f" (95 % interval {change.low:.3f}–{change.high:.3f})" if change.low is not None else ""
    return (
        f"{compared.metric.label} is {change.ratio:.3f} of what it was in {comparison.old}{ends}, "
        f"under {1 - comparison.tolerance:.3g}"
    )
