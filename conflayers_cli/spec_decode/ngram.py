"""n-gram drafts: what followed earlier occurrences of a text's end, in it and in earlier texts.

As prompt lookup (transformers' ``prompt_lookup_num_tokens``), but by the longest match.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from conflayers_cli.spec_decode.draft_store import DraftStore
from conflayers_cli.spec_decode.suffix_index import MAX_MATCH_LENGTH, SIZES, SuffixIndex


@dataclass(frozen=True)
class Match:
    """An earlier position whose last tokens are the text's, and what followed there.

    Attributes:
        length: how many tokens agree, up to ``MAX_MATCH_LENGTH``; 0: there is no such position.
        tokens: what followed.
        agreed: whether the same token followed wherever as many agree.
        stored: whether it is a position of an earlier text.
    """

    length: int = 0
    tokens: tuple[int, ...] = ()
    agreed: bool = True
    stored: bool = False

    @property
    def source(self) -> str:
        """Who drafts what followed, for statistics."""
        return "store" if self.stored else "ngram"


NO_MATCH = Match()


class NgramMatcher:
    """Matches of one text that only grows, but for its last token, which may be taken back.

    So contexts that end with it are indexed once another token follows.

    Args:
        store: of earlier texts; None: there are none.
    """

    def __init__(self, store: DraftStore | None = None) -> None:
        self._index = SuffixIndex()
        self._store = store

    def update(self, text: Sequence[int]) -> None:
        """Index what the text has gained."""
        if len(text) - 1 > self._index.size:
            self._index.extend(text[self._index.size : -1])

    def lookup(self, text: Sequence[int], drafted: Sequence[int], count: int) -> Match:
        """The longest match of the end of text and draft, and up to ``count`` tokens behind it.

        Of equally long ones one whose next token followed most often, of these one in the text
        itself, of these the latest. A continuation that reaches the end of the draft goes on into
        itself, as a period does. ``text`` is that of the last :meth:`update`.
        """
        if count < 1:
            return NO_MATCH
        tail = [*text[-MAX_MATCH_LENGTH:], *drafted][-MAX_MATCH_LENGTH:]
        length, positions = self._index.find(tail)
        nexts = [text[at + 1] for at in positions]
        stored: list[list[int]] = []
        if self._store is not None:
            found, continuations = self._store.find(tail, count)
            if found > length:
                length, positions, nexts = found, [], []
            if found == length:
                stored = continuations
        if not length:
            return NO_MATCH
        best, agreed = _most_frequent([*nexts, *(tokens[0] for tokens in stored)])
        if best >= len(positions):
            return Match(length, tuple(stored[best - len(positions)]), agreed, stored=True)
        begin = positions[best] + 1
        behind = list(text[begin : begin + count])
        if len(behind) < count:
            behind += drafted
            period = len(behind)
            while len(behind) < count:
                behind.append(behind[len(behind) - period])
        return Match(length, tuple(behind[:count]), agreed)


class PredictedText:
    """A text that another one may go on as: an edited file is mostly what it was.

    Args:
        tokens: the predicted ones.
        before: the tokens of the other text that they would follow.
    """

    def __init__(self, tokens: Sequence[int], before: Sequence[int]) -> None:
        self._text = (*before[-SIZES[0] :], *tokens)
        self._index = SuffixIndex()
        self._index.extend(self._text[:-1])

    def lookup(self, text: Sequence[int], drafted: Sequence[int], count: int) -> Match:
        """The longest match of the end of text and draft, and up to ``count`` tokens behind it."""
        if count < 1:
            return NO_MATCH
        length, positions = self._index.find(
            [*text[-MAX_MATCH_LENGTH:], *drafted][-MAX_MATCH_LENGTH:]
        )
        if not length:
            return NO_MATCH
        best, agreed = _most_frequent([self._text[at + 1] for at in positions])
        begin = positions[best] + 1
        return Match(length, self._text[begin : begin + count], agreed)


def _most_frequent(tokens: Sequence[int]) -> tuple[int, bool]:
    """(index of the first of those that come most often, whether all are the same)."""
    counts = [tokens.count(token) for token in tokens]
    return counts.index(max(counts)), counts[0] == len(counts)
