"""What a proposer keeps of each sequence: n-grams, bias, drafts not decided yet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from conflayers_cli.spec_decode.acceptance import (
    ACCEPTED,
    FRESH,
    NO_UPDATE,
    REJECTED,
    RateUpdate,
    TextBias,
)
from conflayers_cli.spec_decode.draft_store import DraftStore
from conflayers_cli.spec_decode.ngram import NgramMatcher, PredictedText

MIN_REMEMBERED = 8
"""Sequences kept where fewer are decoded at once: a proposer may serve several in turn."""


@dataclass
class PendingOutcome:
    """A proposal for a sequence's next tokens, to be learnt from as the sequence grows.

    Attributes:
        start: position of ``tokens[0]`` in the sequence.
        tokens: the sequence's last token (which may be taken back), then those proposed.
        updates: of the estimates, one for each.
        sources: who drafted each but the first, if this is the draft that is verified; else empty.
        num_matched: how many of ``tokens`` the sequence has turned out to hold.
    """

    start: int
    tokens: Sequence[int]
    updates: Sequence[RateUpdate]
    sources: Sequence[str] = ()
    num_matched: int = 0

    def follow(self, text: Sequence[int], bias: TextBias) -> bool:
        """Learn from the tokens whose positions the text has reached; True once all is decided."""
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
        tokens: the growing list of its tokens.
        matcher: of its n-grams; None: they don't draft.
        bias: how its acceptance differs from other sequences'.
        pending: proposals for positions not reached yet.
        last_draft: the draft verified last.
        predicted: n-grams of a text that this one may go on as; None: nothing is predicted.
    """

    tokens: list[int]
    matcher: NgramMatcher | None = None
    bias: TextBias = field(default_factory=TextBias)
    pending: list[PendingOutcome] = field(default_factory=list)
    last_draft: PendingOutcome | None = None
    predicted: PredictedText | None = None

    def learn(self) -> None:
        """Compare what was proposed with what the sequence has become."""
        self.pending = [each for each in self.pending if not each.follow(self.tokens, self.bias)]

    def last_outcome(self) -> tuple[int, int]:
        """(state that the next draft begins in, accepted skip tokens of the last draft)."""
        last = self.last_draft
        if last is None or "skip" not in last.sources:
            return FRESH, 0
        state = ACCEPTED if last.num_matched == len(last.tokens) else REJECTED
        return state, last.sources[: max(last.num_matched - 1, 0)].count("skip")

    def record_proposal(
        self, tokens: Sequence[int], updates: Sequence[RateUpdate], sources: Sequence[str] = ()
    ) -> None:
        """Note tokens proposed behind the sequence, with ``sources`` if they will be verified."""
        start, last = len(self.tokens) - 1, self.tokens[-1]
        outcome = PendingOutcome(start, (last, *tokens), (NO_UPDATE, *updates), tuple(sources))
        self.pending.append(outcome)
        if sources:
            self.last_draft = outcome


class SequenceHistories:
    """Histories of the current sequences and some earlier ones, by the identity of token lists.

    ``ngram``: whether n-grams draft.
    """

    def __init__(self, ngram: bool) -> None:
        self._ngram = ngram
        self.by_id: dict[int, SequenceHistory] = {}

    def get(
        self, sequences: Iterable[tuple[list[int], DraftStore | None]]
    ) -> list[SequenceHistory]:
        """Those of these lists, brought up to date; the least recently used ones are dropped.

        A history holds its list, so no other list can have the same id while it is known. Beside
        each list is the store that its n-grams are looked for in, too.
        """
        histories = [self._get(tokens, store) for tokens, store in sequences]
        for key in list(self.by_id)[: -max(MIN_REMEMBERED, 2 * len(histories))]:
            del self.by_id[key]
        return histories

    def _get(self, tokens: list[int], store: DraftStore | None) -> SequenceHistory:
        history = self.by_id.pop(id(tokens), None)
        if history is None:
            for other in self.by_id.values():  # their last drafts are decided by now
                other.learn()
            matcher = NgramMatcher(store) if self._ngram else None
            history = SequenceHistory(tokens, matcher)
        self.by_id[id(tokens)] = history  # the most recently used is the last
        history.learn()
        if history.matcher is not None:
            history.matcher.update(tokens)
        return history
