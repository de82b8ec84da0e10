"""A draft that is growing: the chain of one row, and how likely it is to stand."""

from __future__ import annotations

from dataclasses import dataclass, field

from conflayers_cli.spec_decode.acceptance import FRESH, NOTHING, PENDING, Bias, Mark


@dataclass
class Chain:
    """What is being drafted for one row.

    Attributes:
        limit: the most tokens.
        bias: what is special about its text.
        state: where the skipped model stands, for the chance of the token it drafts next.
        sampled: its tokens are sampled: what the skipped model drew must not be dropped again.
        tokens: drafted so far.
        reach: the chance that all of the first i tokens stand, i = 0 … len(tokens).
        marks: what each token teaches.
        sources: who drafted each.
        settled: how many of the tokens the skipped model has decided on; those behind are n-grams'.
        fixed: how many must not be dropped any more (tokens that were sampled).
        closed: nothing is drafted behind the last token.
    """

    limit: int
    bias: Bias
    state: int = FRESH
    sampled: bool = False
    tokens: list[int] = field(default_factory=list)
    reach: list[float] = field(default_factory=lambda: [1.0])
    marks: list[Mark] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    settled: int = 0
    fixed: int = 0
    closed: bool = False

    @property
    def open(self) -> bool:
        return not self.closed and len(self.tokens) < self.limit

    @property
    def pending(self) -> int:
        """Tokens that the skipped model has not decided on."""
        return len(self.tokens) - self.settled

    @property
    def standing(self) -> int:
        """What the chance of the next token that is the skipped model's own depends on."""
        return PENDING if self.pending else self.state

    def add(self, token: int, chance: float, source: str) -> None:
        """Append a token, which nobody has judged yet."""
        self.tokens.append(token)
        self.reach.append(self.reach[-1] * chance)
        self.marks.append(NOTHING)
        self.sources.append(source)

    def settle(self, chance: float, mark: Mark) -> None:
        """The skipped model has judged the first pending token: its chance is this."""
        at = self.settled
        factor = chance * self.reach[at] / self.reach[at + 1] if self.reach[at + 1] else 0.0
        self.reach[at + 1 :] = [reach * factor for reach in self.reach[at + 1 :]]
        self.marks[at] = mark
        self.settled += 1

    def cut(self, count: int) -> None:
        """Drop all but the first ``count`` tokens."""
        del self.tokens[count:], self.marks[count:], self.sources[count:], self.reach[count + 1 :]
        self.settled = min(self.settled, count)
        self.closed = False
