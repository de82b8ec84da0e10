"""How many tokens to draft at each step, and by which proposer; perhaps none.

A decode step takes some seconds and gives some tokens, so by renewal theory tokens per second are
greatest where every decision maximises its tokens less λ times its seconds, λ being the rate that
comes out in the end. A draft is extended as long as the tokens expected further are worth the
seconds of drafting and verifying them. Chances are estimated while decoding (:mod:`.acceptance`),
seconds are measured (:mod:`conflayers_cli.engine.cost_model`). Compare SWIFT and ConfLayers, which
stop at a fixed confidence, 0.8, whatever passes cost (arXiv 2410.06916 §4.2), and KnapSpec, which
chooses one length for all steps by the expected tokens per time (arXiv 2602.20217).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from conflayers_cli.engine.cost_model import CostTable
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.acceptance import AcceptanceModel, DecayedRate
from conflayers_cli.spec_decode.draft_chain import DraftChain
from conflayers_cli.spec_decode.ngram import Match

HORIZON = 12
"""Tokens considered ahead when deciding on one more: costs grow in leaps."""
CONTEXT_STEP = 64
"""Context lengths that share their costs, in positions."""
RATE_HALF_LIFE = 64
"""Steps after which one counts half in λ."""
EXPLORATION = 0.004
"""Share of the time given to finding out whether drafting, which did not pay, does now."""
MAX_EXPLORATION = 2.0
"""Most of it that is saved up, in tokens per sequence."""
ROW_CHANGE = 0.2
"""Share by which the time of choosing a token must change to count."""
MAX_DROPS = 8
"""Consecutive drafts dropped unverified, after which the next one must be saved for."""


@dataclass(frozen=True)
class StepCosts:
    """Seconds of passes over some sequences at some context.

    Attributes:
        verify: of a full pass by width; entry 0 is that of width 1.
        draft: of a draft pass by width, likewise.
        batch_size: sequences per pass.
        turnaround: between two draft passes of which the second waits for the host.
    """

    verify: tuple[float, ...]
    draft: tuple[float, ...]
    batch_size: int
    turnaround: float = 0.0

    @property
    def vanilla_rate(self) -> float:
        """Tokens per second with nothing drafted."""
        return self.batch_size / self.verify[1]


class DraftLengthPolicy:
    """Decides how far to draft; one object serves a whole run.

    Args:
        table: what passes cost.
        plan: what drafting by skipping leaves out; None: only n-grams draft.
        max_tokens: the most tokens drafted at once.
        prior: the acceptance rate of tokens drafted by skipping, where it was measured.
        alike: a policy that has seen the same texts: what it learns of n-grams is shared.

    Attributes:
        acceptance: the estimates learnt.
        costs: of passes of the current step.
        rate: λ for n-grams' tokens: recent tokens per second.
        new_rate: λ for drafting by skipping: the rate of steps in which no n-gram drafted, since
            it drafts where the text is new.
    """

    def __init__(
        self,
        table: CostTable,
        plan: SkipPlan | None,
        max_tokens: int,
        prior: float | None = None,
        alike: DraftLengthPolicy | None = None,
    ) -> None:
        self.acceptance: AcceptanceModel = AcceptanceModel(
            prior, alike.acceptance if alike else None
        )
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
        self._draft_seconds = self._row_seconds = 0.0
        self._num_passes = 0
        self._continues = [DecayedRate(0.5, 4.0) for _ in range(max_tokens + 1)]
        self.costs = self._costs_for(1, 0)
        self.rate = self.new_rate = self.costs.vanilla_rate

    def set_costs(self, table: CostTable) -> None:
        """Go on with other costs of passes."""
        self._table = table
        self._costs_at.clear()

    def set_row_seconds(self, seconds: float) -> None:
        """What choosing one token takes beside the pass; 0 where the costs have it already."""
        if abs(seconds - self._row_seconds) > ROW_CHANGE * max(seconds, self._row_seconds):
            self._row_seconds = seconds
            self._costs_at.clear()

    def _costs_for(self, batch_size: int, context: int) -> StepCosts:
        key = (batch_size, context // CONTEXT_STEP)
        if key not in self._costs_at:
            costs = self._table.at(batch_size, key[1] * CONTEXT_STEP + CONTEXT_STEP // 2)
            widths = range(self.max_tokens + HORIZON + 3)
            plain = [costs.verify_cost(max(width, 1)) for width in widths]
            one = costs.draft_cost(self._plan, self._table.depth) if self._plan else 0.0
            # A draft pass grows with its width as a full pass does.
            chosen = [batch_size * max(width, 1) * self._row_seconds for width in widths]
            verify = tuple(each + own for each, own in zip(plain, chosen, strict=True))
            draft = tuple(
                one * each / plain[1] + own for each, own in zip(plain, chosen, strict=True)
            )
            self._costs_at[key] = StepCosts(verify, draft, batch_size, costs.turnaround)
        return self._costs_at[key]

    def begin(self, batch_size: int, context: int, accepted: Sequence[int]) -> None:
        """Begin a step of sequences up to ``context`` long; ``accepted``: skip tokens of each last
        draft.
        """
        self._longest_accepted = max(self._longest_accepted, *accepted)
        if self._expected_gain is not None:  # an attempt that gained more than expected was free
            self._save(sum(map(bool, accepted)) - self._expected_gain)
            self._expected_gain = None
        self.costs = self._costs_for(batch_size, context)
        self.rate, self.new_rate = (
            self.costs.vanilla_rate * max(gained / spent if spent else 1.0, 1.0)
            for gained, spent in zip(self._gained, self._spent, strict=True)
        )
        self._draft_seconds, self._num_passes = 0.0, 0

    def extend_with_ngrams(self, chains: Sequence[DraftChain], matches: Sequence[Match]) -> None:
        """Append to each chain as much of its match as pays."""
        # One estimate serves all sequences of a batch, so its error counts as often.
        chances = [
            self.acceptance.ngram_tokens(match, chain.sampled, conservative=len(chains) > 1)
            for chain, match in zip(chains, matches, strict=True)
        ]
        survivals = [
            (len(chain.tokens), list(accumulate(own, mul, initial=chain.survival[-1]))[1:])
            for chain, own in zip(chains, chances, strict=True)
        ]
        width, _ = self._best_width(max(len(chain.tokens) for chain in chains), survivals)
        for chain, match, own in zip(chains, matches, chances, strict=True):
            count = max(width - len(chain.tokens), 0)
            for token, chance in zip(match.tokens[:count], own, strict=False):
                chain.add(token, chance, match.source)

    def _best_width(
        self, fewest: int, survivals: Sequence[tuple[int, Sequence[float]]]
    ) -> tuple[int, float]:
        """(draft length from ``fewest`` up that pays best, tokens expected of all sequences).

        ``survivals``: for each sequence (tokens before, survival of each token behind them).
        """
        longest = max(fewest, *(before + len(survival) for before, survival in survivals))
        gains = [0.0] * (longest + 1)
        for before, survival in survivals:
            for width, chance in enumerate(survival, before + 1):
                gains[width] += chance
        totals, verify = list(accumulate(gains)), self.costs.verify
        values = [totals[w] - self.rate * verify[w + 1] for w in range(fewest, longest + 1)]
        width = fewest + values.index(max(values))
        return width, totals[width]

    def launches_ahead(self, chain: DraftChain) -> bool:
        """Whether to launch the pass behind the next one before that one's token is read."""
        if chain.num_checked + 1 >= chain.limit:
            return False
        ends = 1.0 - self._continues[chain.num_checked + 1].mean
        return ends * self.costs.draft[2] < self.costs.turnaround

    def next_pass(self, chains: Sequence[DraftChain]) -> list[bool]:
        """Which chains the next draft pass extends; none: it does not pay.

        A pass also checks the tokens that n-grams proposed, and decides the first one that the
        skipped model would not choose: one token of its own is gained wherever that is. So its gain
        depends on the survival of the last checked token, not on that of n-grams' tokens.
        """
        chances = self._pass_chances(chains)
        if len(chains) == 1 and chains[0].num_checked:
            self._continues[chains[0].num_checked].update(chances[0] > 0)
        return [chance > 0 for chance in chances]

    def _pass_chances(self, chains: Sequence[DraftChain]) -> list[float]:
        """For each chain the chance that a pass gains a token; 0 where it takes no part."""
        none = [0.0] * len(chains)
        if self._plan is None:
            return none
        verify, draft = self.costs.verify, self.costs.draft
        bound = min(1 + 2 * self._longest_accepted, self.max_tokens)
        # Where a second token costs a leap, as with kernels made for one, a draft that this bound
        # keeps short would be dropped over and over, and nothing learnt.
        width = max(len(chain.tokens) for chain in chains)
        gain = sum(sum(chain.survival[1:]) for chain in chains)
        if gain < self.rate * (verify[width + 1] - verify[1]):
            bound = self.max_tokens
        chances = []
        for chain in chains:
            can = chain.open and chain.num_checked < bound
            first = self.acceptance.next_token(chain.state, chain.history.bias) if can else 0.0
            chances.append(chain.survival[chain.num_checked] * first)
        if not any(chances):
            return none
        loss = self._loss(chains, chances)
        if loss > 0 and len(chains) == 1:
            loss = min(loss, self._loss_one_more(chains[0], chances[0]))
        if self._drops >= MAX_DROPS and not self._num_passes:
            loss = max(loss, self.new_rate * draft[1])
        if loss > 0:
            if self._num_passes or self._exploration < loss:
                return none
            self._exploration -= loss
            self._expected_gain = sum(chances)
        taking = zip(chains, chances, strict=True)
        self._draft_seconds += draft[1 + max(c.num_unchecked for c, chance in taking if chance > 0)]
        self._num_passes += 1
        return chances

    def _loss(self, chains: Sequence[DraftChain], chances: Sequence[float]) -> float:
        """Tokens that drafting on loses at the best length up to `HORIZON`; under 0: it gains."""
        verify, draft = self.costs.verify, self.costs.draft
        now = max(len(chain.tokens) for chain in chains)
        live = [
            (chance, self.acceptance.later_token(chain.history.bias), len(chain.tokens), chain)
            for chain, chance in zip(chains, chances, strict=True)
            if chance > 0
        ]
        longest = max(length for _, _, length, _ in live)
        ahead = min(HORIZON, max(chain.limit - length for _, _, length, chain in live))
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

        Better than any fixed length where some confidences say "go on" and others "stop".
        """
        verify, draft, length = self.costs.verify, self.costs.draft, len(chain.tokens)
        later = self.acceptance.later_token(chain.history.bias)
        outlook = self.acceptance.outlook(chain.state, chain.history.bias)
        # The chance over all bins is known best by itself.
        scale = chance / sum(share * own for share, own, _ in outlook)
        ahead = min(HORIZON, chain.limit - length - 1)
        value = 0.0
        for share, own, following in outlook:
            gain = scale * own
            behind = gain * following
            gain -= self.new_rate * (verify[length + 2] - verify[length + 1])
            worth = max(gain, 0.0)
            seconds = draft[1]
            for width in range(length + 2, length + 2 + ahead):
                if behind <= self.new_rate * draft[1]:
                    break
                gain += behind - self.new_rate * (verify[width + 1] - verify[width])
                worth = max(worth, gain - self.new_rate * seconds)
                behind, seconds = behind * later, seconds + draft[1]
            value += share * worth
        return self.new_rate * draft[1 + chain.num_unchecked] - value

    def finish(self, chains: Sequence[DraftChain]) -> None:
        """Drop what is not worth verifying; account for the step."""
        width, gain = self._best_width(0, [(0, chain.survival[1:]) for chain in chains])
        for chain in chains:
            if len(chain.tokens) > width:
                chain.cut(width)
        if self._num_passes:
            # Nothing is learnt of what is not verified: it looks as good the next time.
            kept = any("skip" in chain.sources for chain in chains)
            self._drops = 0 if kept else self._drops + 1
        seconds = self._draft_seconds + self.costs.verify[width + 1]
        new = all(source == "skip" for chain in chains for source in chain.sources)
        for kind in (0, 1) if new else (0,):
            self._gained[kind] = self._gained[kind] * self._decay + len(chains) + gain
            self._spent[kind] = self._spent[kind] * self._decay + seconds * self.costs.vanilla_rate
        if not self._num_passes:
            self._save(EXPLORATION * seconds * self.rate)

    def _save(self, tokens: float) -> None:
        """Save tokens for attempts at drafting; each risks a pass of all sequences."""
        self._exploration = min(self._exploration + tokens, MAX_EXPLORATION * self.costs.batch_size)
