"""Drafters that need no model, in plain Python, for `drafter_study`: what they find, not how fast.

`Occurrences` finds every earlier occurrence of a text's end, so a rule on top of it sees what a
suffix automaton or a suffix tree would see; with few positions, what a table of hashes sees.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from conflayers_cli.spec_decode.ngram import Match

BORDER = -1
"""Between two texts: no token."""
ALL = 512
"""Occurrences looked at where a rule looks at all of them."""
LONGEST = 64
"""Tokens compared."""
RANKS = (0.42, 0.13, 0.07, 0.05, 0.03, 0.025, 0.02, 0.015)
"""How often the next token is the n-th one that the model gave behind the same token before."""

Found = tuple[int, int]
"""An earlier occurrence: (tokens that agree, its last position)."""


@dataclass
class Occurrences:
    """Where the end of a text occurred before.

    Attributes:
        sizes: of the contexts indexed, falling; the largest that occurred decides.
        limit: occurrences of a context, the latest ones.
        tokens: all tokens, texts apart by `BORDER`.
    """

    sizes: tuple[int, ...]
    limit: int = ALL
    tokens: list[int] = field(default_factory=list)
    _ends: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    _indexed: int = 0

    def update(self, text: Sequence[int]) -> None:
        """The text has grown; its last token may be taken back, so it is indexed later."""
        self.tokens = list(text)
        self._index(len(text) - 1)

    def add(self, text: Sequence[int]) -> None:
        """One more text, which has come to its end."""
        self.tokens += [*text, BORDER]
        self._index(len(self.tokens) - 2)
        self._indexed = len(self.tokens)

    def _index(self, end: int) -> None:
        tokens = self.tokens
        for at in range(self._indexed, end):
            for size in self.sizes:
                context = tuple(tokens[max(at + 1 - size, 0) : at + 1])
                if len(context) == size and BORDER not in context:
                    ends = self._ends.setdefault(context, [])
                    ends.append(at)
                    if len(ends) > 2 * self.limit:
                        del ends[: -self.limit]
        self._indexed = max(self._indexed, end)

    def find(self, tail: Sequence[int]) -> list[Found]:
        """Occurrences of the longest context indexed, the latest first."""
        for size in self.sizes:
            ends = self._ends.get(tuple(tail[-size:])) if len(tail) >= size else None
            if ends:
                return [(self._length(tail, at), at) for at in reversed(ends[-self.limit :])]
        return []

    def _length(self, tail: Sequence[int], at: int) -> int:
        tokens, length = self.tokens, 0
        bound = min(len(tail), at + 1, LONGEST)
        while length < bound and tokens[at - length] == tail[-1 - length]:
            length += 1
        return length

    def behind(self, at: int, count: int, tail: Sequence[int] = ()) -> list[int]:
        """Tokens behind a position, up to the end of its text; there it goes on into ``tail``."""
        found = self.tokens[at + 1 : at + 1 + count]
        if BORDER in found:
            return found[: found.index(BORDER)]
        if len(found) < count and at + 1 < len(self.tokens):
            found = [*self.tokens[at + 1 :], *tail]
            period = len(found)
            while len(found) < count:
                found.append(found[len(found) - period])
        return found[:count]


Continuation = tuple[int, Sequence[int], bool]
"""(tokens that agree before it, tokens, whether it is of a stored text)"""


@dataclass
class SuffixDrafter:
    """Drafts what followed earlier occurrences in the text, and in a store of other texts.

    Attributes:
        own: of the text.
        store: of earlier texts; None: there are none.
        by_counts: the longest context need not be the best one: of all lengths that with the
            highest sum of the shares of its continuation (SuffixDecoding, arXiv 2411.04975).
    """

    own: Occurrences
    store: Occurrences | None = None
    by_counts: bool = False

    def update(self, text: Sequence[int]) -> None:
        self.own.update(text)

    def continuations(
        self, text: Sequence[int], drafted: Sequence[int], count: int
    ) -> list[Continuation]:
        """What followed, the longest match first, of these the text's own and the latest first."""
        tail = [*text[-LONGEST:], *drafted][-LONGEST:]
        found = [
            (length, source, at)
            for source in (self.own, self.store)
            if source is not None
            for length, at in source.find(tail)
        ]
        found.sort(key=lambda each: -each[0])
        return [
            (length, source.behind(at, count, drafted), source is self.store)
            for length, source, at in found
        ]

    def lookup(self, text: Sequence[int], drafted: Sequence[int], count: int) -> Match:
        """The best continuation, as `NgramIndex.lookup`."""
        if count < 1:
            return Match()
        found = [each for each in self.continuations(text, drafted, count) if each[1]]
        if not found:
            return Match()
        if not self.by_counts:
            return vote(found)
        best, value = Match(), 0.0
        for length in sorted({length for length, *_ in found}, reverse=True):
            group = [tokens for own, tokens, _ in found if own >= length]
            tokens, score, agreed = likeliest(group, count)
            if score > value * 1.0001:
                best, value = Match(length, tuple(tokens), agreed), score
        return best

    def tree(self, text: Sequence[int], budget: int) -> dict[tuple[int, ...], None]:
        """Up to ``budget`` nodes, as paths: the likeliest by the counts of the longest contexts."""
        found = [each for each in self.continuations(text, (), budget) if each[1]]
        if not found:
            return {}
        longest = found[0][0]
        return grow([tokens for length, tokens, _ in found if length >= longest], budget)


def vote(found: Sequence[Continuation]) -> Match:
    """Of the longest matches one whose next token followed most often, of these the first."""
    best = [each for each in found if each[0] == found[0][0]]
    nexts = [tokens[0] for _, tokens, _ in best]
    counts = [nexts.count(token) for token in nexts]
    length, tokens, stored = best[counts.index(max(counts))]
    return Match(length, tuple(tokens), counts[0] == len(counts), stored)


def likeliest(group: Sequence[Sequence[int]], count: int) -> tuple[list[int], float, bool]:
    """(continuation that follows the majority token by token, sum of its shares, all agree)."""
    tokens: list[int] = []
    share, score, agreed = 1.0, 0.0, True
    while group and len(tokens) < count:
        nexts = [each[len(tokens)] for each in group if len(each) > len(tokens)]
        if not nexts:
            break
        token = max(nexts, key=nexts.count)
        share *= nexts.count(token) / len(nexts)
        agreed = agreed and (len(tokens) > 0 or nexts.count(token) == len(nexts))
        score += share
        tokens.append(token)
        group = [
            each for each in group if len(each) >= len(tokens) and each[len(tokens) - 1] == token
        ]
    return tokens, score, agreed


def grow(group: Sequence[Sequence[int]], budget: int) -> dict[tuple[int, ...], None]:
    """The likeliest nodes of the tree of continuations, by their share of all."""
    nodes: dict[tuple[int, ...], None] = {}
    heap: list[tuple[float, int, tuple[int, ...], list[Sequence[int]]]] = [
        (-1.0, 0, (), list(group))
    ]
    number = 0
    while heap and len(nodes) < budget:
        share, _, path, members = heapq.heappop(heap)
        if path:
            nodes[path] = None
        children: dict[int, list[Sequence[int]]] = {}
        for each in members:
            if len(each) > len(path):
                children.setdefault(each[len(path)], []).append(each)
        total = sum(map(len, children.values()))
        for token, own in children.items():
            number += 1
            heapq.heappush(heap, (share * len(own) / total, number, (*path, token), own))
    return nodes


@dataclass
class Recycling:
    """Token recycling (arXiv 2408.08696): the model's best tokens behind each token, of last time.

    Attributes:
        table: by token its next ones, best first.
    """

    table: dict[int, Sequence[int]] = field(default_factory=dict)

    def note(self, token: int, best: Sequence[int]) -> None:
        self.table[token] = best

    def chain(self, token: int, count: int) -> list[int]:
        found: list[int] = []
        while len(found) < count and token in self.table:
            token = self.table[token][0]
            found.append(token)
        return found

    def tree(
        self, token: int, budget: int, nodes: Mapping[tuple[int, ...], None] | None = None
    ) -> dict[tuple[int, ...], None]:
        """Up to ``budget`` nodes by `RANKS`, beside those that there are."""
        found = dict(nodes or {})
        heap: list[tuple[float, int, tuple[int, ...]]] = [(-1.0, 0, ())]
        number = 0
        while heap and len(found) < budget:
            share, _, path = heapq.heappop(heap)
            if path:
                found[path] = None
            for rank, each in enumerate(self.table.get(path[-1] if path else token, ())):
                number += 1
                heapq.heappush(heap, (share * RANKS[rank], number, (*path, each)))
        return found


def accepted(nodes: Iterable[tuple[int, ...]], coming: Sequence[int]) -> int:
    """Tokens of the deepest path that is what comes."""
    paths, depth = set(nodes), 0
    while depth < len(coming) and tuple(coming[: depth + 1]) in paths:
        depth += 1
    return depth
