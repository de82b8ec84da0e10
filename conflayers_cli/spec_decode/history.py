"""What a proposer knows of the sequences it drafts for: n-grams, bias, drafts not decided yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from conflayers_cli.spec_decode.acceptance import (
    ACCEPTED,
    FRESH,
    NO_UPDATE,
    REJECTED,
    RateUpdate,
    TextBias,
)
from conflayers_cli.spec_decode.ngram import NgramIndex

MIN_REMEMBERED = 8
"""Sequences remembered at the least, for a proposer that serves several in turn."""


@dataclass
class PendingOutcome:
    """A proposal for a sequence's next tokens, to be learnt from as the sequence grows.

    Attributes:
        start: position of the first of ``tokens`` in the sequence.
        tokens: the sequence's last token (which may be taken back), then those proposed.
        updates: of the estimates, one for each.
        sources: who drafted each but the first, where this is the draft that is verified; else
            empty.
        num_matched: how many of ``tokens`` the sequence has turned out to hold.
    """

    start: int
    tokens: Sequence[int]
    updates: Sequence[RateUpdate]
    sources: Sequence[str] = ()
    num_matched: int = 0

    def follow(self, text: Sequence[int], bias: TextBias) -> bool:
        """Learn from the tokens whose positions the text has reached; True once that is over."""
        while self.num_matched < len(self.tokens):
            position = self.start + self.num_matched
            if position >= len(text):
                return False
            hit = text[position] == self.tokens[self.num_matched]
            self.updates[self.num_matched].apply(hit, bias)
            if not hit:
                return True
            self.num_matched += 1
        return True


@dataclass
class SequenceHistory:
    """One sequence, as a proposer knows it.

    Attributes:
        tokens: the list that its tokens are kept in, which grows.
        index: its n-grams.
        bias: how its acceptance differs from other sequences'.
        pending: proposals for positions that it has not reached yet.
        last_draft: the draft verified last.
    """

    tokens: list[int]
    index: NgramIndex = field(default_factory=NgramIndex)
    bias: TextBias = field(default_factory=TextBias)
    pending: list[PendingOutcome] = field(default_factory=list)
    last_draft: PendingOutcome | None = None

    def learn(self) -> None:
        """Compare what was proposed with what the sequence has become."""
        self.pending = [each for each in self.pending if not each.follow(self.tokens, self.bias)]

    def last_outcome(self) -> tuple[int, int]:
        """(the state that the next draft begins in, accepted skip tokens of the last draft).

        As of the last call of :meth:`learn`.
        """
        last = self.last_draft
        if last is None or "skip" not in last.sources:
            return FRESH, 0
        state = ACCEPTED if last.num_matched == len(last.tokens) else REJECTED
        return state, last.sources[: max(last.num_matched - 1, 0)].count("skip")

    def record_proposal(
        self, tokens: Sequence[int], updates: Sequence[RateUpdate], sources: Sequence[str] = ()
    ) -> None:
        """Note tokens proposed behind the sequence as it is, and what each teaches.

        ``sources``: who drafted each, where they are the draft that is going to be verified.
        """
        start, last = len(self.tokens) - 1, self.tokens[-1]
        outcome = PendingOutcome(start, (last, *tokens), (NO_UPDATE, *updates), tuple(sources))
        self.pending.append(outcome)
        if sources:
            self.last_draft = outcome


class SequenceHistories:
    """The sequences at work, and some that were; each is known by the list of its tokens.

    Args:
        index: whether their n-grams are indexed.
    """

    def __init__(self, index: bool) -> None:
        self._index = index
        self._known: dict[int, SequenceHistory] = {}

    def __contains__(self, tokens: list[int]) -> bool:
        known = self._known.get(id(tokens))
        return known is not None and known.tokens is tokens

    def __len__(self) -> int:
        return len(self._known)

    def get(self, lists: Sequence[list[int]]) -> list[SequenceHistory]:
        """Those of these lists, brought up to date; those longest out of use are forgotten.

        Each holds its list, so no other list comes by the same id while it is known.
        """
        histories = [self._get(tokens) for tokens in lists]
        for key in list(self._known)[: -max(MIN_REMEMBERED, 2 * len(histories))]:
            del self._known[key]
        return histories

    def _get(self, tokens: list[int]) -> SequenceHistory:
        history = self._known.pop(id(tokens), None)
        if history is None:
            for other in self._known.values():  # their last drafts have been decided meanwhile
                other.learn()
            history = SequenceHistory(tokens)
        self._known[id(tokens)] = history  # the latest used is the last
        history.learn()
        if self._index:
            history.index.update(tokens)
        return history
