"""ConfLayers: iterative confidence-based layer skipping (arXiv 2604.14612), over sample prompts.

The loop of the paper, with slips of the authors' release set right: the context window is fed at
its own positions, confidences are float32, a plan is never "restored" to an empty one, and λ falls
for every set too small to be evaluated (else a set one layer short would be proposed for ever).
Evaluation drafts a chain; the paper's also verifies side branches beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from conflayers_cli.engine.costs import Costs
from conflayers_cli.engine.decode import Generation
from conflayers_cli.engine.draft import SkipDrafter
from conflayers_cli.engine.plan import SkipPlan
from conflayers_cli.errors import InputError

from .confidence import Confidence, Selection, measure_confidence, select_layers
from .task import Sample, SearchResult, Task, Trial

FEW_TOKENS = 32
"""A window shorter than this says little: the previous prompt's end is used instead."""


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
    max_draft: int = 25
    stop_probability: float = 0.8

    @property
    def name(self) -> str:
        return "conflayers"

    def search(self, task: Task) -> SearchResult:
        """Run the loop until it stops improving, reaches its end, or is interrupted.

        Raises:
            InputError: the model is too shallow.
        """
        if task.decoder.depth < 4:
            raise InputError(f"{task.decoder.depth} layers are too few to choose among: 4 at least")
        return _Loop(self, task).run()


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
class _Record:
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


class _Stream:
    """The prompts decoded one after the other, round and round."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._next = 0
        self.current = self._begin()
        self.previous: Generation | None = None
        self.samples: dict[tuple[int, ...], Sample] = {}

    def _begin(self) -> Generation:
        task = self._task
        prompt = task.prompts[self._next % len(task.prompts)]
        self._next += 1
        return Generation(
            task.decoder, prompt, max_new_tokens=task.max_new_tokens, end_tokens=task.end_tokens
        )

    def steps(self, drafter: SkipDrafter) -> Iterator[tuple[int, int]]:
        """(drafted, accepted) of decode steps, without end.

        Raises:
            InputError: every prompt's output ends with its first token.
        """
        idle = 0
        while True:
            if self.current.finish is not None:
                self.note()
                self.previous, self.current = self.current, self._begin()
                idle += 1
                if idle > len(self._task.prompts):
                    raise InputError("every prompt's output ends with its first token")
            self.current.drafter = drafter
            step = self.current.step()
            if step.drafter != "prefill":
                idle = 0
                yield step.drafted, step.accepted

    def note(self) -> None:
        """Keep the text so far as a sample."""
        generation = self.current
        prompt = tuple(generation.tokens[: generation.prompt_length])
        known = self.samples.get(prompt)
        if known is None or len(known.output) < len(generation.output):
            self.samples[prompt] = Sample(prompt, tuple(generation.output))

    def window_source(self, window: int) -> Generation:
        """The generation whose last tokens the confidence is taken over."""
        enough = len(self.current.output) >= min(window, FEW_TOKENS)
        if enough or self.previous is None:
            return self.current
        return max(self.current, self.previous, key=lambda generation: len(generation.output))


class _Loop:
    def __init__(self, settings: ConfLayers, task: Task) -> None:
        self.settings = settings
        self.task = task
        self.stream = _Stream(task)
        self.record = _Record()
        self.trials: list[Trial] = []
        self.best: Trial | None = None
        self.since_best = 0
        self.lam = 0.0
        self.used_lam = 0.0  # the one behind the plan at hand
        self.qwen = "qwen" in str(getattr(task.decoder.config, "model_type", "")).lower()

    def run(self) -> SearchResult:
        interrupted, reason = False, ""
        plan = SkipPlan.balanced(self.task.decoder.depth)
        try:
            while not (reason := self._evaluate(plan)):
                proposal = self._propose()
                if proposal is None:
                    reason = self._limit() or "no further proposal"
                    break
                plan = proposal
        except KeyboardInterrupt:
            interrupted, reason = True, "interrupted"
        self.stream.note()
        return SearchResult(
            plan=self.best.plan if self.best else plan,
            trials=tuple(self.trials),
            samples=tuple(self.stream.samples.values()),
            tensors=self.record.tensors(self.task.decoder.depth),
            interrupted=interrupted,
            stopped_because=reason,
        )

    def _evaluate(self, plan: SkipPlan) -> str:
        """Decode with a plan for an interval; why the search ends with it, or ''."""
        settings = self.settings
        drafter = SkipDrafter(
            self.task.decoder, plan, settings.max_draft, settings.stop_probability
        )
        tally = _Tally()
        early = False
        for drafted, accepted in self.stream.steps(drafter):
            tally.steps += 1
            tally.drafted += drafted
            tally.accepted += accepted
            early = tally.steps >= settings.search_interval / 2 and tally.per_step < 1
            if early or tally.steps >= settings.search_interval:
                break
        best_before = self.best.accepted / self.best.steps if self.best else -1.0
        improved = tally.per_step > best_before
        self._note(plan, tally, "best so far" if improved else "given up early" if early else "")
        if improved:
            self.best, self.since_best = self.trials[-1], 0
        else:
            self.since_best += 1
        self.task.on_trial(self.trials[-1], self.best)
        if tally.per_step > 4 and tally.rate > settings.max_score:
            return f"acceptance {tally.rate:.2f} with {tally.per_step:.1f} drafts kept a step"
        return self._limit()

    def _limit(self) -> str:
        if len(self.trials) >= self.settings.max_iterations:
            return f"reached {self.settings.max_iterations} iterations"
        if self.since_best >= self.settings.patience:
            return f"no improvement in {self.since_best} proposals"
        return ""

    def _propose(self) -> SkipPlan | None:
        """The next set worth evaluating; None when a limit comes first."""
        decoder, settings = self.task.decoder, self.settings
        source = self.stream.window_source(settings.context_window)
        window = min(settings.context_window, len(source.output))
        confidence = measure_confidence(decoder, source.cache, source.tokens, window)
        inner = decoder.depth - 2
        while not self._limit():
            selection = select_layers(confidence.total, self.lam, decoder.depth, qwen=self.qwen)
            self.record.add(self.lam, confidence, selection)
            share = len(selection.layers) / inner
            self.used_lam = self.lam
            too_few = len(selection.layers) < settings.skip_ratio * inner + 1
            if share > settings.skip_ratio + 0.25:
                self.lam += 0.05
            elif too_few:
                self.lam -= 0.05
            plan = SkipPlan.of_layers(selection.layers)
            if not too_few:
                return plan
            self._note(plan, _Tally(), "too few layers")
            self.task.on_trial(self.trials[-1], self.best)
        return None

    def _note(self, plan: SkipPlan, tally: _Tally, note: str) -> None:
        self.trials.append(
            Trial(
                iteration=len(self.trials),
                plan=plan,
                steps=tally.steps,
                drafted=tally.drafted,
                accepted=tally.accepted,
                speedup=_observed_speedup(self.task.costs, plan, self.task.decoder.depth, tally),
                note=note,
                figures={"lambda": self.used_lam},
            )
        )


def _observed_speedup(costs: Costs, plan: SkipPlan, depth: int, tally: _Tally) -> float | None:
    """Tokens per second over vanilla, from what was accepted and what passes cost."""
    if not tally.steps:
        return None
    drafted = tally.drafted / tally.steps
    cost = drafted * costs.draft_cost(plan, depth) + costs.verify_cost(round(drafted) + 1)
    return (1 + tally.per_step) * costs.verify_cost(1) / cost
