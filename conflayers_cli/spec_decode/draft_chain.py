"""A growing draft of one sequence, and how likely it is to be accepted."""

from __future__ import annotations

from dataclasses import dataclass, field

from conflayers_cli.engine.token_choice import TokenChoice
from conflayers_cli.spec_decode.acceptance import (
    FRESH,
    NO_UPDATE,
    PENDING,
    RateUpdate,
    confidence_bin,
)
from conflayers_cli.spec_decode.history import SequenceHistory
from conflayers_cli.spec_decode.proposer import Context


@dataclass
class DraftChain:
    """What is being drafted for one sequence.

    Attributes:
        context, history: of the sequence.
        limit: the most tokens.
        last_state: the state in which the skipped model drafts behind the checked tokens.
        tokens: drafted so far.
        survival: the chance that all of the first i tokens are accepted, i = 0 … len(tokens).
        updates: of the estimates, once each token is decided.
        sources: who drafted each: "skip", "ngram", or "store" (an n-gram of an earlier text).
        choices: the skipped model's own at each token; None where it has not checked an n-gram's.
        num_checked: how many tokens the skipped model has decided on; those behind are n-grams'.
        closed: nothing is drafted behind the last token.
    """

    context: Context
    history: SequenceHistory
    limit: int
    last_state: int = FRESH
    tokens: list[int] = field(default_factory=list)
    survival: list[float] = field(default_factory=lambda: [1.0])
    updates: list[RateUpdate] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    choices: list[TokenChoice | None] = field(default_factory=list)
    num_checked: int = 0
    closed: bool = False

    @property
    def sampled(self) -> bool:
        """Whether tokens are sampled: then n-grams come true less often."""
        return not self.context.sampler.settings.greedy

    @property
    def open(self) -> bool:
        return not self.closed and len(self.tokens) < self.limit

    @property
    def num_unchecked(self) -> int:
        """n-grams' tokens that the skipped model has not decided on."""
        return len(self.tokens) - self.num_checked

    @property
    def state(self) -> int:
        """What the chance of the skipped model's own next token depends on."""
        return PENDING if self.num_unchecked else self.last_state

    @property
    def inputs(self) -> list[int]:
        """What the skipped model has not run yet: the last checked token, the unchecked ones."""
        return [self.context.tokens[-1], *self.tokens][self.num_checked :]

    @property
    def input_position(self) -> int:
        """The position of the first input."""
        return len(self.context.tokens) - 1 + self.num_checked

    def add(self, token: int, chance: float, source: str) -> None:
        """Append an unchecked token."""
        self.tokens.append(token)
        self.survival.append(self.survival[-1] * chance)
        self.updates.append(NO_UPDATE)
        self.sources.append(source)
        self.choices.append(None)

    def check(self, chance: float, update: RateUpdate, choice: TokenChoice) -> None:
        """Mark the first unchecked token as checked by the skipped model.

        ``chance``: that it is accepted; ``choice``: the model's own.
        """
        at = self.num_checked
        before, after = self.survival[at], self.survival[at + 1]
        factor = chance * before / after if after else 0.0
        self.survival[at + 1 :] = [each * factor for each in self.survival[at + 1 :]]
        self.updates[at] = update
        self.choices[at] = choice
        self.num_checked += 1
        self.last_state = confidence_bin(choice.confidence)

    def cut(self, count: int) -> None:
        """Drop all but the first ``count`` tokens."""
        for each in (self.tokens, self.updates, self.sources, self.choices):
            del each[count:]
        del self.survival[count + 1 :]
        self.num_checked = min(self.num_checked, count)
        self.closed = False

    def candidates(self) -> tuple[list[float], list[list[tuple[int, float]]]]:
        """(the tokens' shares, for each the other tokens and theirs), as `propose_leaves` wants.

        An n-gram's token that was not checked has a share of 1 and no others.
        """
        shares, others = [], []
        for token, choice in zip(self.tokens, self.choices, strict=True):
            named = {} if choice is None else dict(((choice.token, choice.share), *choice.others))
            shares.append(named.pop(token, 0.0) if named else 1.0)
            others.append(list(named.items()))
        return shares, others
