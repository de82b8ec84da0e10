"""How likely drafted tokens are to stand: running estimates, learnt from the text that came out.

A token drafted greedily stands where it *is* the text's next token, and one that was sampled is
the text's next token where it stands; so whatever was proposed is judged by comparing it with the
text, whether or not it was verified. Nothing is learnt from tokens behind the first that differs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from conflayers_cli.spec_decode.ngram import Match

T = TypeVar("T")

CONFIDENCES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.997)
"""Borders of the bins that a draft's own confidence falls into."""
LENGTHS = (2, 3, 4, 6, 9, 17)
"""First match length of each bin but the lowest (1)."""
NGRAM_PRIORS = (0.25, 0.5, 0.6, 0.65, 0.75, 0.85, 0.95)
"""The chance of the first token behind a match, by its bin, from the outputs of 30 prompts by
SmolLM2: a token or two that agree are mostly chance."""
SAMPLED_NGRAM_PRIORS = (0.2, 0.35, 0.4, 0.5, 0.55, 0.85, 0.9)
"""The same of texts sampled at temperature 1, which repeat themselves less."""
PLACES = 3
"""Kinds of places in a continuation: the first, the two behind it, the others."""
HALF_LIFE = 300
"""Observations of a kind after which one counts half."""
KEEP = 0.5 ** (1 / HALF_LIFE)
"""What is left of an observation at the next one."""
CARE = 2.0
"""Deviations that careful estimates stay under the mean. What a text repeats comes in runs, so that
there is less to be seen in so many observations than if each stood for itself."""
LOCAL_HALF_LIFE = 24
"""The same for what makes one text differ from the rest."""
SAME_FAULT = 0.2
"""How often two drafters that are both wrong propose the same token."""
FRESH, KEPT, REFUSED, PENDING = -1, -2, -3, -4
"""Where no confidence tells what comes next: a draft begins behind a step without one, behind one
that stood, behind one refused; or it is not known yet how much of an n-gram's match is right."""


class Share:
    """A running share of hits that forgets exponentially and leans towards a prior.

    One that is part of another share forgets with every observation of that one, its own or not:
    bad luck may keep a kind from being tried again, and then it slowly comes to be judged like the
    others, and is.

    Args:
        prior: the share expected; or a share of which this one is a part.
        weight: how many observations that is worth.
    """

    __slots__ = ("_at", "_hits", "_prior", "_trials", "_weight", "seen")

    def __init__(self, prior: float | Share, weight: float) -> None:
        self._prior, self._weight = prior, weight
        self._hits = self._trials = 0.0
        self._at = self.seen = 0

    @property
    def mean(self) -> float:
        prior, weight = self._prior, self._weight
        if isinstance(prior, float):
            return (self._hits + prior * weight) / (self._trials + weight)
        old = KEEP ** (prior.seen - self._at)
        return (self._hits * old + prior.mean * weight) / (self._trials * old + weight)

    @property
    def least(self) -> float:
        """The mean less `CARE` standard deviations, for who would pay dearly for too much hope."""
        mean, prior = self.mean, self._prior
        old = 1.0 if isinstance(prior, float) else KEEP ** (prior.seen - self._at)
        trials = self._trials * old + self._weight
        return max(mean - CARE * (mean * (1.0 - mean) / (trials + 1.0)) ** 0.5, 0.1 * mean)

    def saw(self, hit: bool) -> None:
        self.seen += 1
        clock = self.seen if isinstance(self._prior, float) else self._prior.seen
        old = KEEP ** (clock - self._at)
        self._hits, self._trials = self._hits * old + hit, self._trials * old + 1.0
        self._at = clock


class Spread:
    """Running shares of what may come, by number; forgetting and leaning as :class:`Share` does."""

    __slots__ = ("_counts", "_prior", "_total", "_weight")

    def __init__(self, prior: Sequence[float] | Spread, weight: float) -> None:
        self._prior, self._weight = prior, weight
        size = len(prior.means if isinstance(prior, Spread) else prior)
        self._counts = [0.0] * size
        self._total = 0.0

    @property
    def means(self) -> list[float]:
        prior = self._prior.means if isinstance(self._prior, Spread) else self._prior
        share = 1.0 / (self._total + self._weight)
        return [
            (count + self._weight * lean) * share
            for count, lean in zip(self._counts, prior, strict=True)
        ]

    def saw(self, number: int) -> None:
        self._counts = [count * KEEP for count in self._counts]
        self._counts[number] += 1.0
        self._total = self._total * KEEP + 1.0


class Bias:
    """How much more, or less, often than estimated tokens stand in one text, lately.

    Only what chance hardly explains counts, so that a text like any other is not estimated by its
    own few tokens, while a change shows at once.
    """

    __slots__ = ("_expected", "_hits", "_variance")
    _WEIGHT = 2.0
    _DEVIATIONS = 1.5
    _KEEP = 0.5 ** (1 / LOCAL_HALF_LIFE)
    _LEAST, _MOST = 0.05, 1.5

    def __init__(self) -> None:
        self._hits = self._expected = self._variance = 0.0

    @property
    def factor(self) -> float:
        excess = self._hits - self._expected
        chance = self._DEVIATIONS * (self._variance + 1.0) ** 0.5
        if abs(excess) <= chance:
            return 1.0
        excess -= chance if excess > 0 else -chance
        ratio = 1.0 + excess / (self._expected + self._WEIGHT)
        return min(max(ratio, self._LEAST), self._MOST)

    def saw(self, hit: bool, expected: float) -> None:
        self._hits = self._hits * self._KEEP + hit
        self._expected = self._expected * self._KEEP + expected
        self._variance = self._variance * self._KEEP + expected * (1.0 - expected)


@dataclass(frozen=True)
class Mark:
    """What is to be learnt from a token once it is known whether it stands.

    Attributes:
        shares: estimates of its kind.
        bias: that of its text, with ``expected``, the chance that the shares gave it; None: it
            says nothing about that.
        spreads: of the confidences that may come where this token's did, with ``number``, its own.
    """

    shares: tuple[Share, ...] = ()
    bias: Bias | None = None
    expected: float = 0.0
    spreads: tuple[Spread, ...] = ()
    number: int = 0


NOTHING = Mark()


@dataclass
class Trail:
    """Tokens that were proposed for places of a text, and what is to be learnt from each."""

    start: int
    tokens: Sequence[int]
    marks: Sequence[Mark]
    tested: int = 0

    def follow(self, text: Sequence[int]) -> bool:
        """Learn from the tokens whose places the text has come to; True once that is over."""
        while self.tested < len(self.tokens):
            place = self.start + self.tested
            if place >= len(text):
                return False
            hit = text[place] == self.tokens[self.tested]
            mark = self.marks[self.tested]
            for share in mark.shares:
                share.saw(hit)
            if mark.bias is not None:
                mark.bias.saw(hit, mark.expected)
            for spread in mark.spreads:
                spread.saw(mark.number)
            if not hit:
                return True
            self.tested += 1
        return True


class Chances:
    """The estimates of a whole run, over all its texts.

    Args:
        prior: the chance that a token drafted by skipping stands, as calibration measured it; None:
            not known.
    """

    def __init__(self, prior: float | None = None) -> None:
        mean, weight = (0.6, 3.0) if prior is None else (min(max(prior, 0.05), 0.99), 5.0)
        edges = (0.1, *CONFIDENCES, 1.0)
        middles = [(low + high) / 2 for low, high in pairwise(edges)]
        self._drafted = [Share(middle, 4.0) for middle in middles]
        self._skip = Share(mean, weight)
        states = (FRESH, KEPT, REFUSED, PENDING, *range(len(middles)))
        self._next = {state: Share(self._skip, 4.0) for state in states}
        self._later = Share(self._skip, 4.0)
        anything = Spread([1.0 / len(middles)] * len(middles), 4.0)
        self._spread, self._spreads = anything, {state: Spread(anything, 4.0) for state in states}
        self._ngram = {
            (sampled, agreed): [
                [Share(chance * factor, 4.0) for _ in range(PLACES)] for chance in priors
            ]
            for sampled, priors in ((False, NGRAM_PRIORS), (True, SAMPLED_NGRAM_PRIORS))
            for agreed, factor in ((True, 1.0), (False, 0.65))
        }

    def next(self, state: int, bias: Bias) -> float:
        """The chance of a token not drafted yet, in a state: a bin, or a kind of beginning."""
        return min(self._next[state].mean * bias.factor, 0.998)

    def later(self, bias: Bias) -> float:
        """That of each one behind it, all before it standing."""
        return min(self._later.mean * bias.factor, 0.998)

    def drafted(self, confidence: float, bias: Bias) -> float:
        """The chance of a token drafted with this confidence."""
        return min(self._drafted[confidence_bin(confidence)].mean * bias.factor, 0.999)

    def outlook(self, state: int, bias: Bias) -> list[tuple[float, float, float]]:
        """What the next token drafted may be: (how likely, its chance then, that of the next)."""
        factor = bias.factor
        return [
            (share, min(own.mean * factor, 0.999), min(self._next[number].mean * factor, 0.998))
            for number, (share, own) in enumerate(
                zip(self._spreads[state].means, self._drafted, strict=True)
            )
        ]

    def ngram(self, match: Match, sampled: bool, careful: bool = False) -> list[float]:
        """The chance of each token behind a match in a text that is sampled or not, those before
        it standing; ``careful``: rather too little than too much."""
        shares = self._places(match, sampled)
        chances = [share.least if careful else share.mean for share in shares]
        return _by_place(chances, len(match.tokens))

    def skip_mark(self, state: int, confidence: float, first: bool, bias: Bias) -> Mark:
        """What a token drafted by skipping teaches; ``first``: no other stood before it."""
        shares = [self._skip, self._next[state], self._drafted[confidence_bin(confidence)]]
        if not first:
            shares.append(self._later)
        spreads = (self._spread, self._spreads[state])
        number = confidence_bin(confidence)
        return Mark(tuple(shares), bias, self._next[state].mean, spreads, number)

    def ngram_marks(self, match: Match, sampled: bool) -> list[Mark]:
        """What the tokens behind a match teach."""
        marks = [Mark((share,)) for share in self._places(match, sampled)]
        return _by_place(marks, len(match.tokens))

    def _places(self, match: Match, sampled: bool) -> list[Share]:
        return self._ngram[sampled, match.agreed][bisect_right(LENGTHS, match.length)]

    def table(
        self,
    ) -> tuple[float, tuple[tuple[float, float], ...], tuple[tuple[int, float], ...]]:
        """(chance behind a skip token that stood, chances by confidence, by match length)."""
        drafted = zip((0.0, *CONFIDENCES), (share.mean for share in self._drafted), strict=True)
        greedy, sampled = (self._ngram[sampled, True] for sampled in (False, True))
        seen = [sum(places[0].seen for places in kind) for kind in (greedy, sampled)]
        agreed = greedy if seen[0] >= seen[1] else sampled
        ngram = zip((1, *LENGTHS), (places[0].mean for places in agreed), strict=True)
        return self._later.mean, tuple(drafted), tuple(ngram)


def agreeing(one: float, other: float) -> float:
    """The chance of a token that two drafters propose, each right with its chance."""
    return one * other / (one * other + (1.0 - one) * (1.0 - other) * SAME_FAULT)


def disagreeing(one: float, other: float) -> float:
    """The chance of the first one's token where the other proposes another."""
    return one * (1.0 - other) / (1.0 - one * other)


def _by_place(kinds: Sequence[T], count: int) -> list[T]:
    """An entry for each of ``count`` places, by its kind."""
    first, near, far = kinds
    return [first, near, near, *[far] * (count - 3)][:count]


def confidence_bin(confidence: float) -> int:
    """The number of the bin, from 0 up, that a draft probability falls into."""
    return bisect_right(CONFIDENCES, confidence)
