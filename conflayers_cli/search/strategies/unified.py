"""Unified Layer Skipping: evenly spaced layers kept, by a target speed-up alone.

Source: arXiv 2404.06954 §3. It needs no data, and skips the same layers of every text, so that its
speed is known beforehand; how much the model needs a layer plays no part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from conflayers_cli.errors import InputError
from conflayers_cli.search.objective import PAPER, DraftParams
from conflayers_cli.search.problem import SearchProblem, SearchResult, Trial
from conflayers_cli.skip_plan import SkipPlan

RULE = "a rule, not a search"


@dataclass(frozen=True)
class Unified:
    """The paper's rule.

    Attributes:
        target_speedup: S; as many layers are kept as the model's depth over S, two at least.
    """

    name: ClassVar[str] = "unified"
    setting: ClassVar[DraftParams] = PAPER
    target_speedup: float

    def search(self, problem: SearchProblem) -> SearchResult:
        """The rule's plan; how to draft with it is chosen by the problem's continuations, if any.

        Raises:
            InputError: a target speed-up under 1.
        """
        try:
            plan = SkipPlan.unified(problem.decoder.depth, self.target_speedup)
        except ValueError as error:
            raise InputError(
                f"target_speedup {self.target_speedup:g}: {error}", names=("target_speedup",)
            ) from error
        try:
            if not problem.prompts or not problem.objective.num_texts:
                return SearchResult(plan, (), {}, False, RULE)
            score = problem.objective.conservative_score(plan)
        except KeyboardInterrupt:
            return SearchResult(plan, (), {}, True, "interrupted")
        figures = {"agreement": score.agreement}
        trial = Trial(0, plan, speedup=score.speedup, note="by rule", figures=figures)
        problem.on_trial(trial, trial)
        return SearchResult(plan, (trial,), {}, False, RULE, setting=score.setting)
