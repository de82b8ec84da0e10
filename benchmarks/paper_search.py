"""The searches behind the papers' table: what a strategy finds, as it says and as it is tuned."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.paper_work import Amount, Work
from benchmarks.strategies import REFINE
from conflayers_cli.profile.check import check_fit
from conflayers_cli.profile.schema import Profile
from conflayers_cli.search.auto import auto
from conflayers_cli.search.calibrate import Candidate, search_and_refine
from conflayers_cli.search.objective import PAPER, DraftParams
from conflayers_cli.search.options import AUTO, UNIFIED, SearchOptions
from conflayers_cli.search.problem import SearchProblem
from conflayers_cli.search.strategies.registry import make_strategies
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.tree import PAPER_SHAPE

PUBLISHED = "published"
"""The strategy that searches nothing: the layers of the ConfLayers authors' release."""
SIDE_CANDIDATES = ("conflayers", "swift")
"""Whose papers verify side candidates beside the chain; the published sets are ConfLayers'."""


@dataclass(frozen=True)
class DraftPlan:
    """A plan and how it is drafted with."""

    plan: SkipPlan
    setting: DraftParams

    def as_json(self, drafted: str) -> dict[str, Any]:
        """For the results; ``drafted`` says how far."""
        return {
            "attention": self.plan.attention,
            "mlp": self.plan.mlp,
            "drafted": drafted,
            "max_tokens": self.setting.max_tokens,
            "stop_probability": self.setting.stop_probability,
            "tree": self.setting.tree.thresholds if self.setting.tree else None,
        }


@dataclass(frozen=True)
class StrategyPlans:
    """What a strategy came to, and what it took."""

    own: DraftPlan
    tuned: DraftPlan
    search: Mapping[str, Any]


def search(strategy: str, work: Work, amount: Amount, profiles: Path) -> StrategyPlans:
    """Have a strategy search, and its plan refined.

    Raises:
        InputError: the strategy does not apply to the model, or lacks a package; the published
            set is not there, or for another model.
        KeyboardInterrupt: searches end with what they have; here nothing is made of that.
    """
    paper = replace(PAPER, tree=PAPER_SHAPE)
    if strategy == PUBLISHED:
        path = published_file(work.name, work.task, profiles)
        profile = Profile.load(path)
        check_fit(work.loaded, work.decoder, profile, path, force=False)
        none = {"seconds": 0.0, "source": profile.source}
        return StrategyPlans(DraftPlan(profile.plan, paper), DraftPlan(profile.plan, PAPER), none)
    problem = work.search_problem(amount)
    candidate, own = _searched(strategy, problem, amount)
    if candidate.interrupted:
        raise KeyboardInterrupt
    if strategy in SIDE_CANDIDATES:
        own = replace(own, setting=replace(own.setting, tree=PAPER_SHAPE))
    details: dict[str, Any] = {
        "method": candidate.strategy,
        **problem.memo.usage()._asdict(),
        "looked_at": len(candidate.result.trials),
        "judged": candidate.judged,
        "stopped_because": candidate.result.stopped_because,
        "expected_speedup": candidate.expected.speedup if candidate.expected else None,
    }
    return StrategyPlans(own, DraftPlan(candidate.plan, candidate.setting), details)


def _searched(strategy: str, problem: SearchProblem, amount: Amount) -> tuple[Candidate, DraftPlan]:
    """(what came of the search; the method's own plan and draft settings)."""
    target = amount.target_speedup if strategy == UNIFIED else None
    methods = make_strategies(SearchOptions(strategy, target_speedup=target))
    how: dict[str, Any] = {
        "refine": 0 if strategy == UNIFIED else REFINE,  # its rule is all there is to it
        "tree": PAPER_SHAPE,
        "on_stage": lambda message: common.say(f"  {strategy}: {message}"),
        "on_better": lambda score, judged: None,
    }
    with redirect_stdout(sys.stderr):
        if strategy == AUTO:
            candidate = auto(methods, problem, (), budget=amount.search_seconds, **how).candidate
        else:
            candidate = search_and_refine(methods[0], problem, **how)
    result = candidate.result
    return candidate, DraftPlan(result.plan, result.setting or candidate.method.setting)


def published_file(model: str, task: str, profiles: Path) -> Path:
    """Where the authors' set for a model and a task is, if they published one."""
    name = "wmt14-de-en" if task == "wmt14" else task
    return profiles / f"{model}-{name}.yaml"
