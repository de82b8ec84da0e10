"""How likely drafted tokens are to be accepted: running estimates, learnt while decoding.

Greedily or sampled, a drafted token is accepted where it equals the text's next token, so every
proposal is compared with the text, verified or not. Tokens behind the first difference are ignored.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from conflayers_cli.spec_decode.ngram import Match

T = TypeVar("T")

CONFIDENCES = (0.51, 0.53, 0.56, 0.6, 0.7, 0.8, 0.92, 0.99)
"""Borders of the bins that a draft's confidence in its token falls into (`TokenChoice`). Nearly all
of a good draft's errors are where its two best tokens are next to equal."""
CONFIDENCE_PRIORS = (0.5, 0.6, 0.75, 0.85, 0.93, 0.96, 0.98, 0.99, 0.995)
"""The chance of a token in each bin, a little under what drafts of SmolLM2 in four bits come to,
greedy and at temperature 1."""
MATCH_LENGTHS = (2, 3, 4, 6, 9, 17)
"""First match length of each bin but the lowest (1)."""
NGRAM_PRIORS = (0.25, 0.5, 0.6, 0.65, 0.75, 0.85, 0.95)
"""The chance of the first token behind a match, by its bin, from the outputs of 30 prompts by
SmolLM2: matches of one or two tokens are mostly chance."""
SAMPLED_NGRAM_PRIORS = (0.2, 0.35, 0.4, 0.5, 0.55, 0.85, 0.9)
"""The same of texts sampled at temperature 1, which repeat themselves less."""
POSITION_KINDS = 3
"""Kinds of positions in a continuation: the first, the two behind it, the others."""
HALF_LIFE = 300
"""Observations of a kind after which one counts half."""
DECAY = 0.5 ** (1 / HALF_LIFE)
"""Weight of an observation at the next one."""
CARE = 2.0
"""Standard deviations between a lower confidence bound and the mean. Repetitions come in runs, so
observations say less than independent ones."""
TEXT_HALF_LIFE = 24
"""Observations after which one counts half in a text's bias."""
SAME_FAULT = 0.2
"""How often two proposers that are both wrong propose the same token."""
FRESH, ACCEPTED, REJECTED, PENDING = -1, -2, -3, -4
"""States without a confidence: a draft begins behind a step without one, behind an accepted one,
behind a rejected one; or n-grams' tokens are not checked yet."""


class DecayedRate:
    """A running rate of hits with exponential decay and a prior.

    One that is part of another rate decays with every observation of that one, so that a kind no
    longer tried slowly comes to be judged like the others.

    Args:
        prior: the rate expected; or a rate of which this one is a part.
        weight: how many observations the prior is worth.
    """

    __slots__ = ("_hits", "_prior", "_trials", "_updated_at", "_weight", "count", "hits")

    def __init__(self, prior: float | DecayedRate, weight: float) -> None:
        self._prior, self._weight = prior, weight
        self._hits = self._trials = 0.0
        self._updated_at = self.count = self.hits = 0

    @property
    def mean(self) -> float:
        prior, weight, left = self._prior, self._weight, self._decay()
        expected = prior if isinstance(prior, float) else prior.mean
        return (self._hits * left + expected * weight) / (self._trials * left + weight)

    @property
    def lower_bound(self) -> float:
        """Lower confidence bound: the mean minus `CARE` standard deviations."""
        mean, trials = self.mean, self._trials * self._decay() + self._weight
        return max(mean - CARE * (mean * (1.0 - mean) / (trials + 1.0)) ** 0.5, 0.1 * mean)

    def update(self, hit: bool) -> None:
        self.count += 1
        self.hits += hit
        left = self._decay()
        self._hits, self._trials = self._hits * left + hit, self._trials * left + 1.0
        self._updated_at = self._clock()

    def _clock(self) -> int:
        return (self if isinstance(self._prior, float) else self._prior).count

    def _decay(self) -> float:
        return DECAY ** (self._clock() - self._updated_at)


class DecayedHistogram:
    """Running shares of the bins that observations fall into; arguments as `DecayedRate`."""

    __slots__ = ("_counts", "_prior", "_total", "_weight")

    def __init__(self, prior: Sequence[float] | DecayedHistogram, weight: float) -> None:
        self._prior, self._weight = prior, weight
        size = len(prior.means if isinstance(prior, DecayedHistogram) else prior)
        self._counts = [0.0] * size
        self._total = 0.0

    @property
    def means(self) -> list[float]:
        prior = self._prior.means if isinstance(self._prior, DecayedHistogram) else self._prior
        share = 1.0 / (self._total + self._weight)
        return [
            (count + self._weight * lean) * share
            for count, lean in zip(self._counts, prior, strict=True)
        ]

    def update(self, number: int) -> None:
        self._counts = [count * DECAY for count in self._counts]
        self._counts[number] += 1.0
        self._total = self._total * DECAY + 1.0


class TextBias:
    """How much more, or less, often than estimated tokens of one text were accepted lately.

    Deviations that chance may explain are ignored: they would be noise of few tokens.
    """

    __slots__ = ("_expected", "_hits", "_variance")
    _WEIGHT = 2.0
    _DEVIATIONS = 1.5
    _DECAY = 0.5 ** (1 / TEXT_HALF_LIFE)
    _MIN, _MAX = 0.05, 1.5

    def __init__(self) -> None:
        self._hits = self._expected = self._variance = 0.0

    @property
    def factor(self) -> float:
        """What estimates are multiplied by for this text."""
        excess = self._hits - self._expected
        chance = self._DEVIATIONS * (self._variance + 1.0) ** 0.5
        if abs(excess) <= chance:
            return 1.0
        excess -= chance if excess > 0 else -chance
        ratio = 1.0 + excess / (self._expected + self._WEIGHT)
        return min(max(ratio, self._MIN), self._MAX)

    def update(self, hit: bool, expected: float) -> None:
        """Count a token whose chance of being accepted was estimated as ``expected``."""
        self._hits = self._hits * self._DECAY + hit
        self._expected = self._expected * self._DECAY + expected
        self._variance = self._variance * self._DECAY + expected * (1.0 - expected)


@dataclass(frozen=True)
class RateUpdate:
    """The estimates to be updated once it is known whether a token is accepted.

    Attributes:
        rates: of the token's kinds.
        expected: the chance that they gave it, for its text's bias; None: leave the bias.
        histograms: of the confidence bins of tokens in the same state.
        confidence_bin: the token's own.
    """

    rates: tuple[DecayedRate, ...] = ()
    expected: float | None = None
    histograms: tuple[DecayedHistogram, ...] = ()
    confidence_bin: int = 0

    def apply(self, hit: bool, bias: TextBias) -> None:
        for rate in self.rates:
            rate.update(hit)
        if self.expected is not None:
            bias.update(hit, self.expected)
        for histogram in self.histograms:
            histogram.update(self.confidence_bin)


NO_UPDATE = RateUpdate()


class AcceptanceModel:
    """The estimates of a whole run, over all its texts.

    A *state* is what the chance of the next token drafted by skipping depends on: the confidence
    bin of the token before it, or one of `FRESH`, `ACCEPTED`, `REJECTED`, `PENDING`.

    Args:
        prior: the acceptance rate that calibration measured; None: not known.
        alike: a model of the same texts, with which the estimates of n-grams are shared.
    """

    def __init__(self, prior: float | None = None, alike: AcceptanceModel | None = None) -> None:
        mean, weight = (0.6, 3.0) if prior is None else (min(max(prior, 0.05), 0.99), 5.0)
        self._by_confidence = [DecayedRate(chance, 4.0) for chance in CONFIDENCE_PRIORS]
        self._skip = DecayedRate(mean, weight)
        states = (FRESH, ACCEPTED, REJECTED, PENDING, *range(len(CONFIDENCE_PRIORS)))
        self._next = {state: DecayedRate(self._skip, 4.0) for state in states}
        self._later = DecayedRate(self._skip, 4.0)
        count = len(CONFIDENCE_PRIORS)
        self._bins = DecayedHistogram([1.0 / count] * count, 4.0)
        self._bins_by_state = {state: DecayedHistogram(self._bins, 4.0) for state in states}
        self._ngram: dict[tuple[bool, bool, bool], list[list[DecayedRate]]] = (
            _ngram_rates() if alike is None else alike._ngram
        )

    @property
    def skip_rate(self) -> float:
        """The acceptance rate of tokens drafted by skipping."""
        return self._skip.mean

    @property
    def skip_counts(self) -> tuple[int, int]:
        """(tokens drafted by skipping that were accepted, those whose fate is known)."""
        return self._skip.hits, self._skip.count

    def next_token(self, state: int, bias: TextBias) -> float:
        """The chance of the token that skipping drafts next in a state."""
        return min(self._next[state].mean * bias.factor, 0.998)

    def later_token(self, bias: TextBias) -> float:
        """The chance of each token behind that one, all before it accepted."""
        return min(self._later.mean * bias.factor, 0.998)

    def drafted_token(self, confidence: float, bias: TextBias) -> float:
        """The chance of a token drafted with this confidence."""
        return min(self._by_confidence[confidence_bin(confidence)].mean * bias.factor, 0.999)

    def outlook(self, state: int, bias: TextBias) -> list[tuple[float, float, float]]:
        """By confidence bin of the next token: (share, its chance, that of the one behind it)."""
        factor = bias.factor
        return [
            (share, min(own.mean * factor, 0.999), min(self._next[number].mean * factor, 0.998))
            for number, (share, own) in enumerate(
                zip(self._bins_by_state[state].means, self._by_confidence, strict=True)
            )
        ]

    def ngram_tokens(self, match: Match, sampled: bool, conservative: bool = False) -> list[float]:
        """The chance of each token behind a match; ``conservative``: lower bounds, not means."""
        rates = self._ngram_rates(match, sampled)
        chances = [rate.lower_bound if conservative else rate.mean for rate in rates]
        return _by_position(chances, len(match.tokens))

    def skip_update(self, state: int, confidence: float, first: bool) -> RateUpdate:
        """Of a token drafted by skipping in a state; ``first``: the draft's first one."""
        number = confidence_bin(confidence)
        rates = [self._skip, self._next[state], self._by_confidence[number]]
        if not first:
            rates.append(self._later)
        return RateUpdate(
            rates=tuple(rates),
            expected=self._next[state].mean,
            histograms=(self._bins, self._bins_by_state[state]),
            confidence_bin=number,
        )

    def ngram_updates(self, match: Match, sampled: bool) -> list[RateUpdate]:
        """Of each token behind a match."""
        updates = [RateUpdate((rate,)) for rate in self._ngram_rates(match, sampled)]
        return _by_position(updates, len(match.tokens))

    def _ngram_rates(self, match: Match, sampled: bool) -> list[DecayedRate]:
        rates = self._ngram[sampled, match.agreed, match.stored]
        return rates[bisect_right(MATCH_LENGTHS, match.length)]


def _ngram_rates() -> dict[tuple[bool, bool, bool], list[list[DecayedRate]]]:
    """By whether tokens are sampled, whether a match's continuations agree, and whether it is one
    of an earlier text: by match length and kind of position."""
    return {
        (sampled, agreed, stored): [
            [DecayedRate(chance * factor, 4.0) for _ in range(POSITION_KINDS)] for chance in priors
        ]
        for sampled, priors in ((False, NGRAM_PRIORS), (True, SAMPLED_NGRAM_PRIORS))
        for agreed, factor in ((True, 1.0), (False, 0.65))
        for stored in (False, True)
    }


def agreeing(one: float, other: float) -> float:
    """The chance of a token that two proposers propose, each right with its own chance."""
    return one * other / (one * other + (1.0 - one) * (1.0 - other) * SAME_FAULT)


def disagreeing(one: float, other: float) -> float:
    """The chance of the first proposer's token where the other proposes a different one."""
    return one * (1.0 - other) / (1.0 - one * other)


def _by_position(kinds: Sequence[T], count: int) -> list[T]:
    first, near, far = kinds
    return [first, near, near, *[far] * (count - 3)][:count]


def confidence_bin(confidence: float) -> int:
    """The bin, from 0 up, that a draft probability falls into."""
    return bisect_right(CONFIDENCES, confidence)
