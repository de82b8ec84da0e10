"""n-gram drafts: prompt lookup, as transformers' ``prompt_lookup_num_tokens``, but by the longest
match, and with an index that grows token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NGRAM_SIZES = (4, 2, 1)
"""Tokens of the n-grams indexed, falling. The longest match is searched among the positions of the
first size that has any, so the sizes between would rarely find another one."""
MAX_POSITIONS = 8
"""Positions remembered per n-gram, the latest ones."""
MAX_MATCH_LENGTH = 32
"""Tokens compared: a longer match is no better."""


@dataclass(frozen=True)
class Match:
    """An earlier position whose last tokens are the text's, and what followed there.

    Attributes:
        length: how many tokens agree, up to ``MAX_MATCH_LENGTH``; 0: there is no such position.
        tokens: what followed.
        agreed: whether the same token followed wherever as many agree.
    """

    length: int = 0
    tokens: tuple[int, ...] = ()
    agreed: bool = True


NO_MATCH = Match()


class NgramIndex:
    """The n-grams of one text that only grows, but for its last token, which may be taken back.

    So n-grams that end with it are indexed once another token follows.
    """

    def __init__(self) -> None:
        self._positions: dict[tuple[int, ...], list[int]] = {}
        self._indexed = 0

    def update(self, text: Sequence[int]) -> None:
        """Index what the text has gained."""
        for end in range(self._indexed, len(text) - 1):
            for size in NGRAM_SIZES:
                if size <= end + 1:
                    ngram = tuple(text[end + 1 - size : end + 1])
                    positions = self._positions.setdefault(ngram, [])
                    positions.append(end)
                    del positions[:-MAX_POSITIONS]
        self._indexed = max(self._indexed, len(text) - 1)

    def lookup(self, text: Sequence[int], drafted: Sequence[int], count: int) -> Match:
        """The longest match of the end of text and draft, and up to ``count`` tokens behind it.

        Of equally long ones one whose next token followed most often, of these the latest. A
        continuation that reaches the end of the draft goes on into itself, as a period does.
        ``text`` is that of the last :meth:`update`.
        """
        if count < 1:
            return NO_MATCH
        tail = [*text[-MAX_MATCH_LENGTH:], *drafted][-MAX_MATCH_LENGTH:]
        longest, position, agreed = self.find(text, tail)
        if not longest:
            return NO_MATCH
        if position + 1 + count <= len(text):
            return Match(longest, tuple(text[position + 1 : position + 1 + count]), agreed)
        behind = [*text[position + 1 :], *drafted]
        known = len(behind)
        while len(behind) < known + count:
            behind.append(behind[len(behind) - known])
        return Match(longest, tuple(behind[:count]), agreed)

    def find(self, text: Sequence[int], tail: Sequence[int]) -> tuple[int, int, bool]:
        """(length, position, agreed) of the longest match of a tail in the text; length 0: none.

        ``text`` as of :meth:`lookup`; the other values as of `Match`.
        """
        ends = (self._positions.get(tuple(tail[-size:])) for size in NGRAM_SIZES)
        positions = next(filter(None, ends), None)
        if positions is None:
            return 0, 0, True
        longest = 0
        best: list[int] = []  # the positions that match longest, the latest first
        for position in reversed(positions):
            bound, length = min(len(tail), position + 1), 1
            while length < bound and text[position - length] == tail[-1 - length]:
                length += 1
            if length > longest:
                longest, best = length, [position]
            elif length == longest:
                best.append(position)
        position, agreed = best[0], True
        if len(best) > 1:
            nexts = [text[at + 1] for at in best]
            counts = [nexts.count(token) for token in nexts]
            position, agreed = best[counts.index(max(counts))], counts[0] == len(counts)
        return longest, position, agreed


class PredictedText:
    """A text that another one may go on as: an edited file is mostly what it was.

    Args:
        tokens: the predicted ones.
        before: the tokens of the other text that they would follow.
    """

    def __init__(self, tokens: Sequence[int], before: Sequence[int]) -> None:
        self._text = (*before[-NGRAM_SIZES[0] :], *tokens)
        self._index = NgramIndex()
        self._index.update(self._text)

    def lookup(self, text: Sequence[int], drafted: Sequence[int], count: int) -> Match:
        """The longest match of the end of text and draft, and up to ``count`` tokens behind it."""
        if count < 1:
            return NO_MATCH
        tail = [*text[-MAX_MATCH_LENGTH:], *drafted][-MAX_MATCH_LENGTH:]
        longest, position, agreed = self._index.find(self._text, tail)
        tokens = self._text[position + 1 : position + 1 + count] if longest else ()
        return Match(longest, tokens, agreed)
