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
from conflayers_cli.cli.strategies import AUTO, UNIFIED, SearchOptions, make_strategies
from conflayers_cli.profile.check import check_fit
from conflayers_cli.profile.schema import Profile
from conflayers_cli.search.auto import auto
from conflayers_cli.search.calibrate import Candidate, find
from conflayers_cli.search.objective import PAPER, Setting
from conflayers_cli.search.problem import Task
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.tree import GREEDY_SHAPE, SAMPLING_SHAPE

PUBLISHED = "published"
"""The strategy that searches nothing: the layers of the ConfLayers authors' release."""
SIDE_CANDIDATES = ("conflayers", "swift")
"""Whose papers verify side candidates beside the chain; the published sets are ConfLayers'."""


@dataclass(frozen=True)
class Way:
    """A plan and how it is drafted with."""

    plan: SkipPlan
    setting: Setting

    def as_json(self, drafted: str) -> dict[str, Any]:
        """For the results; ``drafted`` says how far."""
        return {
            "attention": self.plan.attention,
            "mlp": self.plan.mlp,
            "drafted": drafted,
            "max_tokens": self.setting.max_tokens,
            "stop_probability": self.setting.stop_probability,
            "tree": self.setting.tree.rungs if self.setting.tree else None,
        }


@dataclass(frozen=True)
class Found:
    """What a strategy came to, and what it took."""

    own: Way
    tuned: Way
    search: Mapping[str, Any]


def search(strategy: str, work: Work, amount: Amount, profiles: Path) -> Found:
    """Have a strategy search, and its plan refined.

    Raises:
        InputError: the strategy does not apply to the model, or lacks a package; the published
            set is not there, or for another model.
        KeyboardInterrupt: searches end with what they have; here nothing is made of that.
    """
    shape = GREEDY_SHAPE if amount.temperature == 0 else SAMPLING_SHAPE
    paper = replace(PAPER, tree=shape)
    if strategy == PUBLISHED:
        path = published_file(work.name, work.task, profiles)
        profile = Profile.load(path)
        check_fit(work.loaded, work.decoder, profile, path, force=False)
        none = {"seconds": 0.0, "source": profile.source}
        return Found(Way(profile.plan, paper), Way(profile.plan, PAPER), none)
    task = work.search_task(amount)
    candidate, own = _searched(strategy, task, amount)
    if candidate.interrupted:
        raise KeyboardInterrupt
    if strategy in SIDE_CANDIDATES:
        own = replace(own, setting=replace(own.setting, tree=shape))
    told: dict[str, Any] = {
        "method": candidate.strategy,
        **task.memo.usage()._asdict(),
        "looked_at": len(candidate.result.trials),
        "judged": candidate.judged,
        "stopped_because": candidate.result.stopped_because,
        "expected_speedup": candidate.expected.speedup if candidate.expected else None,
    }
    return Found(own, Way(candidate.plan, candidate.setting), told)


def _searched(strategy: str, task: Task, amount: Amount) -> tuple[Candidate, Way]:
    """(what came of the search; the method's own plan and way of drafting)."""
    options = SearchOptions(target_speedup=amount.target_speedup if strategy == UNIFIED else None)
    methods = make_strategies(strategy, options)
    how: dict[str, Any] = {
        "refine": 0 if strategy == UNIFIED else REFINE,  # its rule is all there is to it
        "tree": GREEDY_SHAPE,
        "on_stage": lambda message: common.say(f"  {strategy}: {message}"),
        "on_better": lambda score, judged: None,
    }
    with redirect_stdout(sys.stderr):
        if strategy == AUTO:
            candidate = auto(methods, task, (), budget=amount.search_seconds, **how).candidate
        else:
            candidate = find(methods[0], task, **how)
    result = candidate.result
    return candidate, Way(result.plan, result.setting or candidate.method.setting)


def published_file(model: str, task: str, profiles: Path) -> Path:
    """Where the authors' set for a model and a task is, if they published one."""
    name = "wmt14-de-en" if task == "wmt14" else task
    return profiles / f"{model}-{name}.yaml"
