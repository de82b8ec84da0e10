"""What every search is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field
from typing import Protocol

import torch

from conflayers_cli.engine.cost_model import Costs
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.search.corpus import Texts
from conflayers_cli.search.memo import Memo
from conflayers_cli.search.objective import Objective, Setting
from conflayers_cli.skip_plan import SkipPlan


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


OnTrial = Callable[[Trial, Trial | None], None]


def nobody(trial: Trial, best: Trial | None) -> None:
    """Nobody is told."""


@dataclass
class Task:
    """What a search works on.

    Attributes:
        decoder: the model.
        prompts: token ids, in the order they are used.
        costs: measured passes.
        max_new_tokens: tokens decoded per prompt at the most.
        end_tokens: ids that end an output.
        on_trial: told about every trial, with the best one so far.
        seed: of whatever a search draws at random.
        deadline: once `Memo.usage` has come to so many seconds a search ends with what it has;
            None: never.
        memo: all that is measured goes through it.
        texts: the model's own continuations of the prompts, shared by all searches of a task.

    Args:
        shared_memo: the memo, where it knows more than this task's outcomes; None: a new one.
    """

    decoder: Decoder
    prompts: tuple[tuple[int, ...], ...]
    costs: Costs
    max_new_tokens: int
    end_tokens: frozenset[int]
    on_trial: OnTrial = nobody
    seed: int = 0
    deadline: float | None = None
    shared_memo: InitVar[Memo | None] = None
    memo: Memo = field(init=False)
    texts: Texts = field(init=False)
    _objective: Objective | None = field(init=False, default=None)

    def __post_init__(self, shared_memo: Memo | None) -> None:
        self.memo = shared_memo or Memo(self.decoder)
        self.texts = Texts(
            decoder=self.decoder,
            prompts=self.prompts,
            max_new_tokens=self.max_new_tokens,
            end_tokens=self.end_tokens,
            memo=self.memo,
        )

    @property
    def objective(self) -> Objective:
        """Tokens per second on this device, judged by the model's own texts.

        Made when first asked for; what it has judged stays known to every search of the task.
        """
        if self._objective is None:
            samples = self.texts.enough()
            self._objective = Objective(self.decoder, self.costs, samples, memo=self.memo)
        return self._objective

    @property
    def out_of_time(self) -> bool:
        """Whether a search should end with what it has."""
        return self.deadline is not None and self.memo.usage().seconds >= self.deadline


@dataclass(frozen=True)
class RangePlan:
    """A plan for texts from so many tokens on."""

    from_context: int
    plan: SkipPlan
    setting: Setting | None = None


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        plan: the strategy's own choice.
        trials: all plans looked at.
        tensors: per-iteration tensors worth keeping, by name.
        interrupted: cut short by the user; the plan is the best until then.
        stopped_because: one phrase.
        setting: the way of drafting that the strategy chose; None: its usual one.
        ranges: plans for longer contexts, where the best one changes with the length; ascending.
    """

    plan: SkipPlan
    trials: tuple[Trial, ...]
    tensors: Mapping[str, torch.Tensor]
    interrupted: bool
    stopped_because: str
    setting: Setting | None = None
    ranges: tuple[RangePlan, ...] = ()


class Strategy(Protocol):
    """A method that chooses a plan. Its public fields are its settings, for the record."""

    @property
    def name(self) -> str: ...

    @property
    def setting(self) -> Setting:
        """The method's own way of drafting, used where nothing else is chosen by measurement."""

    def search(self, task: Task) -> SearchResult: ...
