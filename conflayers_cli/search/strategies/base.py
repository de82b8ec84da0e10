"""What strategies have in common: searches that score plans, and searches between decode steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.errors import InputError
from conflayers_cli.search.corpus import PromptStream
from conflayers_cli.search.memo import Memo
from conflayers_cli.search.objective import DraftParams
from conflayers_cli.search.problem import OnTrial, RangePlan, SearchProblem, SearchResult, Trial
from conflayers_cli.skip_plan import SkipPlan


def check_depth(decoder: Decoder) -> None:
    """Raise InputError where a model is too shallow to search."""
    if decoder.depth < 4:
        raise InputError(f"{decoder.depth} layers are too few to choose among: 4 at least")


class ScoringSearch(ABC):
    """One run of a search that predicts the speed of plans; the fastest trial is its result."""

    def __init__(self, problem: SearchProblem) -> None:
        self.problem = problem
        self.trials: list[Trial] = []
        self.best: Trial | None = None
        self.tensors: dict[str, torch.Tensor] = {}
        self.ranges: list[RangePlan] = []
        self._setting: DraftParams | None = None

    @abstractmethod
    def search(self) -> str:
        """Search; returns why it ended."""

    def run(self) -> SearchResult:
        """Search until the end or Ctrl-C."""
        reason, interrupted = "interrupted", False
        try:
            reason = self.search()
        except KeyboardInterrupt:
            interrupted = True
        return SearchResult(
            plan=self.best.plan if self.best else SkipPlan(),
            trials=tuple(self.trials),
            tensors=self.tensors,
            interrupted=interrupted,
            stopped_because=reason,
            setting=self._setting,
            ranges=tuple(self.ranges),
        )

    def note(
        self, plan: SkipPlan, setting: DraftParams, speedup: float, figures: Mapping[str, float]
    ) -> bool:
        """Add a trial; returns whether it is the best so far."""
        better = self.best is None or speedup > (self.best.speedup or 0.0)
        note = "best so far" if better else ""
        trial = Trial(len(self.trials), plan, speedup=speedup, note=note, figures=figures)
        self.trials.append(trial)
        if better:
            self.best, self._setting = trial, setting
        self.problem.on_trial(trial, self.best)
        return better


class DecodingSearch(ABC):
    """State of a search driven from outside, between decode steps.

    Args:
        decoder: the model.
        plan: the set of layers to start from.
        on_trial: called with every trial and the best one so far.
        memo: has what was measured; None: a new one.

    Attributes:
        plan: the set to decode with.
        best: the best trial; None: no set was evaluated.
        trials: all sets looked at.
        stopped_because: one phrase once the search is over, empty before.

    Raises:
        InputError: the model is too shallow.
    """

    def __init__(
        self, decoder: Decoder, plan: SkipPlan, on_trial: OnTrial, memo: Memo | None
    ) -> None:
        check_depth(decoder)
        self._decoder = decoder
        self._on_trial = on_trial
        self._memo = memo or Memo(decoder)
        self._since_best = 0
        self.plan = plan
        self.best: Trial | None = None
        self.trials: list[Trial] = []
        self.stopped_because = ""

    @property
    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """What the search is to save, one entry per proposal."""

    def stop(self, reason: str) -> None:
        """End the search with what it has; the first reason counts."""
        self.stopped_because = self.stopped_because or reason

    def run(
        self, problem: SearchProblem, name: str, step: Callable[[PromptStream], None]
    ) -> SearchResult:
        """Repeat ``step`` along the decoding of the prompts until the search is over."""
        stream = PromptStream(problem.continuations, problem.prompts, name)
        interrupted = False
        try:
            while not self.stopped_because:
                step(stream)
                if problem.out_of_time:
                    self.stop("out of time")
        except KeyboardInterrupt:
            interrupted = True
            self.stop("interrupted")
        stream.note()
        return SearchResult(
            plan=self.best.plan if self.best else self.plan,
            trials=tuple(self.trials),
            tensors=self.tensors,
            interrupted=interrupted,
            stopped_because=self.stopped_because,
        )
