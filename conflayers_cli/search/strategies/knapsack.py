"""Knapsack selection: the best hidden states for every amount of time saved.

Source: KnapSpec, arXiv 2602.20217; CLaSp, arXiv 2505.24196, is its case of whole layers that weigh
one unit each. Values are similarities of hidden states (see :mod:`.knapsack_dp`), weights are the
sub-layers' measured latencies, and attention's grows with the context, so that another plan may be
the best one for longer texts. Of the best plans for all budgets, the one with most expected tokens
per second is taken, with the draft length that gives them.

The agreement behind that expectation comes from few tokens. It is therefore taken as falling the
more is skipped, which pools the evidence of neighbouring budgets, and never as certain.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import isotonic_regression

from conflayers_cli.engine.cost_model import PassCosts
from conflayers_cli.errors import InputError
from conflayers_cli.search.corpus import Continuation
from conflayers_cli.search.objective import DraftParams
from conflayers_cli.search.problem import RangePlan, SearchProblem, SearchResult
from conflayers_cli.search.strategies.base import ScoringSearch, check_depth
from conflayers_cli.search.strategies.knapsack_dp import DynamicProgram, KnapsackWeights, SkipPath
from conflayers_cli.search.strategies.knapsack_window import TokenWindow
from conflayers_cli.skip_plan import SkipPlan

LONGER = (4, 16)
"""Longer contexts looked at, as multiples of the one that the costs were measured at."""
NOTED = 12  # budgets that become trials, those with the highest expected speed
CLOSE = 1.05  # a ratio of weights within this factor of the latencies' is close enough
FIGURES = ("similarity", "agreement", "saved")
MAX_RATIO = 16.0  # latencies farther apart than this factor are taken to be this far apart


@dataclass(frozen=True)
class Knapsack:
    """The search's settings.

    Attributes:
        window: tokens that hidden states are compared at.
        texts: texts they are spread over.
        least_similarity: paths less similar to the full model than this are dropped.
        most_units: budgets at the most; finer weights are given up for it.
        most_saved: share of the inner layers' time that a plan may save at the most.
        most_draft: tokens drafted per step at the most.
        context_lengths: contexts to look for other plans at; empty: `LONGER`. Those that the model
            does not take are left out.
        whole_layers: skip whole layers only.
        unit_weights: every sub-layer weighs the same, whatever time it takes.

    Raises:
        InputError: a setting is out of its range.
    """

    window: int = 32
    texts: int = 4
    least_similarity: float = 0.5
    most_units: int = 256
    most_saved: float = 0.65
    most_draft: int = 16
    context_lengths: tuple[int, ...] = ()
    whole_layers: bool = False
    unit_weights: bool = False

    def __post_init__(self) -> None:
        if min(self.window, self.texts, self.most_units, self.most_draft) < 1:
            raise InputError("window, texts, most_units and most_draft must be 1 or more")
        if not 0 < self.most_saved <= 1:
            raise InputError(
                f"most_saved is a share of the time, over 0 to 1, not {self.most_saved:g}"
            )

    @classmethod
    def clasp(cls) -> Knapsack:
        """CLaSp: whole layers, one unit each."""
        return cls(whole_layers=True, unit_weights=True)

    @property
    def name(self) -> str:
        return "clasp" if self.whole_layers and self.unit_weights else "knapsack"

    @property
    def setting(self) -> DraftParams:
        return DraftParams(self.most_draft, 0.0)

    def search(self, problem: SearchProblem) -> SearchResult:
        """Fill the budgets for the measured context, choose among them, look at longer contexts.

        Raises:
            InputError: the model is too shallow.
        """
        check_depth(problem.decoder)
        return _Run(self, problem).run()


@dataclass(frozen=True)
class ScoredPath:
    """A path, the draft length with most expected tokens per second, and these over vanilla's."""

    path: SkipPath
    setting: DraftParams
    speedup: float


class _Run(ScoringSearch):
    def __init__(self, settings: Knapsack, problem: SearchProblem) -> None:
        super().__init__(problem)
        self.settings = settings
        self._continuations: tuple[Continuation, ...] = ()
        self._window: TokenWindow | None = None
        self._num_tokens = 0
        self._paths: dict[KnapsackWeights, tuple[SkipPath, ...]] = {}

    def search(self) -> str:
        if self.problem.out_of_time:
            return "out of time"
        self._continuations = self.problem.continuations.get(self.settings.texts)
        if not self._continuations:
            return "no text to judge by"
        scored = self._score(self.problem.costs)
        if not scored:
            return "out of time" if self.problem.out_of_time else "nothing can be left out"
        self._note_budgets(scored)
        for context in self._longer_contexts():
            if self.problem.out_of_time:
                return "out of time"
            self._search_range(context)
        return f"compared {len(scored)} budgets"

    def _score(self, costs: PassCosts) -> list[ScoredPath]:
        """The best path for every budget at these costs, over all programs run so far."""
        settings, depth = self.settings, self.problem.decoder.depth
        weights = self._weights(costs)
        if weights not in self._paths:
            found = self.problem.memo.cached(
                f"{settings.name}: attention weighs {weights.attention}, MLP {weights.mlp}",
                lambda: self._run_program(weights),
            )
            self._num_tokens = found["tokens"]
            self._paths[weights] = tuple(
                SkipPath(SkipPlan.of(attention, mlp), saved, similarity, agreement)
                for attention, mlp, saved, similarity, agreement in found["paths"]
            )
            self.tensors.setdefault("similarity", torch.from_numpy(found["similarity"]))
        return [
            each
            for paths in self._paths.values()
            for each in score_paths(paths, costs, depth, self._num_tokens, settings.most_draft)
        ]

    def _run_program(self, weights: KnapsackWeights) -> dict[str, Any]:
        """Run the dynamic program with these weights; its result as a memo entry."""
        settings, problem = self.settings, self.problem
        if self._window is None:
            self._window = TokenWindow(problem.decoder, self._continuations, settings.window)
        units = int(settings.most_saved * (problem.decoder.depth - 2) * weights.layer)
        deadline = None
        if problem.deadline is not None:
            deadline = time.perf_counter() + problem.deadline - problem.memo.usage().seconds
        program = DynamicProgram(
            problem.decoder,
            self._window,
            weights,
            max_saved=min(max(units, 1), settings.most_units),
            min_similarity=settings.least_similarity,
            deadline=deadline,
        )
        paths = [
            [path.plan.attention, path.plan.mlp, path.saved, path.similarity, path.agreement]
            for path in program.run()
        ]
        similarity = program.similarity.numpy()
        return {"tokens": self._window.size, "paths": paths, "similarity": similarity}

    def _weights(self, costs: PassCosts) -> KnapsackWeights:
        if self.settings.whole_layers or len(self.problem.decoder.sub_layers) < 2:
            return KnapsackWeights.whole()
        if self.settings.unit_weights:
            return KnapsackWeights.of(1, 1)
        saved = self.settings.most_saved * (self.problem.decoder.depth - 2)
        return fit_weights(costs, max_sum=int(self.settings.most_units / saved))

    def _note_budgets(self, scored: Sequence[ScoredPath]) -> None:
        """Save the best budgets as trials, in the order of what they save, and the tensors."""
        budgets = self.tensors["similarity"].shape[1]
        for name in ("agreement", "speedup"):
            self.tensors[name] = torch.full((budgets,), torch.nan)
        for each in scored:
            self.tensors["agreement"][each.path.saved] = each.path.agreement
            self.tensors["speedup"][each.path.saved] = each.speedup
        ranked = sorted(scored, key=lambda each: each.speedup, reverse=True)[:NOTED]
        for each in sorted(ranked, key=lambda each: each.path.saved):
            figures = {name: getattr(each.path, name) for name in FIGURES}
            self.note(each.path.plan, each.setting, each.speedup, figures)

    def _longer_contexts(self) -> list[int]:
        """The longer contexts to look at, ascending."""
        costs, decoder = self.problem.costs, self.problem.decoder
        if self.settings.unit_weights or not costs.attention_per_position:
            return []
        wanted = self.settings.context_lengths or tuple(n * costs.context for n in LONGER)
        max_length = min(
            getattr(decoder.config, "max_position_embeddings", None) or math.inf,
            decoder.exact_positions or math.inf,
        )
        return sorted({n for n in wanted if costs.context < n <= max_length})

    def _search_range(self, context: int) -> None:
        """Keep the best plan for a longer context, if it is another one than just before."""
        scored = self._score(self.problem.costs.at(context, self.problem.decoder.depth))
        best = max(scored, key=lambda each: each.speedup)
        before = self.ranges[-1].plan if self.ranges else self.best and self.best.plan
        if best.path.plan != before:
            self.ranges.append(RangePlan(context, best.path.plan, best.setting))


def fit_weights(costs: PassCosts, max_sum: int) -> KnapsackWeights:
    """Small weights in the ratio of the sub-layers' latencies, together ``max_sum`` at the most.

    The smallest pair within 5 % of the ratio, else the closest one.
    """
    ratio = 1.0
    if max(costs.attention, costs.mlp) > 0:
        least = max(costs.attention, costs.mlp) / MAX_RATIO
        ratio = max(costs.attention, least) / max(costs.mlp, least)

    def error(pair: tuple[int, int]) -> float:
        return abs(math.log(pair[0] / pair[1] / ratio))

    pairs = [(a, layer - a) for layer in range(2, max(max_sum, 2) + 1) for a in range(1, layer)]
    close = (pair for pair in pairs if error(pair) <= math.log(CLOSE))
    attention, mlp = next(close, min(pairs, key=error))
    return KnapsackWeights.of(attention, mlp)


def score_paths(
    paths: Sequence[SkipPath], costs: PassCosts, depth: int, num_tokens: int, max_draft: int
) -> list[ScoredPath]:
    """The best draft length for every path that skips something.

    Expected tokens per time are ``(1 − α^{γ+1}) / (1 − α) / (γ·t_draft + t_verify(γ+1))``, γ up to
    ``max_draft``. Paths are by units saved, ascending, the full model first; their agreement was
    counted over ``num_tokens``.
    """
    if len(paths) < 2:
        return []
    falling = isotonic_regression([path.agreement for path in paths], increasing=False).x
    # Laplace's rule of succession: of n tokens that all agree, the next one may still not.
    alphas = (num_tokens * np.asarray(falling) + 1) / (num_tokens + 2)
    scored = []
    for path, alpha in zip(paths, alphas.tolist(), strict=True):
        if not path.plan:
            continue
        draft = costs.draft_cost(path.plan, depth)
        speeds = [
            (1 - alpha ** (length + 1))
            / (1 - alpha)
            / (length * draft + costs.verify_cost(length + 1))
            for length in range(1, max_draft + 1)
        ]
        best = max(range(len(speeds)), key=speeds.__getitem__)
        speedup = speeds[best] * costs.verify_cost(1)
        scored.append(ScoredPath(path, DraftParams(best + 1, 0.0), speedup))
    return scored
