"""Knapsack selection: the best hidden states for every amount of time saved.

Source: KnapSpec, arXiv 2602.20217; CLaSp, arXiv 2505.24196, is its case of whole layers that weigh
one unit each. Values are similarities of hidden states (see :mod:`conflayers_cli.search.strategies.knapsack_dp`), weights are the
sub-layers' measured latencies, and attention's grows with the context, so that another plan may be
the best one for longer texts. Of the best plans for all budgets, the one with most expected tokens
per second is taken, with the draft length that gives them.

The agreement behind that expectation comes from few tokens. It is therefore taken as falling the
more is left out, which pools the evidence of neighbouring budgets, and never as certain.
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

from conflayers_cli.engine.cost_model import Costs
from conflayers_cli.errors import InputError
from conflayers_cli.search.corpus import Sample
from conflayers_cli.search.objective import Setting
from conflayers_cli.search.problem import RangePlan, SearchResult, Task, Trial
from conflayers_cli.search.strategies.knapsack_dp import Path, Programme, Weights
from conflayers_cli.search.strategies.knapsack_window import Window
from conflayers_cli.skip_plan import SkipPlan

LONGER = (4, 16)
"""Longer contexts looked at, in those that the costs were measured at."""
NOTED = 12
"""Budgets that become trials, those with the highest expected speed."""
CLOSE = 1.05
"""A ratio of weights within this factor of the latencies' is close enough."""
MOST_UNEVEN = 16.0
"""Latencies farther apart than this factor are taken to be this far apart."""


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
        context_lengths: contexts to look for other plans at; empty: 4 and 16 times the one that the
            costs were measured at. Those that the model does not take are left out.
        whole_layers: leave out whole layers only.
        unit_weights: what weighs is the number of sub-layers, whatever they take.

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
    def setting(self) -> Setting:
        return Setting(self.most_draft, 0.0)

    def search(self, task: Task) -> SearchResult:
        """Fill the budgets for the measured context, choose among them, look at longer contexts.

        Raises:
            InputError: the model is too shallow.
        """
        if task.decoder.depth < 4:
            raise InputError(f"{task.decoder.depth} layers are too few to choose among: 4 at least")
        run = _Run(self, task)
        interrupted, reason = False, "interrupted"
        try:
            reason = run.run()
        except KeyboardInterrupt:
            interrupted = True
        best = run.best
        return SearchResult(
            plan=best.path.plan if best else SkipPlan(),
            trials=tuple(run.trials),
            tensors=run.tensors,
            interrupted=interrupted,
            stopped_because=reason,
            setting=best.setting if best else None,
            ranges=tuple(run.ranges),
        )


@dataclass(frozen=True)
class Choice:
    """A path and the best way to draft along it.

    Attributes:
        path: what is left out.
        setting: the draft length that gives most expected tokens per second.
        speedup: these over vanilla's.
    """

    path: Path
    setting: Setting
    speedup: float


class _Run:
    def __init__(self, settings: Knapsack, task: Task) -> None:
        self.settings = settings
        self.task = task
        self.trials: list[Trial] = []
        self.best: Choice | None = None
        self.ranges: list[RangePlan] = []
        self.tensors: dict[str, torch.Tensor] = {}
        self._whole = settings.whole_layers or len(task.decoder.sub_layers) < 2
        self._samples: tuple[Sample, ...] = ()
        self._window: Window | None = None
        self._tokens = 0
        self._filled: dict[Weights, tuple[Path, ...]] = {}
        self._best_trial: Trial | None = None

    def run(self) -> str:
        """The search; why it ended."""
        if self.task.out_of_time:
            return "out of time"
        self._samples = self.task.texts.enough(self.settings.texts)
        if not self._samples:
            return "no text to judge by"
        choices = self._choices(self.task.costs)
        if not choices:
            return "out of time" if self.task.out_of_time else "nothing can be left out"
        self._note(choices)
        for context in self._longer():
            if self.task.out_of_time:
                return "out of time"
            self._look_at(context)
        return f"compared {len(choices)} budgets"

    def _choices(self, costs: Costs) -> list[Choice]:
        """The best for every budget at these costs, over all programmes run so far."""
        settings, depth = self.settings, self.task.decoder.depth
        weights = self._weights(costs)
        if weights not in self._filled:
            found = self.task.memo.cached(
                f"{settings.name}: attention weighs {weights.attention}, MLP {weights.mlp}",
                lambda: self._programme(weights),
            )
            self._tokens = found["tokens"]
            self._filled[weights] = tuple(
                Path(SkipPlan.of(attention, mlp), *rest) for attention, mlp, *rest in found["paths"]
            )
            if len(self._filled) == 1:
                self.tensors["similarity"] = torch.from_numpy(found["similarity"])
        return [
            choice
            for paths in self._filled.values()
            for choice in choose(paths, costs, depth, self._tokens, settings.most_draft)
        ]

    def _programme(self, weights: Weights) -> dict[str, Any]:
        """Run the programme with these weights; what it came to, as a memo takes it."""
        settings, task = self.settings, self.task
        if self._window is None:
            self._window = Window(task.decoder, self._samples, settings.window)
        units = int(settings.most_saved * (task.decoder.depth - 2) * weights.layer)
        deadline = None
        if task.deadline is not None:
            deadline = time.perf_counter() + task.deadline - task.memo.usage().seconds
        programme = Programme(
            task.decoder,
            self._window,
            weights,
            most_saved=min(max(units, 1), settings.most_units),
            least_similarity=settings.least_similarity,
            deadline=deadline,
        )
        paths = [
            [path.plan.attention, path.plan.mlp, path.saved, path.similarity, path.agreement]
            for path in programme.run()
        ]
        similarity = programme.similarity.numpy()
        return {"tokens": self._window.size, "paths": paths, "similarity": similarity}

    def _weights(self, costs: Costs) -> Weights:
        if self._whole:
            return Weights.whole()
        if self.settings.unit_weights:
            return Weights.of(1, 1)
        saved = self.settings.most_saved * (self.task.decoder.depth - 2)
        return weigh(costs, most=int(self.settings.most_units / saved))

    def _note(self, choices: Sequence[Choice]) -> None:
        """The best budgets as trials, in the order of what they save, and the tensors."""
        shape = (self.tensors["similarity"].shape[1],)
        of_budget = {name: torch.full(shape, torch.nan) for name in ("agreement", "speedup")}
        for choice in choices:
            of_budget["agreement"][choice.path.saved] = choice.path.agreement
            of_budget["speedup"][choice.path.saved] = choice.speedup
        self.tensors |= of_budget
        ranked = sorted(choices, key=lambda choice: choice.speedup, reverse=True)[:NOTED]
        for choice in sorted(ranked, key=lambda choice: choice.path.saved):
            better = self.best is None or choice.speedup > self.best.speedup
            trial = Trial(
                iteration=len(self.trials),
                plan=choice.path.plan,
                steps=0,
                drafted=0,
                accepted=0,
                speedup=choice.speedup,
                note="best so far" if better else "",
                figures={
                    "similarity": choice.path.similarity,
                    "agreement": choice.path.agreement,
                    "saved": choice.path.saved,
                },
            )
            self.trials.append(trial)
            if better:
                self.best, self._best_trial = choice, trial
            self.task.on_trial(trial, self._best_trial)

    def _longer(self) -> list[int]:
        """The longer contexts to look at, ascending."""
        costs, config = self.task.costs, self.task.decoder.config
        if self.settings.unit_weights or not costs.attention_per_position:
            return []
        wanted = self.settings.context_lengths or tuple(n * costs.context for n in LONGER)
        bounds = (
            getattr(config, "max_position_embeddings", None),
            self.task.decoder.exact_positions,
        )
        room = min((bound for bound in bounds if bound is not None), default=math.inf)
        return sorted({n for n in wanted if costs.context < n <= room})

    def _look_at(self, context: int) -> None:
        """Keep the best plan for a longer context, if it is another one than just before."""
        choices = self._choices(self.task.costs.at(context, self.task.decoder.depth))
        best = max(choices, key=lambda choice: choice.speedup)
        before = self.ranges[-1].plan if self.ranges else self.best and self.best.path.plan
        if best.path.plan != before:
            self.ranges.append(RangePlan(context, best.path.plan, best.setting))


def weigh(costs: Costs, most: int) -> Weights:
    """Small weights in the ratio of the sub-layers' latencies.

    The smallest pair within 5 % of the ratio, else the closest one.

    Args:
        costs: measured.
        most: the sum of the two at the most; 2 where it is less.
    """
    ratio = 1.0
    if max(costs.attention, costs.mlp) > 0:
        least = max(costs.attention, costs.mlp) / MOST_UNEVEN
        ratio = max(costs.attention, least) / max(costs.mlp, least)

    def error(pair: tuple[int, int]) -> float:
        return abs(math.log(pair[0] / pair[1] / ratio))

    pairs = [(a, layer - a) for layer in range(2, max(most, 2) + 1) for a in range(1, layer)]
    close = (pair for pair in pairs if error(pair) <= math.log(CLOSE))
    return Weights.of(*next(close, min(pairs, key=error)))


def choose(
    paths: Sequence[Path], costs: Costs, depth: int, tokens: int, most_draft: int
) -> list[Choice]:
    """The best draft length for every path that leaves something out.

    Expected tokens per time are ``(1 − α^{γ+1}) / (1 − α) / (γ·t_draft + t_verify(γ+1))``.

    Args:
        paths: by units saved, ascending, the full model first.
        costs: of drafting and verification.
        depth: of the model.
        tokens: that agreement was counted over.
        most_draft: γ at the most.
    """
    if len(paths) < 2:
        return []
    falling = isotonic_regression([path.agreement for path in paths], increasing=False).x
    # Laplace's rule of succession: of n tokens that all agree, the next one may still not.
    alphas = (tokens * np.asarray(falling) + 1) / (tokens + 2)
    choices = []
    for path, alpha in zip(paths, alphas.tolist(), strict=True):
        if not path.plan:
            continue
        draft = costs.draft_cost(path.plan, depth)
        speeds = [
            (1 - alpha ** (length + 1))
            / (1 - alpha)
            / (length * draft + costs.verify_cost(length + 1))
            for length in range(1, most_draft + 1)
        ]
        best = max(range(len(speeds)), key=speeds.__getitem__)
        speedup = speeds[best] * costs.verify_cost(1)
        choices.append(Choice(path, Setting(best + 1, 0.0), speedup))
    return choices
