"""Greedy: drop one sub-layer at a time, whichever leaves most tokens per second. A plain baseline.

Effects are judged lazily: what a sub-layer did when it was last tried says where to look first, and
only the most promising few are tried again on top of what is left out by now.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from conflayers_cli.search.local_search import Move
from conflayers_cli.search.objective import PAPER, Objective, Score, Setting
from conflayers_cli.search.problem import SearchResult, Task, Trial
from conflayers_cli.skip_plan import SkipPlan


@dataclass(frozen=True)
class Greedy:
    """The baseline's settings.

    Attributes:
        texts: texts that each try is judged by.
        first_texts: texts for the first look at every sub-layer alone.
        hopeless: a sub-layer without which, all others in place, the draft agrees with the model at
            a lower share of positions than this is never tried again.
        promising: sub-layers tried in every round.
        patience: rounds in a row that may bring no faster plan before the search ends; the first
            drops always cost more than they save.
    """

    texts: int = 3
    first_texts: int = 2
    hopeless: float = 0.8
    promising: int = 4
    patience: int = 12

    @property
    def name(self) -> str:
        return "greedy"

    @property
    def setting(self) -> Setting:
        return PAPER

    def search(self, task: Task) -> SearchResult:
        """Drop sub-layers until no drop has made the plan faster for a while."""
        run = _Run(self, task)
        interrupted, reason = False, "interrupted"
        try:
            reason = run.run()
        except KeyboardInterrupt:
            interrupted = True
        best = run.best
        return SearchResult(
            plan=best.plan if best else SkipPlan(),
            trials=tuple(run.trials),
            tensors=run.tensors,
            interrupted=interrupted,
            stopped_because=reason,
            setting=best.setting if best else None,
        )


class _Run:
    def __init__(self, settings: Greedy, task: Task) -> None:
        self.settings = settings
        self.task = task
        self.objective: Objective = task.objective
        self.trials: list[Trial] = []
        self.best: Score | None = None
        self._best_trial: Trial | None = None
        self._promise: dict[Move, float] = {}
        depth = task.decoder.depth
        self._alone = torch.full((2, depth), torch.nan)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Agreement without a single sub-layer, ``[2, L]``: attention, MLP; NaN: not tried."""
        return {"agreement_without": self._alone}

    def run(self) -> str:
        """The search; why it ended."""
        if not self.objective.texts:
            return "no text to judge by"
        if not self._look_at_each():
            return "out of time"
        if not self._promise:
            return f"no sub-layer alone leaves an agreement of {self.settings.hopeless:g}"
        plan, since = SkipPlan(), 0
        while self._promise and since < self.settings.patience:
            if self.task.out_of_time:
                return "out of time"
            score = self._drop_one(plan)
            plan = score.plan
            since = 0 if score is self.best else since + 1
        return f"no faster plan in {since} drops" if self._promise else "nothing left to drop"

    def _look_at_each(self) -> bool:
        """Try every sub-layer alone; False when the time was over before the end."""
        decoder = self.task.decoder
        pairs = [(True, False), (False, True)] if len(decoder.sub_layers) == 2 else [(True, True)]
        for layer in range(1, decoder.depth - 1):
            for attention, mlp in pairs:
                if self.task.out_of_time:
                    return False
                move = Move(layer, attention, mlp)
                score = self.objective.score(move.apply(SkipPlan()), self.settings.first_texts)
                for row, named in enumerate((attention, mlp)):
                    if named:
                        self._alone[row, layer] = score.agreement
                if score.agreement >= self.settings.hopeless:
                    self._promise[move] = score.speedup
        return True

    def _drop_one(self, plan: SkipPlan) -> Score:
        """Drop the best of the promising sub-layers from a plan; its score."""
        ranked = sorted(self._promise, key=self._promise.__getitem__)[-self.settings.promising :]
        texts = self.settings.texts
        tried = {move: self.objective.score(move.apply(plan), texts) for move in ranked}
        self._promise |= {move: score.speedup for move, score in tried.items()}
        taken = max(tried, key=lambda move: tried[move].speedup)
        del self._promise[taken]
        score = tried[taken]
        better = self.best is None or score.speedup > self.best.speedup
        trial = Trial(
            iteration=len(self.trials),
            plan=score.plan,
            steps=0,
            drafted=0,
            accepted=0,
            speedup=score.speedup,
            note="best so far" if better else "",
            figures={"agreement": score.agreement},
        )
        self.trials.append(trial)
        if better:
            self.best, self._best_trial = score, trial
        self.task.on_trial(trial, self._best_trial)
        return score
