"""Unified Layer Skipping: evenly spaced layers kept, by a target speed-up alone.

Source: arXiv 2404.06954 §3. It needs no data, and skips the same layers of every text, so that its
speed is known beforehand; which layers a model can do without plays no part.
"""

from __future__ import annotations

from dataclasses import dataclass

from conflayers_cli.errors import InputError
from conflayers_cli.search.objective import PAPER, Setting
from conflayers_cli.search.problem import SearchResult, Task, Trial
from conflayers_cli.skip_plan import SkipPlan

RULE = "a rule, not a search"


@dataclass(frozen=True)
class Unified:
    """The paper's rule.

    Attributes:
        target_speedup: S; as many layers are kept as the model's depth over S, two at least.
    """

    target_speedup: float

    @property
    def name(self) -> str:
        return "unified"

    @property
    def setting(self) -> Setting:
        return PAPER

    def search(self, task: Task) -> SearchResult:
        """The plan of the rule; how to draft with it is chosen by the task's texts, if any.

        Raises:
            InputError: a target speed-up under 1.
        """
        try:
            plan = SkipPlan.unified(task.decoder.depth, self.target_speedup)
        except ValueError as error:
            raise InputError(
                f"target_speedup {self.target_speedup:g}: {error}", names=("target_speedup",)
            ) from error
        try:
            if not task.prompts or not task.objective.texts:
                return SearchResult(plan, (), {}, False, RULE)
            score = task.objective.modest(plan)
        except KeyboardInterrupt:
            return SearchResult(plan, (), {}, True, "interrupted")
        trial = Trial(0, plan, 0, 0, 0, score.speedup, "by rule", {"agreement": score.agreement})
        task.on_trial(trial, trial)
        return SearchResult(plan, (trial,), {}, False, RULE, setting=score.setting)
