"""A strategy in one file: leave out every second, third or fourth layer, whichever pays best.

To be run with `conflayers calibrate --strategy every_other.py:EveryOther`.
"""

from __future__ import annotations

from dataclasses import dataclass

from conflayers_cli.search.objective import PAPER, DraftParams, Score
from conflayers_cli.search.problem import SearchProblem, SearchResult, Trial
from conflayers_cli.skip_plan import SkipPlan


@dataclass(frozen=True)
class EveryOther:
    """The fields are the settings; they go into the profile.

    Attributes:
        strides: from one layer left out to the next, in the order they are tried.
    """

    strides: tuple[int, ...] = (2, 3, 4)

    @property
    def name(self) -> str:
        """What the profile calls it; not one of the built-in names."""
        return "every-other"

    @property
    def setting(self) -> DraftParams:
        """How to draft where nothing better is known."""
        return PAPER

    def search(self, problem: SearchProblem) -> SearchResult:
        """Score a plan for each stride on texts that the model wrote itself.

        Ctrl-C ends it with the best plan so far, and so does the deadline.
        """
        trials: list[Trial] = []
        best: tuple[Trial, Score] | None = None
        reason, interrupted = "all strides tried", False
        try:
            for stride in self.strides:
                if problem.out_of_time:
                    reason = "out of time"
                    break
                # The first and the last layer always run.
                plan = SkipPlan.of_layers(range(1, problem.decoder.depth - 1, stride))
                score = problem.objective.score(plan)
                trial = Trial(
                    iteration=len(trials),
                    plan=plan,
                    speedup=score.speedup,
                    note=f"stride {stride}",
                    figures={"agreement": score.agreement},
                )
                if best is None or score.speedup > best[1].speedup:
                    best = trial, score
                trials.append(trial)
                problem.on_trial(trial, best[0])
        except KeyboardInterrupt:
            reason, interrupted = "interrupted", True
        return SearchResult(
            plan=best[1].plan if best else SkipPlan(),
            trials=tuple(trials),
            tensors={},
            interrupted=interrupted,
            stopped_because=reason,
            setting=best[1].setting if best else None,
        )
