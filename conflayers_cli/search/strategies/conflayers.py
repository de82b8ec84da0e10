"""ConfLayers: iterative confidence-based layer skipping (arXiv 2604.14612), over sample prompts.

The loop of the paper, with slips of the authors' release set right: the context window is fed at
its own positions, confidences are float32, a plan is never "restored" to an empty one, and λ falls
for every set too small to be evaluated (else a set one layer short would be proposed for ever).
Evaluation drafts a chain; the paper's also verifies side branches beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from conflayers_cli.engine.cost_model import Costs
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.errors import InputError
from conflayers_cli.search.corpus import Stream
from conflayers_cli.search.matchness import Passage
from conflayers_cli.search.memo import Memo
from conflayers_cli.search.objective import PAPER, Setting
from conflayers_cli.search.problem import OnTrial, SearchResult, Task, Trial, nobody
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

    skip_ratio: float = 0.4
    search_interval: int = 30
    max_iterations: int = 100
    context_window: int = 100
    patience: int = 15
    max_score: float = 0.95
    max_draft: int = PAPER.max_tokens
    stop_probability: float = PAPER.stop_probability

    @property
    def name(self) -> str:
        return "conflayers"

    @property
    def setting(self) -> Setting:
        return Setting(self.max_draft, self.stop_probability)

    def search(self, task: Task) -> SearchResult:
        """Run the loop until it stops improving, reaches its end, or is interrupted.

        Raises:
            InputError: the model is too shallow.
        """
        loop = ConfLayersLoop(self, task.decoder, task.costs, task.on_trial, memo=task.memo)
        stream = Stream(task.texts, task.prompts, self.name)
        interrupted = False
        try:
            while not loop.stopped_because:
                step = stream.step(self.drafter(task.decoder, loop.plan))
                if loop.observe(step.drafted, step.accepted):
                    loop.propose(stream.window_source(self.context_window))
                if task.out_of_time:
                    loop.stop("out of time")
        except KeyboardInterrupt:
            interrupted = True
            loop.stop("interrupted")
        stream.note()
        return SearchResult(
            plan=loop.best.plan if loop.best else loop.plan,
            trials=tuple(loop.trials),
            tensors=loop.tensors,
            interrupted=interrupted,
            stopped_because=loop.stopped_because,
        )

    def drafter(self, decoder: Decoder, plan: SkipPlan) -> SkipProposer:
        """The drafter that a set is evaluated with."""
        return SkipProposer(decoder, plan, self.max_draft, self.stop_probability)


@dataclass
class _Tally:
    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def per_step(self) -> float:
        return self.accepted / self.steps if self.steps else 0.0

    @property
    def rate(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0


@dataclass
class _Proposals:
    """The tensors of all proposals, row by row."""

    lam: list[float] = field(default_factory=list)
    confidences: list[Confidence] = field(default_factory=list)
    selections: list[Selection] = field(default_factory=list)

    def add(self, lam: float, confidence: Confidence, selection: Selection) -> None:
        self.lam.append(lam)
        self.confidences.append(confidence)
        self.selections.append(selection)

    def tensors(self, depth: int) -> dict[str, torch.Tensor]:
        if not self.lam:
            return {}
        skipped = np.zeros((len(self.lam), depth), dtype=np.uint8)
        for row, selection in zip(skipped, self.selections, strict=True):
            row[list(selection.layers)] = 1
        stacked = {
            "lambda": np.array(self.lam),
            "attention_confidence": np.stack([c.attention for c in self.confidences]),
            "mlp_confidence": np.stack([c.mlp for c in self.confidences]),
            "z": np.stack([s.z for s in self.selections]),
            "gradient": np.stack([s.gradient for s in self.selections]),
            "window": np.stack([s.window for s in self.selections]),
            "threshold": np.stack([s.threshold for s in self.selections]),
            "selected": skipped,
        }
        return {name: torch.from_numpy(values) for name, values in stacked.items()}


class ConfLayersLoop:
    """The paper's loop, driven from outside: told what each step brought, asked for proposals.

    Args:
        settings: of the search.
        decoder: the model.
        costs: measured passes, for the trials' predicted speed; None: it is not predicted.
        on_trial: told about every trial, with the best one so far.
        start: the set to start from; by default the balanced one.
        memo: has the confidences measured; None: one of its own.

    Attributes:
        confidence: of the layers, as last measured; None before.
        plan: the set under evaluation; decode with it.
        best: the trial with most accepted drafts a step.
        trials: all sets looked at.
        stopped_because: one phrase once the search is over, empty before.

    Raises:
        InputError: the model is too shallow.
    """

    def __init__(
        self,
        settings: ConfLayers,
        decoder: Decoder,
        costs: Costs | None = None,
        on_trial: OnTrial = nobody,
        start: SkipPlan | None = None,
        memo: Memo | None = None,
    ) -> None:
        if decoder.depth < 4:
            raise InputError(f"{decoder.depth} layers are too few to choose among: 4 at least")
        self._settings = settings
        self._decoder = decoder
        self._costs = costs
        self._on_trial = on_trial
        self._memo = memo or Memo(decoder)
        self._proposals = _Proposals()
        self._tally = _Tally()
        self._since_best = 0
        self._lam = 0.0
        self._used_lam = 0.0  # the one behind the plan at hand
        self._qwen = "qwen" in str(getattr(decoder.config, "model_type", "")).lower()
        self.plan = start or SkipPlan.balanced(decoder.depth)
        self.confidence: Confidence | None = None
        self.trials: list[Trial] = []
        self.best: Trial | None = None
        self.stopped_because = ""

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What the proposals were made from, a row each."""
        return self._proposals.tensors(self._decoder.depth)

    def stop(self, reason: str) -> None:
        """End the search with what it has."""
        self.stopped_because = self.stopped_because or reason

    def observe(self, drafted: int, accepted: int) -> bool:
        """Note a decode step with the plan; True when its evaluation is over.

        Then :meth:`propose` gives the next one, unless the search has come to its end.
        """
        settings, tally = self._settings, self._tally
        tally.steps += 1
        tally.drafted += drafted
        tally.accepted += accepted
        early = tally.steps >= settings.search_interval / 2 and tally.per_step < 1
        if not early and tally.steps < settings.search_interval:
            return False
        best_before = self.best.accepted / self.best.steps if self.best else -1.0
        improved = tally.per_step > best_before
        note = "best so far" if improved else "given up early" if early else ""
        trial = self._note(self.plan, tally, note)
        if improved:
            self.best, self._since_best = trial, 0
        else:
            self._since_best += 1
        self._tally = _Tally()
        self._on_trial(trial, self.best)
        if tally.per_step > 4 and tally.rate > settings.max_score:
            self.stop(f"acceptance {tally.rate:.2f} with {tally.per_step:.1f} drafts kept a step")
        else:
            self.stop(self._limit())
        return True

    def propose(self, source: Passage) -> None:
        """Set the next plan worth evaluating, or end the search where a limit comes first.

        Args:
            source: the text whose last tokens tell the layers' confidence.
        """
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
            self._proposals.add(self._lam, confidence, selection)
            share = len(selection.layers) / inner
            self._used_lam = self._lam
            too_few = len(selection.layers) < settings.skip_ratio * inner + 1
            if share > settings.skip_ratio + 0.25:
                self._lam += 0.05
            elif too_few:
                self._lam -= 0.05
            plan = SkipPlan.of_layers(selection.layers)
            if not too_few:
                self.plan = plan
                return
            self._on_trial(self._note(plan, _Tally(), "too few layers"), self.best)
        self.stop(self._limit())

    def _limit(self) -> str:
        """Why the search ends here, or ''."""
        if len(self.trials) >= self._settings.max_iterations:
            return f"reached {self._settings.max_iterations} iterations"
        if self._since_best >= self._settings.patience:
            return f"no improvement in {self._since_best} proposals"
        return ""

    def _note(self, plan: SkipPlan, tally: _Tally, note: str) -> Trial:
        trial = Trial(
            iteration=len(self.trials),
            plan=plan,
            steps=tally.steps,
            drafted=tally.drafted,
            accepted=tally.accepted,
            speedup=_observed_speedup(self._costs, plan, self._decoder.depth, tally),
            note=note,
            figures={"lambda": self._used_lam},
        )
        self.trials.append(trial)
        return trial


def _observed_speedup(
    costs: Costs | None, plan: SkipPlan, depth: int, tally: _Tally
) -> float | None:
    """Tokens per second over vanilla, from what was accepted and what passes cost."""
    if not tally.steps or costs is None:
        return None
    drafted = tally.drafted / tally.steps
    cost = drafted * costs.draft_cost(plan, depth) + costs.verify_cost(round(drafted) + 1)
    return (1 + tally.per_step) * costs.verify_cost(1) / cost
