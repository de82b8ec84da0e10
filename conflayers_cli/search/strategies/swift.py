"""SWIFT: random search with Bayesian optimisation at intervals, while decoding goes on.

Source: SWIFT, arXiv 2410.06916 §4. Before a decoding step a set of sub-layers is proposed and
scored by *matchness*: one parallel draft pass over the last generated tokens, and the share of
positions where the draft's choice is the token that follows. The better set is kept.

Corrections to the authors' release: the starting set is scored before it can be replaced, and a
set that seems better must beat the kept one on the same tokens too, or luck with easy tokens would
decide. The tokens are fed on the full model's keys, each seeing its own draft key only, as the
first token of a real draft would.

The Gaussian process is scikit-learn's: the paper's acquisition (upper confidence bound, κ = 2.5,
noise 1e-2) can be had exactly with it, where optuna's sampler brings an acquisition of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.errors import InputError
from conflayers_cli.search.corpus import PromptStream
from conflayers_cli.search.matchness import MIN_WINDOW, SequenceView, matchness, window_size
from conflayers_cli.search.memo import Memo, plan_label
from conflayers_cli.search.objective import PAPER, DraftParams
from conflayers_cli.search.problem import (
    OnTrial,
    SearchProblem,
    SearchResult,
    Trial,
    ignore_trial,
)
from conflayers_cli.search.strategies.base import DecodingSearch
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import SkipProposer

CANDIDATES = 2000  # sets that the acquisition is evaluated at
Point = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Swift:
    """The paper's search.

    Attributes:
        skip_ratio: r; exactly ``floor(r · n)`` of the n inner sub-layers are skipped.
        context_window: generated tokens that matchness is taken over.
        max_steps: optimisation steps at the most.
        patience: steps in a row without a better set that end the search.
        max_score: a matchness over this ends it.
        bayes_interval: every so many steps the proposal is the Gaussian process's.
        kappa, noise: of the upper confidence bound and the process.
    """

    name: ClassVar[str] = "swift"
    setting: ClassVar[DraftParams] = PAPER
    skip_ratio: float = 0.45
    context_window: int = 50
    max_steps: int = 1000
    patience: int = 300
    max_score: float = 0.95
    bayes_interval: int = 25
    kappa: float = 2.5
    noise: float = 1e-2

    def search(self, problem: SearchProblem) -> SearchResult:
        """Optimise along the decoding of the prompts, a step each.

        Raises:
            InputError: scikit-learn is missing, or the model is too shallow.
        """
        loop = SwiftLoop(self, problem.decoder, problem.seed, problem.on_trial, memo=problem.memo)
        idle, max_idle = 0, 2 * MIN_WINDOW * (len(problem.prompts) + 1)

        def step(stream: PromptStream) -> None:
            nonlocal idle
            stream.step(SkipProposer(problem.decoder, loop.plan))
            before = len(loop.trials)
            loop.consider(stream.current)
            idle = 0 if len(loop.trials) > before else idle + 1
            if idle > max_idle:
                loop.stop(f"no output has more than {MIN_WINDOW} tokens to judge by")

        return loop.run(problem, self.name, step)


class SwiftLoop(DecodingSearch):
    """The paper's loop: call `consider` between decode steps.

    ``plan`` is the best set found; ``best`` its trial, None before it is scored. ``start``: the set
    to start from; None: evenly spread layers. The rest as for `DecodingSearch`.

    Raises:
        InputError: scikit-learn is missing, or the model is too shallow.
    """

    def __init__(
        self,
        settings: Swift,
        decoder: Decoder,
        seed: int = 0,
        on_trial: OnTrial = ignore_trial,
        start: SkipPlan | None = None,
        memo: Memo | None = None,
    ) -> None:
        super().__init__(decoder, SkipPlan(), on_trial, memo)
        require_sklearn()
        import_module("sklearn.gaussian_process")  # takes a second: before anything is timed
        self._settings = settings
        self._seed = seed
        self._random = np.random.default_rng(seed)
        self._single = len(decoder.sub_layers) == 2
        self._inner = decoder.depth - 2
        self._size = self._inner * (2 if self._single else 1)
        self._count = max(1, int(settings.skip_ratio * self._size))
        self._next_random = self._random_point()
        self._considered = 0
        self.plan = start or self._spread_plan()

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The sets scored, uint8 ``[n, size]``, and their matchness, float32 ``[n]``."""
        if not self.trials:
            return {}
        scores = [trial.figures["matchness"] for trial in self.trials]
        return {
            "skipped": torch.from_numpy(self._points().astype(np.uint8)),
            "matchness": torch.tensor(scores),
        }

    def consider(self, source: SequenceView) -> None:
        """Propose a set, score it on a sequence's last tokens, and keep the better one.

        Nothing happens while the sequence is too short, or once the search is over.
        """
        if self.stopped_because:
            return
        self._considered += 1
        found = self._memo.cached(
            f"swift: look {self._considered}, set {len(self.trials)} "
            f"beside {plan_label(self.plan)}",
            lambda: self._score_next(source),
        )
        if found is not None:
            self._take(**found)

    def _score_next(self, source: SequenceView) -> dict[str, Any] | None:
        """The next set and its matchness; where that beats the best one's, also the kept set's on
        the same tokens. None: the sequence is too short."""
        window = window_size(source, self._settings.context_window)
        if not window:
            return None
        step = len(self.trials)
        if self.best is None:
            # The starting set first: what replaces it has to be better.
            point = self._point_of(self.plan)
        elif step % self._settings.bayes_interval == 0:
            point = self._suggestion(step)
        else:
            point = self._next_random
        plan = self.plan if self.best is None else self._plan_of(point)
        score = matchness(self._decoder, plan, source, window)
        kept = None
        if self.best is not None and score > self.best.figures["matchness"]:
            kept = matchness(self._decoder, self.plan, source, window)
        return {"point": point, "score": score, "kept": kept}

    def _take(self, point: Point, score: float, kept: float | None) -> None:
        """Note the scored set, and keep it where it is better."""
        settings, first = self._settings, self.best is None
        if not first and len(self.trials) % settings.bayes_interval:
            self._next_random = self._random_point()
        trial = self._note(self.plan if first else self._plan_of(point), score)
        if first or (kept is not None and score > kept):
            self.best, self.plan, self._since_best = trial, trial.plan, 0
        else:
            self._since_best += 1
        self._on_trial(trial, self.best)
        if trial is self.best and score > settings.max_score:
            self.stop(f"matchness {score:.2f}")
        if first:
            return
        if len(self.trials) >= settings.max_steps:
            self.stop(f"reached {settings.max_steps} steps")
        elif self._since_best >= settings.patience:
            self.stop(f"no better set in {self._since_best} steps")

    def _note(self, plan: SkipPlan, score: float) -> Trial:
        number = len(self.trials)
        note = "" if number else "start"
        trial = Trial(number, plan, note=note, figures={"matchness": score})
        self.trials.append(trial)
        return trial

    def _spread_plan(self) -> SkipPlan:
        """Evenly spread layers."""
        layers = self._count // 2 if self._single else self._count
        spread = np.linspace(1, self._inner, max(layers, 1)).round().astype(int)
        return SkipPlan.of_layers(spread.tolist())

    def _random_point(self) -> Point:
        return self._random.random(self._size)

    def _plan_of(self, point: Point) -> SkipPlan:
        """The set with the greatest coordinates: attention sub-layers first, then the MLPs."""
        chosen = np.argsort(-point, kind="stable")[: self._count].tolist()
        if not self._single:
            return SkipPlan.of_layers(i + 1 for i in chosen)
        return SkipPlan.of(
            attention=(i + 1 for i in chosen if i < self._inner),
            mlp=(i - self._inner + 1 for i in chosen if i >= self._inner),
        )

    def _point_of(self, plan: SkipPlan) -> Point:
        point = np.zeros(self._size)
        point[[layer - 1 for layer in plan.attention]] = 1.0
        if self._single:
            point[[self._inner + layer - 1 for layer in plan.mlp]] = 1.0
        return point

    def _points(self) -> Point:
        """The sets scored, ``[n, size]``."""
        return np.stack([self._point_of(trial.plan) for trial in self.trials])

    def _suggestion(self, step: int) -> Point:
        """The set with the greatest upper confidence bound among random ones and the neighbours of
        the best."""
        random = np.random.default_rng([self._seed, step])
        scores = [trial.figures["matchness"] for trial in self.trials]
        process = _fit_process(self._points(), scores, self._settings.noise)
        candidates = np.stack([self._candidate(random, i % 2 == 0) for i in range(CANDIDATES)])
        mean, deviation = process.predict(candidates, return_std=True)
        suggested: Point = candidates[int(np.argmax(mean + self._settings.kappa * deviation))]
        return suggested

    def _candidate(self, random: np.random.Generator, local: bool) -> Point:
        """A set: any at random, or the best one with a few sub-layers exchanged."""
        if not local:
            return self._point_of(self._plan_of(random.random(self._size)))
        point = self._point_of(self.plan)
        inside, outside = np.flatnonzero(point == 1), np.flatnonzero(point == 0)
        swaps = min(int(random.integers(1, 6)), len(inside), len(outside))
        point[random.choice(inside, swaps, replace=False)] = 0.0
        point[random.choice(outside, swaps, replace=False)] = 1.0
        return point


def _fit_process(points: Point, scores: Sequence[float], noise: float) -> Any:
    """A Gaussian process (Matérn 5/2) over the sets scored."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import Matern

    process = GaussianProcessRegressor(
        Matern(length_scale=np.sqrt(len(points[0])), nu=2.5), alpha=noise, normalize_y=True
    )
    with warnings.catch_warnings():
        # A length scale at its bound is no fault here: few sets say little about it.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return process.fit(points, np.asarray(scores))


def require_sklearn() -> None:
    """Raise InputError with what to do where scikit-learn is missing."""
    if not has_sklearn():
        raise InputError(
            "swift needs scikit-learn for its Bayesian optimisation: "
            "pip install scikit-learn (this package's extra `swift`)"
        )


def has_sklearn() -> bool:
    return find_spec("sklearn") is not None
