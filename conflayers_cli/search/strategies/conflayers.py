"""ConfLayers: iterative confidence-based layer skipping (arXiv 2604.14612), over sample prompts.

The paper's loop, with corrections to the authors' release: the context window is fed at its own
positions, confidences are float32, a plan is never "restored" to an empty one, and λ falls for
every set too small to be evaluated (else a set one layer short would be proposed for ever).
Evaluation drafts a chain; the paper's also verifies side branches beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from conflayers_cli.engine.cost_model import PassCosts
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.search.corpus import PromptStream
from conflayers_cli.search.matchness import SequenceView
from conflayers_cli.search.memo import Memo
from conflayers_cli.search.objective import PAPER, DraftParams
from conflayers_cli.search.problem import (
    OnTrial,
    SearchProblem,
    SearchResult,
    Trial,
    ignore_trial,
)
from conflayers_cli.search.strategies.base import DecodingSearch
from conflayers_cli.search.strategies.layer_confidence import (
    Confidence,
    Selection,
    measure_confidence,
    select_layers,
)
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import SkipProposer


@dataclass(frozen=True)
class ConfLayers:
    """The paper's search.

    Attributes:
        skip_ratio: r, the least share of the L−2 inner layers to skip.
        search_interval: verify steps per evaluation.
        max_iterations: proposals at the most.
        context_window: W, generated tokens the confidence is taken over.
        patience: evaluated proposals in a row without improvement that end the search.
        max_score: an acceptance over this with more than 4 accepted drafts a step ends it.
        max_draft, stop_probability: the chain drafted, as long as in the paper.
    """

    name: ClassVar[str] = "conflayers"
    skip_ratio: float = 0.4
    search_interval: int = 30
    max_iterations: int = 100
    context_window: int = 100
    patience: int = 15
    max_score: float = 0.95
    max_draft: int = PAPER.max_tokens
    stop_probability: float = PAPER.stop_probability

    @property
    def setting(self) -> DraftParams:
        return DraftParams(self.max_draft, self.stop_probability)

    def search(self, problem: SearchProblem) -> SearchResult:
        """Run the loop until it stops improving, reaches its end, or is interrupted.

        Raises:
            InputError: the model is too shallow.
        """
        decoder = problem.decoder
        loop = ConfLayersLoop(self, decoder, problem.costs, problem.on_trial, memo=problem.memo)

        def step(stream: PromptStream) -> None:
            taken = stream.step(
                SkipProposer(decoder, loop.plan, self.max_draft, self.stop_probability)
            )
            if loop.observe(taken.drafted, taken.accepted):
                loop.propose(stream.window_source(self.context_window))

        return loop.run(problem, self.name, step)


@dataclass
class _Counts:
    """Of the decode steps with a plan."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def accepted_per_step(self) -> float:
        return self.accepted / self.steps if self.steps else 0.0


class ConfLayersLoop(DecodingSearch):
    """The paper's loop: call `observe` after each step, and `propose` when it returns True.

    ``best`` is the trial with most accepted drafts a step, ``confidence`` that of the layers as
    last measured. Without ``costs`` the trials' speed is not predicted. ``start``: the set to start
    from; None: the balanced one. The rest as for `DecodingSearch`.
    """

    def __init__(
        self,
        settings: ConfLayers,
        decoder: Decoder,
        costs: PassCosts | None = None,
        on_trial: OnTrial = ignore_trial,
        start: SkipPlan | None = None,
        memo: Memo | None = None,
    ) -> None:
        super().__init__(decoder, start or SkipPlan.balanced(decoder.depth), on_trial, memo)
        self._settings = settings
        self._costs = costs
        self._proposals: list[tuple[float, Confidence, Selection]] = []
        self._counts = _Counts()
        self._lam = 0.0
        self._used_lam = 0.0  # the one behind the current plan
        self._qwen = "qwen" in str(getattr(decoder.config, "model_type", "")).lower()
        self.confidence: Confidence | None = None

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        if not self._proposals:
            return {}
        lam, confidences, selections = zip(*self._proposals, strict=True)
        selected = np.zeros((len(lam), self._decoder.depth), dtype=np.uint8)
        for i, selection in enumerate(selections):
            selected[i, list(selection.layers)] = 1
        stacked = {
            "lambda": np.array(lam),
            "attention_confidence": np.stack([c.attention for c in confidences]),
            "mlp_confidence": np.stack([c.mlp for c in confidences]),
            "z": np.stack([s.z for s in selections]),
            "gradient": np.stack([s.gradient for s in selections]),
            "window": np.stack([s.window for s in selections]),
            "threshold": np.stack([s.threshold for s in selections]),
            "selected": selected,
        }
        return {name: torch.from_numpy(values) for name, values in stacked.items()}

    def observe(self, drafted: int, accepted: int) -> bool:
        """Count a decode step with the plan; True when its evaluation is over."""
        settings, counts = self._settings, self._counts
        counts.steps += 1
        counts.drafted += drafted
        counts.accepted += accepted
        per_step = counts.accepted_per_step
        early = counts.steps >= settings.search_interval / 2 and per_step < 1
        if not early and counts.steps < settings.search_interval:
            return False
        improved = self.best is None or per_step > self.best.accepted / self.best.steps
        note = "best so far" if improved else "given up early" if early else ""
        trial = self._note(self.plan, counts, note)
        if improved:
            self.best, self._since_best = trial, 0
        else:
            self._since_best += 1
        self._counts = _Counts()
        self._on_trial(trial, self.best)
        rate = trial.acceptance_rate or 0.0
        if per_step > 4 and rate > settings.max_score:
            self.stop(f"acceptance {rate:.2f} with {per_step:.1f} drafts kept a step")
        else:
            self.stop(self._limit())
        return True

    def propose(self, source: SequenceView) -> None:
        """Set the next plan worth evaluating by the layers' confidence on the last tokens of
        ``source``, or end the search where a limit comes first."""
        if self.stopped_because:
            return
        decoder, settings = self._decoder, self._settings
        window = min(settings.context_window, len(source.output))
        measured = self._memo.cached(
            f"conflayers: confidences after {len(self.trials)} sets, "
            f"of the last {window} of {len(source.tokens)} tokens",
            lambda: vars(measure_confidence(decoder, source.cache, source.tokens, window)),
        )
        self.confidence = confidence = Confidence(**measured)
        inner = decoder.depth - 2
        while not self._limit():
            selection = select_layers(confidence.total, self._lam, decoder.depth, qwen=self._qwen)
            self._proposals.append((self._lam, confidence, selection))
            count = len(selection.layers)
            self._used_lam = self._lam
            too_few = count < settings.skip_ratio * inner + 1
            if count / inner > settings.skip_ratio + 0.25:
                self._lam += 0.05
            elif too_few:
                self._lam -= 0.05
            plan = SkipPlan.of_layers(selection.layers)
            if not too_few:
                self.plan = plan
                return
            self._on_trial(self._note(plan, _Counts(), "too few layers"), self.best)
        self.stop(self._limit())

    def _limit(self) -> str:
        """Why the search ends here, or ''."""
        if len(self.trials) >= self._settings.max_iterations:
            return f"reached {self._settings.max_iterations} iterations"
        if self._since_best >= self._settings.patience:
            return f"no improvement in {self._since_best} proposals"
        return ""

    def _note(self, plan: SkipPlan, counts: _Counts, note: str) -> Trial:
        speedup = None
        if counts.steps and self._costs is not None:
            costs, drafted = self._costs, counts.drafted / counts.steps
            draft = drafted * costs.draft_cost(plan, self._decoder.depth)
            step = draft + costs.verify_cost(round(drafted) + 1)
            speedup = (1 + counts.accepted_per_step) * costs.verify_cost(1) / step
        trial = Trial(
            iteration=len(self.trials),
            plan=plan,
            **vars(counts),
            speedup=speedup,
            note=note,
            figures={"lambda": self._used_lam},
        )
        self.trials.append(trial)
        return trial
