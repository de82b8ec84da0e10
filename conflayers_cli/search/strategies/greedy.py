"""Greedy: drop one sub-layer at a time, whichever leaves most tokens per second. A plain baseline.

A sub-layer's effect when it was last tried says where to look first; only the most promising few
are tried again with what is skipped by now.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from conflayers_cli.search.local_search import Move
from conflayers_cli.search.objective import PAPER, DraftParams, Score
from conflayers_cli.search.problem import SearchProblem, SearchResult
from conflayers_cli.search.strategies.base import ScoringSearch
from conflayers_cli.skip_plan import SkipPlan


@dataclass(frozen=True)
class Greedy:
    """The baseline's settings.

    Attributes:
        texts: texts that each try is judged by.
        first_texts: texts for the first look at every sub-layer alone.
        hopeless: a sub-layer is never tried again if skipping it alone makes the draft agree with
            the model at a lower share of positions than this.
        promising: sub-layers tried in every round.
        patience: rounds in a row that may bring no faster plan before the search ends; the first
            drops always cost more than they save.
    """

    name: ClassVar[str] = "greedy"
    setting: ClassVar[DraftParams] = PAPER
    texts: int = 3
    first_texts: int = 2
    hopeless: float = 0.8
    promising: int = 4
    patience: int = 12

    def search(self, problem: SearchProblem) -> SearchResult:
        """Drop sub-layers until no drop has made the plan faster for a while."""
        return _Run(self, problem).run()


class _Run(ScoringSearch):
    def __init__(self, settings: Greedy, problem: SearchProblem) -> None:
        super().__init__(problem)
        self.settings = settings
        self.objective = problem.objective
        # Agreement without a single sub-layer, [2, L]: attention, MLP; NaN: not tried.
        self._alone = torch.full((2, problem.decoder.depth), torch.nan)
        self.tensors["agreement_without"] = self._alone
        self._promise: dict[Move, float] = {}

    def search(self) -> str:
        if not self.objective.num_texts:
            return "no text to judge by"
        if not self._try_each():
            return "out of time"
        if not self._promise:
            return f"no sub-layer alone leaves an agreement of {self.settings.hopeless:g}"
        plan, since = SkipPlan(), 0
        while self._promise and since < self.settings.patience:
            if self.problem.out_of_time:
                return "out of time"
            score = self._best_drop(plan)
            plan, figures = score.plan, {"agreement": score.agreement}
            better = self.note(plan, score.setting, score.speedup, figures)
            since = 0 if better else since + 1
        return f"no faster plan in {since} drops" if self._promise else "nothing left to drop"

    def _try_each(self) -> bool:
        """Try every sub-layer alone; False: the time was over before the end."""
        decoder = self.problem.decoder
        pairs = [(True, False), (False, True)] if len(decoder.sub_layers) == 2 else [(True, True)]
        for layer in range(1, decoder.depth - 1):
            for attention, mlp in pairs:
                if self.problem.out_of_time:
                    return False
                move = Move(layer, attention, mlp)
                score = self.objective.score(move.apply(SkipPlan()), self.settings.first_texts)
                self._alone[[attention, mlp], layer] = score.agreement
                if score.agreement >= self.settings.hopeless:
                    self._promise[move] = score.speedup
        return True

    def _best_drop(self, plan: SkipPlan) -> Score:
        """Drop the best of the promising sub-layers from a plan; its score."""
        ranked = sorted(self._promise, key=self._promise.__getitem__)[-self.settings.promising :]
        texts = self.settings.texts
        tried = {move: self.objective.score(move.apply(plan), texts) for move in ranked}
        self._promise |= {move: score.speedup for move, score in tried.items()}
        taken = max(tried, key=lambda move: tried[move].speedup)
        del self._promise[taken]
        return tried[taken]
