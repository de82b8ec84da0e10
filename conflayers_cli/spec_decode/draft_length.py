"""How many tokens to draft now, and by whom; none at all is an answer.

Decoding is a chain of steps, each of which takes some seconds and gives some tokens, so by renewal
theory tokens per second are greatest where every single decision maximises its tokens less λ times
its seconds, λ being the rate that comes out in the end. A draft is therefore extended exactly as
long as the tokens expected further are worth the seconds of drafting and of verifying them.
Chances are estimated as decoding goes on (:mod:`.acceptance`), seconds are measured
(:mod:`conflayers_cli.engine.cost_model`). Compare SWIFT and ConfLayers, which stop at a fixed
confidence, 0.8, whatever passes cost (arXiv 2410.06916 §4.2), and KnapSpec, which chooses one
length for all steps by the expected tokens per time (arXiv 2602.20217).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from conflayers_cli.engine.cost_model import CostTable
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.acceptance import AcceptanceModel, DecayedRate
from conflayers_cli.spec_decode.draft_chain import DraftChain
from conflayers_cli.spec_decode.ngram import Match

LOOK_AHEAD = 12
"""Tokens looked ahead when it is decided whether one more is drafted: costs grow in leaps."""
CONTEXT_STEP = 64
"""Context lengths that count as one, in positions."""
RATE_HALF_LIFE = 64
"""Steps after which one counts half in λ."""
EXPLORATION = 0.004
"""Share of the time given to finding out whether drafting, which did not pay, does now."""
MAX_EXPLORATION = 2.0
"""What is saved up of it at the most, in tokens a sequence."""
MAX_DROPS = 8
"""Drafts dropped one behind the other, none of it verified, after which one must be saved for."""


@dataclass(frozen=True)
class StepCosts:
    """Seconds of passes over some sequences at some context.

    Attributes:
        verify: of a full pass by width, from 0, which stands for 1.
        draft: of a draft pass by width, likewise.
        batch_size: sequences per pass.
        turnaround: between two draft passes of which the second waits for the host.
    """

    verify: tuple[float, ...]
    draft: tuple[float, ...]
    batch_size: int
    turnaround: float = 0.0

    @classmethod
    def from_table(
        cls,
        table: CostTable,
        batch_size: int,
        context: int,
        plan: SkipPlan | None,
        max_width: int,
    ) -> StepCosts:
        """From measured costs. A draft pass grows with its width as a full pass does."""
        costs = table.at(batch_size, context)
        widths = range(max_width + LOOK_AHEAD + 2)
        verify = tuple(costs.verify_cost(max(width, 1)) for width in widths)
        one = costs.draft_cost(plan, table.depth) if plan else 0.0
        draft = tuple(one * seconds / verify[1] for seconds in verify)
        return cls(verify, draft, batch_size, costs.turnaround)

    @property
    def vanilla_rate(self) -> float:
        """Tokens per second with nothing drafted."""
        return self.batch_size / self.verify[1]


class DraftLengthPolicy:
    """Decides how far to draft, by what was learnt so far; one object serves a whole run.

    Args:
        table: what passes cost.
        plan: what drafting by skipping leaves out; None: there is none.
        max_tokens: the most tokens drafted at once.
        prior: the chance that a token drafted by skipping is accepted, where it was measured.

    Attributes:
        acceptance: what was learnt.
        costs: of passes of the step at hand.
        rate: λ for n-grams' tokens, tokens per second lately.
        new_rate: λ for what drafting by skipping costs: the rate of the steps in which no n-gram
            drafted. It drafts where the text is new, and a token gained there saves what others
            take there; how fast passages go that repeat themselves is another matter.
    """

    def __init__(
        self, table: CostTable, plan: SkipPlan | None, max_tokens: int, prior: float | None = None
    ) -> None:
        self.acceptance = AcceptanceModel(prior)
        self.max_tokens = max_tokens
        self._table = table
        self._plan = plan
        self._costs_at: dict[tuple[int, int], StepCosts] = {}
        self._decay = 0.5 ** (1 / RATE_HALF_LIFE)
        # Tokens, and the vanilla passes that took as long; in all, and of steps without n-grams.
        self._gained, self._spent = [0.0, 0.0], [0.0, 0.0]
        self._exploration = 0.0
        self._expected_gain: float | None = None
        self._longest_accepted = 0
        self._drops = 0
        self._draft_seconds = 0.0
        self._num_passes = 0
        self._continues = [DecayedRate(0.5, 4.0) for _ in range(max_tokens + 1)]
        self.costs = self.costs_for(1, 0)
        self.rate = self.new_rate = self.costs.vanilla_rate

    def costs_for(self, batch_size: int, context: int) -> StepCosts:
        """Of so many sequences, the longest of ``context`` tokens."""
        key = (batch_size, context // CONTEXT_STEP)
        if key not in self._costs_at:
            middle = context // CONTEXT_STEP * CONTEXT_STEP + CONTEXT_STEP // 2
            self._costs_at[key] = StepCosts.from_table(
                self._table, batch_size, middle, self._plan, self.max_tokens + 1
            )
        return self._costs_at[key]

    def begin(self, batch_size: int, context: int, accepted: Sequence[int]) -> None:
        """A decode step begins.

        Args:
            batch_size: sequences decoded together.
            context: the length of the longest one.
            accepted: for each, how many of its last draft's skip tokens were accepted.
        """
        self._longest_accepted = max(self._longest_accepted, *accepted)
        if self._expected_gain is not None:  # an attempt that gained more than expected was free
            self._save(sum(map(bool, accepted)) - self._expected_gain)
            self._expected_gain = None
        self.costs = self.costs_for(batch_size, context)
        rates = (
            self.costs.vanilla_rate * max(gained / spent if spent else 1.0, 1.0)
            for gained, spent in zip(self._gained, self._spent, strict=True)
        )
        self.rate, self.new_rate = rates
        self._draft_seconds, self._num_passes = 0.0, 0

    def extend_with_ngrams(self, chains: Sequence[DraftChain], matches: Sequence[Match]) -> None:
        """Append to each chain as much of its match as pays.

        To chains shorter than the longest one it costs nothing.
        """
        now = max(len(chain.tokens) for chain in chains)
        most = max(
            len(chain.tokens) + len(match.tokens)
            for chain, match in zip(chains, matches, strict=True)
        )
        verify = self.costs.verify
        gains = [0.0] * (most + 1)  # by width: what all sequences gain up to it
        chances = []
        for chain, match in zip(chains, matches, strict=True):
            # Of many sequences one number is estimated, and an error counts as often.
            own = self.acceptance.ngram_tokens(match, chain.sampled, conservative=len(chains) > 1)
            chances.append(own)
            survival, total, length = chain.survival[-1], 0.0, len(chain.tokens)
            for width in range(length + 1, most + 1):
                if width - length <= len(own):
                    survival *= own[width - length - 1]
                    total += survival
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

    def launches_ahead(self, chain: DraftChain) -> bool:
        """Whether to begin the pass behind the next one before that one's token is read.

        It saves what the host takes to read and to decide, and is for nothing where drafting ends
        with that token.
        """
        if chain.num_checked + 1 >= chain.limit:
            return False
        ends = 1.0 - self._continues[chain.num_checked + 1].mean
        return ends * self.costs.draft[2] < self.costs.turnaround

    def next_pass(self, chains: Sequence[DraftChain]) -> list[bool]:
        """Which chains the next draft pass extends; none: it does not pay.

        A pass runs the tokens that n-grams proposed, too, and decides at the first of them that the
        skipped model would not choose, so one token of its own is gained wherever that is: what it
        gains depends on the survival of the last token it has decided on, not on that of n-grams'.
        """
        taking = self._worth_a_pass(chains)
        if len(chains) == 1 and chains[0].num_checked:
            self._continues[chains[0].num_checked].update(taking[0])
        return taking

    def _worth_a_pass(self, chains: Sequence[DraftChain]) -> list[bool]:
        if self._plan is None:
            return [False] * len(chains)
        bound = min(1 + 2 * self._longest_accepted, self.max_tokens)
        if self._too_short(chains):
            bound = self.max_tokens
        chances = []
        for chain in chains:
            can = chain.open and chain.num_checked < bound
            first = self.acceptance.next_token(chain.state, chain.bias) if can else 0.0
            chances.append(chain.survival[chain.num_checked] * first)
        if not any(chances):
            return [False] * len(chains)
        loss = self._loss(chains, chances)
        if loss > 0 and len(chains) == 1:
            loss = min(loss, self._loss_one_more(chains[0], chances[0]))
        if self._drops >= MAX_DROPS and not self._num_passes:
            loss = max(loss, self.new_rate * self.costs.draft[1])
        if loss > 0:
            if self._num_passes or self._exploration < loss:
                return [False] * len(chains)
            self._exploration -= loss
            self._expected_gain = sum(chances)
        taking = [chance > 0 for chance in chances]
        width = max(
            chain.num_unchecked for chain, takes in zip(chains, taking, strict=True) if takes
        )
        self._draft_seconds += self.costs.draft[1 + width]
        self._num_passes += 1
        return taking

    def _too_short(self, chains: Sequence[DraftChain]) -> bool:
        """Whether what is drafted is not worth verifying yet.

        Where a second token costs a leap, as with kernels made for one, a draft that caution keeps
        short would be dropped over and over, and nothing learnt.
        """
        verify = self.costs.verify
        width = max(len(chain.tokens) for chain in chains)
        gain = sum(sum(chain.survival[1:]) for chain in chains)
        return gain < self.rate * (verify[width + 1] - verify[1])

    def _loss(self, chains: Sequence[DraftChain], chances: Sequence[float]) -> float:
        """What drafting on loses, in tokens, however far it looks ahead; under 0: it gains."""
        verify, draft = self.costs.verify, self.costs.draft
        now = max(len(chain.tokens) for chain in chains)
        live = [
            (chance, self.acceptance.later_token(chain.bias), len(chain.tokens), chain)
            for chain, chance in zip(chains, chances, strict=True)
            if chance > 0
        ]
        longest = max(length for _, _, length, _ in live)
        ahead = min(LOOK_AHEAD, max(chain.limit - length for _, _, length, chain in live))
        seconds, gain = draft[1 + max(chain.num_unchecked for *_, chain in live)], 0.0
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

    def _loss_one_more(self, chain: DraftChain, chance: float) -> float:
        """The same for drafting one token of a single sequence and deciding anew by its confidence.

        Where some confidences say "go on" and others "stop", that is better than any length fixed
        beforehand.
        """
        verify, draft, length = self.costs.verify, self.costs.draft, len(chain.tokens)
        later = self.acceptance.later_token(chain.bias)
        outlook = self.acceptance.outlook(chain.state, chain.bias)
        # What is expected of the token on the whole is known best by itself.
        scale = chance / sum(share * own for share, own, _ in outlook)
        room = min(LOOK_AHEAD, chain.limit - length - 1)
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
        return self.new_rate * draft[1 + chain.num_unchecked] - value

    def finish(self, chains: Sequence[DraftChain]) -> None:
        """Drop what is not worth verifying; account for the step."""
        verify = self.costs.verify
        now = max(len(chain.tokens) for chain in chains)
        fewest = max(chain.num_committed for chain in chains)
        gains = [0.0] * (now + 1)
        for chain in chains:
            total = 0.0
            for width in range(1, now + 1):
                if width < len(chain.survival):
                    total += chain.survival[width]
                gains[width] += total
        values = [gains[width] - self.rate * verify[width + 1] for width in range(fewest, now + 1)]
        width = fewest + values.index(max(values))
        for chain in chains:
            if len(chain.tokens) > width:
                chain.cut(width)
        if self._num_passes:
            # Nothing is learnt of what is not verified: it looks as good the next time.
            kept = any("skip" in chain.sources for chain in chains)
            self._drops = 0 if kept else self._drops + 1
        seconds = self._draft_seconds + verify[width + 1]
        new = not any("ngram" in chain.sources for chain in chains)
        for kind in (0, 1) if new else (0,):
            self._gained[kind] = self._gained[kind] * self._decay + len(chains) + gains[width]
            self._spent[kind] = self._spent[kind] * self._decay + seconds * self.costs.vanilla_rate
        if not self._num_passes:
            self._save(EXPLORATION * seconds * self.rate)

    def _save(self, tokens: float) -> None:
        """Save so many tokens for attempts at drafting; each risks a pass of all sequences."""
        self._exploration = min(self._exploration + tokens, MAX_EXPLORATION * self.costs.batch_size)
