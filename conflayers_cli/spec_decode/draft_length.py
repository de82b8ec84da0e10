"""How many tokens to draft now, and by whom; none at all is an answer.

Decoding is a chain of steps, each of which takes some seconds and gives some tokens, so by renewal
theory tokens per second are greatest where every single decision maximises its tokens less λ times
its seconds, λ being the rate that comes out in the end. A draft is therefore extended exactly as
long as the tokens expected further are worth the seconds of drafting and of verifying them.
Chances are estimated as decoding goes on (:mod:`conflayers_cli.spec_decode.acceptance`), seconds are measured
(:mod:`conflayers_cli.engine.cost_model`). Compare SWIFT and ConfLayers, which stop at a fixed confidence, 0.8, whatever
passes cost (arXiv 2410.06916 §4.2), and KnapSpec, which chooses one length for all steps by the
expected tokens per time (arXiv 2602.20217).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from conflayers_cli.engine.cost_model import CostTable
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.acceptance import Chances, Share
from conflayers_cli.spec_decode.draft_chain import Chain
from conflayers_cli.spec_decode.ngram import Match

AHEAD = 12
"""Tokens looked ahead when it is decided whether one more is drafted: costs grow in leaps."""
GRAIN = 64
"""Context lengths that count as one, in positions."""
RATE_HALF_LIFE = 64
"""Steps after which one counts half in λ."""
ALLOWANCE = 0.004
"""Share of the time given to finding out whether drafting, which did not pay, does now."""
MOST_ALLOWANCE = 2.0
"""What is saved up of it at the most, in tokens a row."""

DROPS = 8
"""Drafts dropped one behind the other, none of it verified, after which one must be saved for."""


@dataclass(frozen=True)
class Prices:
    """Seconds of passes over some rows at some context.

    Attributes:
        verify: of a full pass by width, from 0, which stands for 1.
        draft: of a draft pass by width, likewise.
        rows: rows per pass.
        turnaround: between two draft passes of which the second waits for the host.
    """

    verify: tuple[float, ...]
    draft: tuple[float, ...]
    rows: int
    turnaround: float = 0.0

    @classmethod
    def of(
        cls, table: CostTable, rows: int, context: int, plan: SkipPlan | None, widest: int
    ) -> Prices:
        """From measured costs. A draft pass grows with its width as a full pass does."""
        costs = table.at(rows, context)
        verify = tuple(costs.verify_cost(max(width, 1)) for width in range(widest + AHEAD + 2))
        one = costs.draft_cost(plan, table.depth) if plan else 0.0
        draft = tuple(one * seconds / verify[1] for seconds in verify)
        return cls(verify, draft, rows, costs.turnaround)

    @property
    def vanilla(self) -> float:
        """Tokens per second with nothing drafted."""
        return self.rows / self.verify[1]


@dataclass(frozen=True)
class Figures:
    """What the estimates of a run have come to.

    Attributes:
        skip: the chance of a token drafted by skipping, behind one that stood.
        by_confidence: (least confidence, chance) of tokens drafted by skipping.
        ngram: (least match length, chance) of the first token behind a match.
        speedup: tokens per second expected of the last steps, over vanilla's.
    """

    skip: float
    by_confidence: tuple[tuple[float, float], ...]
    ngram: tuple[tuple[int, float], ...]
    speedup: float


class Lookahead:
    """Decides, by what was learnt so far; one object serves a whole run.

    Args:
        table: what passes cost.
        plan: what drafting by skipping leaves out; None: there is none.
        max_tokens: the most tokens drafted at once.
        prior: the chance that a token drafted by skipping stands, where it was measured.

    Attributes:
        chances: what was learnt.
        prices: of passes of the step at hand.
        rate: λ for n-grams' tokens, tokens per second lately.
        new_rate: λ for what drafting by skipping costs: the rate of the steps in which no n-gram
            drafted. It drafts where the text is new, and a token gained there saves what others
            take there; how fast passages go that repeat themselves is another matter.
    """

    def __init__(
        self, table: CostTable, plan: SkipPlan | None, max_tokens: int, prior: float | None = None
    ) -> None:
        self.chances = Chances(prior)
        self.max_tokens = max_tokens
        self._table = table
        self._plan = plan
        self._known: dict[tuple[int, int], Prices] = {}
        self._keep = 0.5 ** (1 / RATE_HALF_LIFE)
        # Tokens, and the vanilla passes that took as long; in all, and of steps without n-grams.
        self._gained, self._spent = [0.0, 0.0], [0.0, 0.0]
        self._allowance = 0.0
        self._hoped: float | None = None
        self._proven = 0
        self._dropped = 0
        self._drafting = 0.0
        self._passes = 0
        self._going_on = [Share(0.5, 4.0) for _ in range(max_tokens + 1)]
        self.prices = self.prices_for(1, 0)
        self.rate = self.new_rate = self.prices.vanilla

    def prices_for(self, rows: int, context: int) -> Prices:
        key = (rows, context // GRAIN)
        if key not in self._known:
            middle = context // GRAIN * GRAIN + GRAIN // 2
            widest = self.max_tokens + 1
            self._known[key] = Prices.of(self._table, rows, middle, self._plan, widest)
        return self._known[key]

    def begin(self, rows: int, context: int, stood: Sequence[int]) -> None:
        """A step over so many rows begins.

        Args:
            rows: how many.
            context: the length of the longest one.
            stood: for each, how many tokens of its last draft's by skipping have stood.
        """
        self._proven = max(self._proven, *stood)
        if self._hoped is not None:  # an attempt that gained more than was hoped for was for free
            self._save(sum(map(bool, stood)) - self._hoped)
            self._hoped = None
        self.prices = self.prices_for(rows, context)
        rates = (
            self.prices.vanilla * max(gained / spent if spent else 1.0, 1.0)
            for gained, spent in zip(self._gained, self._spent, strict=True)
        )
        self.rate, self.new_rate = rates
        self._drafting, self._passes = 0.0, 0

    def ngrams(self, chains: Sequence[Chain], matches: Sequence[Match]) -> None:
        """Append to each chain as much of its match as pays; to those shorter than the longest one
        it costs nothing.
        """
        now = max(len(chain.tokens) for chain in chains)
        most = max(
            len(chain.tokens) + len(match.tokens)
            for chain, match in zip(chains, matches, strict=True)
        )
        verify = self.prices.verify
        gains = [0.0] * (most + 1)  # by width: what all rows gain up to it
        chances = []
        for chain, match in zip(chains, matches, strict=True):
            # Of many rows one number is estimated, and an error counts as often.
            own = self.chances.ngram(match, chain.sampled, careful=len(chains) > 1)
            chances.append(own)
            reach, total, length = chain.reach[-1], 0.0, len(chain.tokens)
            for width in range(length + 1, most + 1):
                if width - length <= len(own):
                    reach *= own[width - length - 1]
                    total += reach
                gains[width] += total
        values = [
            gains[width] - self.rate * (verify[width + 1] - verify[now + 1])
            for width in range(now, most + 1)
        ]
        width = now + values.index(max(values))
        for chain, match, own in zip(chains, matches, chances, strict=True):
            count = min(width - len(chain.tokens), len(own))
            if count > 0:
                for token, chance in zip(match.tokens[:count], own, strict=False):
                    chain.add(token, chance, "ngram")

    def blind(self, chain: Chain) -> bool:
        """Whether to begin the pass behind the next one before that one's token is read.

        It saves what the host takes to read and to decide, and is for nothing where drafting ends
        with that token.
        """
        if chain.settled + 1 >= chain.limit:
            return False
        ends = 1.0 - self._going_on[chain.settled + 1].mean
        return ends * self.prices.draft[2] < self.prices.turnaround

    def skip(self, chains: Sequence[Chain]) -> list[bool]:
        """Which chains the next draft pass is to extend; none: it does not pay.

        A pass runs the tokens that n-grams proposed, too, and decides at the first of them that the
        skipped model would not choose, so one token of its own is gained wherever that is: what it
        gains depends on the reach of the last token it has decided on, not on that of the n-grams'.
        """
        taking = self._skip(chains)
        if len(chains) == 1 and chains[0].settled:
            self._going_on[chains[0].settled].saw(taking[0])
        return taking

    def _skip(self, chains: Sequence[Chain]) -> list[bool]:
        if self._plan is None:
            return [False] * len(chains)
        bound = min(1 + 2 * self._proven, self.max_tokens)
        if self._short(chains):
            bound = self.max_tokens
        chances = []
        for chain in chains:
            can = chain.open and chain.settled < bound
            first = self.chances.next(chain.standing, chain.bias) if can else 0.0
            chances.append(chain.reach[chain.settled] * first)
        if not any(chances):
            return [False] * len(chains)
        loss = self._loss(chains, chances)
        if loss > 0 and len(chains) == 1:
            loss = min(loss, self._loss_seeing(chains[0], chances[0]))
        if self._dropped >= DROPS and not self._passes:
            loss = max(loss, self.new_rate * self.prices.draft[1])
        if loss > 0:
            if self._passes or self._allowance < loss:
                return [False] * len(chains)
            self._allowance -= loss
            self._hoped = sum(chances)
        taking = [chance > 0 for chance in chances]
        width = max(chain.pending for chain, takes in zip(chains, taking, strict=True) if takes)
        self._drafting += self.prices.draft[1 + width]
        self._passes += 1
        return taking

    def _short(self, chains: Sequence[Chain]) -> bool:
        """Whether what is drafted is not worth verifying yet.

        Where a second row costs a leap, as with kernels made for one, a draft that caution keeps
        short would be dropped over and over, and nothing learnt.
        """
        verify = self.prices.verify
        width = max(len(chain.tokens) for chain in chains)
        gain = sum(sum(chain.reach[1:]) for chain in chains)
        return gain < self.rate * (verify[width + 1] - verify[1])

    def _loss(self, chains: Sequence[Chain], chances: Sequence[float]) -> float:
        """What drafting on loses, in tokens, however far it looks ahead; under 0: it gains."""
        verify, draft = self.prices.verify, self.prices.draft
        now = max(len(chain.tokens) for chain in chains)
        live = [
            (chance, self.chances.later(chain.bias), len(chain.tokens), chain)
            for chain, chance in zip(chains, chances, strict=True)
            if chance > 0
        ]
        longest = max(length for _, _, length, _ in live)
        ahead = min(AHEAD, max(chain.limit - length for _, _, length, chain in live))
        seconds, gain = draft[1 + max(chain.pending for *_, chain in live)], 0.0
        loss = float("inf")
        for count in range(1, ahead + 1):
            for chance, later, length, chain in live:
                if length + count <= chain.limit:
                    gain += chance * later ** (count - 1)
            width = max(longest + count, now)
            cost = seconds + verify[width + 1] - verify[now + 1]
            loss = min(loss, self.new_rate * cost - gain)
            if loss <= 0:
                break
            seconds += draft[1]
        return loss

    def _loss_seeing(self, chain: Chain, chance: float) -> float:
        """The same for drafting one token of a single row and deciding anew by its confidence.

        Where some confidences say "go on" and others "stop", that is better than any length fixed
        beforehand.
        """
        verify, draft, length = self.prices.verify, self.prices.draft, len(chain.tokens)
        later = self.chances.later(chain.bias)
        outlook = self.chances.outlook(chain.standing, chain.bias)
        # What is expected of the token on the whole is known best by itself.
        scale = chance / sum(share * own for share, own, _ in outlook)
        room = min(AHEAD, chain.limit - length - 1)
        value = 0.0
        for share, own, following in outlook:
            gain = scale * own
            behind = gain * following
            gain -= self.new_rate * (verify[length + 2] - verify[length + 1])
            worth = gain if chain.sampled else max(gain, 0.0)
            seconds = draft[1]
            for count in range(1, room + 1):
                if behind <= self.new_rate * draft[1]:
                    break
                gain += behind - self.new_rate * (
                    verify[length + 2 + count] - verify[length + 1 + count]
                )
                worth = max(worth, gain - self.new_rate * seconds)
                behind, seconds = behind * later, seconds + draft[1]
            value += share * worth
        return self.new_rate * draft[1 + chain.pending] - value

    def end(self, chains: Sequence[Chain]) -> None:
        """Drop what is not worth verifying, all things known; account for the step."""
        verify = self.prices.verify
        now = max(len(chain.tokens) for chain in chains)
        least = max(chain.fixed for chain in chains)
        gains = [0.0] * (now + 1)
        for chain in chains:
            total = 0.0
            for width in range(1, now + 1):
                if width < len(chain.reach):
                    total += chain.reach[width]
                gains[width] += total
        values = [gains[width] - self.rate * verify[width + 1] for width in range(least, now + 1)]
        width = least + values.index(max(values))
        for chain in chains:
            if len(chain.tokens) > width:
                chain.cut(width)
        if self._passes:
            # Nothing is learnt of what is not verified: it looks as good the next time.
            kept = any("skip" in chain.sources for chain in chains)
            self._dropped = 0 if kept else self._dropped + 1
        seconds = self._drafting + verify[width + 1]
        new = not any("ngram" in chain.sources for chain in chains)
        for kind in (0, 1) if new else (0,):
            self._gained[kind] = self._gained[kind] * self._keep + len(chains) + gains[width]
            self._spent[kind] = self._spent[kind] * self._keep + seconds * self.prices.vanilla
        if not self._passes:
            self._save(ALLOWANCE * seconds * self.rate)

    def _save(self, tokens: float) -> None:
        """Put so much more by for attempts; each risks a pass of all rows."""
        self._allowance = min(self._allowance + tokens, MOST_ALLOWANCE * self.prices.rows)

    def figures(self) -> Figures:
        """What the estimates have come to."""
        speedup = self._gained[0] / self._spent[0] if self._spent[0] else 1.0
        return Figures(*self.chances.table(), speedup)
