"""SWIFT: random search with Bayesian optimisation at intervals, while decoding goes on.

Source: SWIFT, arXiv 2410.06916 §4. Before a decoding step a set of sub-layers is proposed and
scored by *matchness*: one parallel draft pass over the last generated tokens, and the share of
positions where the draft's choice is the token that follows. The better set is kept.

Set right against the authors' release: the starting set is scored before it can be replaced, and a
set that seems better must beat the kept one on the same tokens too, or luck with an easy passage
would decide. The passage's tokens are fed on the full model's keys, each seeing its own draft key
only, as the first token of a real draft would.

The Gaussian process is scikit-learn's: the paper's acquisition (upper confidence bound, κ = 2.5,
noise 1e-2) can be had exactly with it, where optuna's sampler brings an acquisition of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.errors import InputError
from conflayers_cli.search.corpus import Stream
from conflayers_cli.search.matchness import LEAST_WINDOW, Passage, matchness, window_of
from conflayers_cli.search.memo import Memo, label_of
from conflayers_cli.search.objective import PAPER, Setting
from conflayers_cli.search.problem import OnTrial, SearchResult, Task, Trial, nobody
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import SkipProposer

CANDIDATES = 2000
"""Sets that the acquisition is evaluated at."""
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

    skip_ratio: float = 0.45
    context_window: int = 50
    max_steps: int = 1000
    patience: int = 300
    max_score: float = 0.95
    bayes_interval: int = 25
    kappa: float = 2.5
    noise: float = 1e-2

    @property
    def name(self) -> str:
        return "swift"

    @property
    def setting(self) -> Setting:
        return PAPER

    def search(self, task: Task) -> SearchResult:
        """Optimise along the decoding of the prompts, a step each.

        Raises:
            InputError: scikit-learn is missing, or the model is too shallow.
        """
        loop = SwiftLoop(self, task.decoder, task.seed, task.on_trial, memo=task.memo)
        stream = Stream(task.texts, task.prompts, self.name)
        interrupted, idle, most_idle = False, 0, 2 * LEAST_WINDOW * (len(task.prompts) + 1)
        try:
            while not loop.stopped_because:
                stream.step(SkipProposer(task.decoder, loop.plan))
                known = len(loop.trials)
                loop.consider(stream.current)
                idle = 0 if len(loop.trials) > known else idle + 1
                if idle > most_idle:
                    loop.stop(f"no output has more than {LEAST_WINDOW} tokens to judge by")
                if task.out_of_time:
                    loop.stop("out of time")
        except KeyboardInterrupt:
            interrupted = True
            loop.stop("interrupted")
        stream.note()
        return SearchResult(
            plan=loop.plan,
            trials=tuple(loop.trials),
            tensors=loop.tensors,
            interrupted=interrupted,
            stopped_because=loop.stopped_because,
        )


class SwiftLoop:
    """The search, driven from outside: asked to consider one more set between decoding steps.

    Args:
        settings: of the search.
        decoder: the model.
        seed: of the random sets.
        on_trial: told about every set scored, with the best one so far.
        start: the set to start from; by default evenly spread layers.
        memo: has what was scored; None: one of its own.

    Attributes:
        plan: the set kept; the starting set until a better one is found.
        best: its trial, None before it is scored.
        trials: all sets scored.
        stopped_because: one phrase once the search is over, empty before.

    Raises:
        InputError: scikit-learn is missing, or the model is too shallow.
    """

    def __init__(
        self,
        settings: Swift,
        decoder: Decoder,
        seed: int = 0,
        on_trial: OnTrial = nobody,
        start: SkipPlan | None = None,
        memo: Memo | None = None,
    ) -> None:
        if decoder.depth < 4:
            raise InputError(f"{decoder.depth} layers are too few to choose among: 4 at least")
        require_sklearn()
        _load_sklearn()
        self._settings = settings
        self._decoder = decoder
        self._seed = seed
        self._random = np.random.default_rng(seed)
        self._memo = memo or Memo(decoder)
        self._on_trial = on_trial
        self._single = len(decoder.sub_layers) == 2
        self._size = (decoder.depth - 2) * (2 if self._single else 1)
        self._count = max(1, int(settings.skip_ratio * self._size))
        self._drawn = self._random_point()  # the next set at random
        self._points: list[Point] = []
        self._since_best = 0
        self._looks = 0
        self.plan = start or self._start()
        self.best: Trial | None = None
        self.trials: list[Trial] = []
        self.stopped_because = ""

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The sets scored, ``[n, size]``, and their matchness ``[n]``."""
        if not self.trials:
            return {}
        scores = [trial.figures["matchness"] for trial in self.trials]
        return {
            "skipped": torch.from_numpy(np.stack(self._points).astype(np.uint8)),
            "matchness": torch.tensor(scores),
        }

    def stop(self, reason: str) -> None:
        """End the search with what it has."""
        self.stopped_because = self.stopped_because or reason

    def consider(self, source: Passage) -> None:
        """Propose a set, score it on a text's last tokens, and keep the better one.

        Nothing happens while the text is too short, or once the search is over.
        """
        if self.stopped_because:
            return
        self._looks += 1
        found = self._memo.cached(
            f"swift: look {self._looks}, set {len(self.trials)} beside {label_of(self.plan)}",
            lambda: self._look(source),
        )
        if found is not None:
            self._take(**found)

    def _look(self, source: Passage) -> dict[str, Any] | None:
        """The next set, its matchness on the text's last tokens, and where that beats the best
        one's, the kept set's on the same tokens; None where the text is too short."""
        window = window_of(source, self._settings.context_window)
        if not window:
            return None
        step = len(self.trials)
        if self.best is None:
            # The starting set first: what replaces it has to be better.
            point = self._point_of(self.plan)
        elif step % self._settings.bayes_interval == 0:
            point = self._suggestion(step)
        else:
            point = self._drawn
        plan = self.plan if self.best is None else self._plan_of(point)
        score = matchness(self._decoder, plan, source, window)
        kept = None
        if self.best is not None and score > self.best.figures["matchness"]:
            kept = matchness(self._decoder, self.plan, source, window)
        return {"point": point, "score": score, "kept": kept}

    def _take(self, point: Point, score: float, kept: float | None) -> None:
        """Note the set that was looked at, and keep it where it is better."""
        if self.best is None:
            self._keep(self._note(self.plan, score))
            return
        if len(self.trials) % self._settings.bayes_interval:
            self._drawn = self._random_point()
        trial = self._note(self._plan_of(point), score)
        if kept is not None and score > kept:
            self._keep(trial)
        else:
            self._since_best += 1
            self._on_trial(trial, self.best)
        if len(self.trials) >= self._settings.max_steps:
            self.stop(f"reached {self._settings.max_steps} steps")
        elif self._since_best >= self._settings.patience:
            self.stop(f"no better set in {self._since_best} steps")

    def _keep(self, trial: Trial) -> None:
        self.best, self.plan, self._since_best = trial, trial.plan, 0
        self._on_trial(trial, trial)
        if trial.figures["matchness"] > self._settings.max_score:
            self.stop(f"matchness {trial.figures['matchness']:.2f}")

    def _note(self, plan: SkipPlan, score: float) -> Trial:
        trial = Trial(
            iteration=len(self.trials),
            plan=plan,
            steps=0,
            drafted=0,
            accepted=0,
            speedup=None,
            note="start" if not self.trials else "",
            figures={"matchness": score},
        )
        self.trials.append(trial)
        self._points.append(self._point_of(plan))
        return trial

    def _start(self) -> SkipPlan:
        inner = self._decoder.depth - 2
        layers = self._count // 2 if self._single else self._count
        spread = np.linspace(1, inner, max(layers, 1)).round().astype(int)
        return SkipPlan.of_layers(int(layer) for layer in spread)

    def _random_point(self) -> Point:
        return self._random.random(self._size)

    def _plan_of(self, point: Point) -> SkipPlan:
        """The set whose coordinates are greatest: attention sub-layers first, then the MLPs."""
        chosen = np.argsort(-point, kind="stable")[: self._count]
        inner = self._decoder.depth - 2
        layers = [int(i) % inner + 1 for i in chosen]
        if not self._single:
            return SkipPlan.of_layers(layers)
        marks = zip(chosen, layers, strict=True)
        named = [(int(i) < inner, layer) for i, layer in marks]
        return SkipPlan.of(
            attention=(layer for first, layer in named if first),
            mlp=(layer for first, layer in named if not first),
        )

    def _point_of(self, plan: SkipPlan) -> Point:
        point = np.zeros(self._size)
        inner = self._decoder.depth - 2
        point[[layer - 1 for layer in plan.attention]] = 1.0
        if self._single:
            point[[inner + layer - 1 for layer in plan.mlp]] = 1.0
        return point

    def _suggestion(self, step: int) -> Point:
        """The set with the greatest upper confidence bound among random ones and the neighbours of
        the best."""
        random = np.random.default_rng([self._seed, step])
        process = _fitted(
            self._points, [t.figures["matchness"] for t in self.trials], self._settings.noise
        )
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


def _fitted(points: Sequence[Point], scores: Sequence[float], noise: float) -> Any:
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
        return process.fit(np.stack(points), np.asarray(scores))


def require_sklearn() -> None:
    """Raise InputError with what to do where scikit-learn is missing."""
    if not sklearn_there():
        raise InputError(
            "swift needs scikit-learn for its Bayesian optimisation: "
            "pip install scikit-learn (this package's extra `swift`)"
        )


def _load_sklearn() -> None:
    """Import what proposals need, which takes a second, before anything is timed."""
    import_module("sklearn.gaussian_process")


def sklearn_there() -> bool:
    """Whether scikit-learn is installed."""
    from importlib.util import find_spec

    return find_spec("sklearn") is not None
