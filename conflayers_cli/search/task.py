"""What every search is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from conflayers_cli.engine.costs import Costs
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.plan import SkipPlan


@dataclass(frozen=True)
class Trial:
    """One plan looked at during a search.

    Attributes:
        iteration: counted from 0.
        plan: what was left out.
        steps, drafted, accepted: verify steps decoded with it and their drafts; 0 where the plan
            was judged without decoding.
        speedup: predicted tokens per second over vanilla's on this device.
        note: what became of it ("best", "kept trying", "too few layers", …).
        figures: the strategy's own numbers (ConfLayers: ``lambda``).
    """

    iteration: int
    plan: SkipPlan
    steps: int
    drafted: int
    accepted: int
    speedup: float | None
    note: str
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def acceptance_rate(self) -> float | None:
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_step(self) -> float | None:
        return 1 + self.accepted / self.steps if self.steps else None


@dataclass(frozen=True)
class Sample:
    """A prompt and the model's own continuation of it, as token ids."""

    prompt: tuple[int, ...]
    output: tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """What a search works on.

    Attributes:
        decoder: the model.
        prompts: token ids, in the order they are used.
        costs: measured passes.
        max_new_tokens: tokens decoded per prompt at the most.
        end_tokens: ids that end an output.
        on_trial: told about every trial, with the best one so far.
    """

    decoder: Decoder
    prompts: tuple[tuple[int, ...], ...]
    costs: Costs
    max_new_tokens: int
    end_tokens: frozenset[int]
    on_trial: Callable[[Trial, Trial | None], None]


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        plan: the strategy's own choice.
        trials: all plans looked at.
        samples: texts decoded on the way (the model's own, since decoding is lossless).
        tensors: per-iteration tensors worth keeping, by name.
        interrupted: cut short by the user; the plan is the best until then.
        stopped_because: one phrase.
    """

    plan: SkipPlan
    trials: tuple[Trial, ...]
    samples: tuple[Sample, ...]
    tensors: Mapping[str, torch.Tensor]
    interrupted: bool
    stopped_because: str


class Strategy(Protocol):
    """A method that chooses a plan."""

    @property
    def name(self) -> str: ...

    def search(self, task: Task) -> SearchResult: ...
