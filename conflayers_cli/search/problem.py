"""The input and the result of every search."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field
from functools import cached_property
from typing import Protocol

import torch

from conflayers_cli.engine.cost_model import PassCosts
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.search.corpus import Continuations
from conflayers_cli.search.memo import Memo
from conflayers_cli.search.objective import STATES_BYTES, DraftParams, Objective
from conflayers_cli.search.texts import ANSWER_TOKENS, NUM_TEXTS
from conflayers_cli.skip_plan import SkipPlan


@dataclass(frozen=True)
class Trial:
    """One plan looked at during a search.

    Attributes:
        iteration: counted from 0.
        plan: what was skipped.
        steps, drafted, accepted: verify steps decoded with it and their drafts; 0 where the plan
            was judged without decoding.
        speedup: predicted tokens per second over vanilla's on this device; None: not known.
        note: what became of it ("best so far", "too few layers", …).
        figures: the strategy's own numbers (ConfLayers: ``lambda``).
    """

    iteration: int
    plan: SkipPlan
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    speedup: float | None = None
    note: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def acceptance_rate(self) -> float | None:
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_step(self) -> float | None:
        return 1 + self.accepted / self.steps if self.steps else None


OnTrial = Callable[[Trial, Trial | None], None]


def ignore_trial(trial: Trial, best: Trial | None) -> None:
    """No-op callback."""


@dataclass
class SearchProblem:
    """What a search works on.

    Attributes:
        decoder: the model.
        prompts: token ids, in the order they are used.
        costs: measured passes.
        max_new_tokens: tokens decoded per prompt at the most.
        end_tokens: ids that end an output.
        on_trial: called with every trial and the best one so far.
        seed: of everything a search draws at random.
        deadline: `Memo.usage` seconds at which a search ends with what it has; None: never.
        judged: the prompts whose continuations plans are judged by; empty: the first ones.
        judged_tokens: of each of them at the most; positions spread over them are judged.
        states_bytes: memory that hidden states may take while plans are judged.
        memo: everything measured goes through it.

    Args:
        shared_memo: the memo, where it has more than this problem's entries; None: a new one.
    """

    decoder: Decoder
    prompts: tuple[tuple[int, ...], ...]
    costs: PassCosts
    max_new_tokens: int
    end_tokens: frozenset[int]
    on_trial: OnTrial = ignore_trial
    seed: int = 0
    deadline: float | None = None
    judged: tuple[tuple[int, ...], ...] = ()
    judged_tokens: int = ANSWER_TOKENS
    states_bytes: int = STATES_BYTES
    shared_memo: InitVar[Memo | None] = None
    memo: Memo = field(init=False)

    def __post_init__(self, shared_memo: Memo | None) -> None:
        self.memo = shared_memo or Memo(self.decoder)

    @cached_property
    def continuations(self) -> Continuations:
        """The model's own continuations of the prompts, shared by all searches."""
        return Continuations(
            self.decoder, self.prompts, self.max_new_tokens, self.end_tokens, self.memo
        )

    @cached_property
    def objective(self) -> Objective:
        """Tokens per second on this device, judged by the continuations, shared by all searches."""
        texts = self.continuations.get(
            len(self.judged) or NUM_TEXTS,
            (*self.judged, *(prompt for prompt in self.prompts if prompt not in self.judged)),
            self.judged_tokens,
        )
        return Objective(self.decoder, self.costs, texts, self.memo, self.states_bytes)

    @cached_property
    def expected_objective(self) -> Objective:
        """The same in expectation (see `Objective.expecting`), for refinement."""
        return self.objective.expecting()

    @property
    def out_of_time(self) -> bool:
        """Whether a search should end with what it has."""
        return self.deadline is not None and self.memo.usage().seconds >= self.deadline


Task = SearchProblem
"""Old name, kept for one version for users' own strategies."""


@dataclass(frozen=True)
class RangePlan:
    """A plan for texts from so many tokens on."""

    from_context: int
    plan: SkipPlan
    setting: DraftParams | None = None


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        plan: the strategy's own choice.
        trials: all plans looked at.
        tensors: per-iteration tensors to be saved, by name.
        interrupted: by the user; the plan is the best until then.
        stopped_because: one phrase.
        setting: the strategy's choice of how to draft; None: `Strategy.setting`.
        ranges: plans for longer contexts, where the best one changes with the length; ascending.
    """

    plan: SkipPlan
    trials: tuple[Trial, ...]
    tensors: Mapping[str, torch.Tensor]
    interrupted: bool
    stopped_because: str
    setting: DraftParams | None = None
    ranges: tuple[RangePlan, ...] = ()


class Strategy(Protocol):
    """A method that chooses a plan: a dataclass, whose fields are saved as its settings."""

    @property
    def name(self) -> str: ...

    @property
    def setting(self) -> DraftParams:
        """The method's own way of drafting, used where nothing else is chosen by measurement."""

    def search(self, problem: SearchProblem) -> SearchResult: ...
