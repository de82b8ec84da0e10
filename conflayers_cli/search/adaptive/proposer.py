"""Drafting that needs no profile: it learns what pays from the text that it drafts for.

At first only n-grams draft. Once the run is long enough to earn the rounding of the weights, so
does the model in four bits; then the sub-layers that change least are found (`.race`), and the
fastest plan is kept. What passes cost is learnt from the passes. When acceptance changes,
as with another task, the search begins again. Whatever is tried, the text stays the model's own.

ConfLayers and SWIFT adapt while generating, too, by trying plans for a fixed number of steps each
(:mod:`conflayers_cli.search.online`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.effects import sub_layer_effects
from conflayers_cli.engine.graph_runner import clock
from conflayers_cli.search.adaptive.arm import Arm, pass_share, weight_sizes
from conflayers_cli.search.adaptive.pass_times import PassTimes
from conflayers_cli.search.adaptive.race import OPTIMISTIC, PlanRace, order_parts
from conflayers_cli.skip_plan import SkipPlan, Weights
from conflayers_cli.spec_decode.mixed import MixedProposer
from conflayers_cli.spec_decode.proposer import Context, Draft
from conflayers_cli.utils.distributed import broadcast_rank0
from conflayers_cli.utils.out_of_memory import is_out_of_memory

MAX_DRAFT_TOKENS = 25
"""Tokens drafted at once at the most."""
EFFECT_TOKENS = 24
"""Tokens of the text that the effects of sub-layers are measured on."""
ROUNDING_BYTES = 3e9
"""Bytes of weights a second that rounding takes, before it was timed."""
EARNED = 6.0
"""Rounding begins once decoding has taken so many times as long as it will,"""
SHORT = 40
"""and not before so many tokens: most answers that end by then would have gained nothing."""
LONG = 64
"""Budget, in tokens, from which on what an earlier run has learnt is worth rounding at once."""
COSTS_EVERY = 8
"""Steps with an arm between two looks at what its passes cost."""
WATCHED = 128
"""Drafted tokens of the settled plan that are compared with those before."""
CHANGE = 4.0
"""Standard deviations by which their acceptance must differ for a new search."""
LEAST_SPREAD = 0.02
"""Standard deviation assumed at least: tokens accepted or not come in runs."""
IDLE = 4
"""Steps for each of these tokens after which a plan counts as one that does not draft."""


@dataclass(frozen=True)
class Learnt:
    """What a run has found out, for the next one.

    Attributes:
        plan: drafts fastest; the empty plan: only n-grams draft.
        acceptance: of its tokens.
        settled: whether the search had come to its end.
        verify, draft: seconds of full passes and of the plan's by width in tokens.
        rounding_seconds: that rounding the weights took; 0: not known.
    """

    plan: SkipPlan
    acceptance: float
    settled: bool = False
    verify: dict[int, float] = field(default_factory=dict)
    draft: dict[int, float] = field(default_factory=dict)
    rounding_seconds: float = 0.0


@dataclass(frozen=True)
class _LastStep:
    """A step whose outcome is not known yet: when its draft was ready, and what it is."""

    texts: tuple[list[int], ...]
    lengths: tuple[int, ...]
    end: float
    tokens: int


class AutoProposer:
    """Drafts by n-grams and by the fastest plan found by now; for one sequence or several.

    Args:
        decoder: the model.
        budget: share of the time that passes for the search may take.
        learnt: from an earlier run, to begin where it ended.
        keep: called with what was learnt whenever a search has come to its end.

    Attributes:
        arm: drafts now.
        settled_after: tokens after which the search came to its end; None: it has not.
        setup_seconds, search_seconds: spent on rounding weights, and on passes for the search.
        seconds, tokens: of all steps, set-up and search included.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        budget: float,
        learnt: Learnt | None = None,
        keep: Callable[[Learnt], None] | None = None,
    ) -> None:
        self._decoder = decoder
        self._budget = budget
        self._learnt = learnt
        self._keep = keep
        self._searching = decoder.depth > 2
        self._sizes = weight_sizes(decoder)
        self._verify = PassTimes(learnt.verify if learnt else None)
        self._rows: tuple[int, ...] = (1,)
        self._arms: list[Arm] = []
        self.arm = self._make_arm(SkipPlan(), OPTIMISTIC)
        self.race: PlanRace | None = None
        self._settled: Arm | None = None
        self.setup_seconds = self.search_seconds = self.seconds = 0.0
        self.tokens = self.tried = 0
        self.settled_after: int | None = None
        self._last: _LastStep | None = None
        self._watched = WATCHED
        self._contexts: Sequence[Context] = ()
        self._limits: Sequence[int] = ()
        self._turns = self._script()

    @property
    def name(self) -> str:
        return self.arm.proposer.name

    @property
    def best(self) -> Arm:
        """The fastest way of drafting known."""
        return self._settled or (self.race.best if self.race else self.arm)

    @property
    def settled(self) -> bool:
        """Whether the search has come to its end for now."""
        return self._settled is not None

    @property
    def expected_speedup(self) -> float:
        """Tokens a second with it over those without drafts, by what was seen."""
        return self.best.speed(self._verify)

    @property
    def search_share(self) -> float:
        """Share of the time that passes for the search took."""
        return self.search_seconds / self.seconds if self.seconds else 0.0

    def propose(self, context: Context, limit: int) -> Draft:
        return self.propose_batch([context], [limit])[0]

    def propose_batch(self, contexts: Sequence[Context], limits: Sequence[int]) -> list[Draft]:
        begin = self._now()
        self._note_step(contexts, begin)
        self._contexts, self._limits = contexts, limits
        self.arm = next(self._turns)
        if len(contexts) not in self._rows:
            self._rows = tuple(sorted({*self._rows, len(contexts)}))
        if self.arm.rows != self._rows or self.arm.steps % COSTS_EVERY == 0:
            costs = self.arm.costs(self._verify, self._rows, self._decoder.depth)
            self.arm.proposer.policy.set_costs(costs)
        self._contexts = ()  # they hold the texts' cache
        drafts = self.arm.proposer.propose_batch(contexts, limits)
        for width, seconds in self.arm.proposer.passes:
            self.arm.times.add(width, seconds)
        self.arm.steps += 1
        end = self._now()
        self.seconds += end - begin
        width = 1 + max(len(draft.tokens) for draft in drafts)
        texts = tuple(context.tokens for context in contexts)
        self._last = _LastStep(texts, tuple(map(len, texts)), end, width * len(texts))
        return drafts

    def save(self) -> None:
        """Keep what was learnt, if it is wanted and anything was."""
        best = self.best
        if self._keep is not None and self._verify.known and best.plan:
            self._keep(
                Learnt(
                    plan=best.plan,
                    acceptance=best.proposer.policy.acceptance.skip_rate,
                    settled=self.settled_after is not None,
                    verify=self._verify.known,
                    draft=best.times.known,
                    rounding_seconds=self.setup_seconds,
                )
            )

    def _now(self) -> float:
        """Seconds; all ranks use one clock, since what is tried next depends on it."""
        return broadcast_rank0(clock(self._decoder.device))

    def _note_step(self, contexts: Sequence[Context], now: float) -> None:
        """What the step before took, if these sequences were decoded in it and no others."""
        last, self._last = self._last, None
        if last is None or len(contexts) != len(last.texts):
            return
        same = [context.tokens is text for context, text in zip(contexts, last.texts, strict=True)]
        grown = [len(text) - size for text, size in zip(last.texts, last.lengths, strict=True)]
        if all(same) and min(grown) > 0:
            self._verify.add(last.tokens, now - last.end)
            self.seconds += now - last.end
            self.tokens += sum(grown)

    # What happens when: yields the arm of each step.

    def _script(self) -> Iterator[Arm]:
        plain, known = self.arm, self._learnt
        weights: Weights | None = None
        if self._decoder.stack.int4.worthwhile:
            seconds = self._decoder.stack.int4.nbytes / ROUNDING_BYTES
            if known is not None and known.rounding_seconds:
                seconds = known.rounding_seconds
            while not self._is_earned(seconds):
                yield plain
            weights = "int4" if self._round() else None
        before: Arm | None = None
        if known is not None and (plan := replace(known.plan, weights=weights)):
            before = self._make_arm(plan, known.acceptance, PassTimes(known.draft))
            if known.settled or not self._searching:
                yield from self._watch(before, known.acceptance)
        while True:
            start = self._make_arm(SkipPlan(weights=weights), OPTIMISTIC) if weights else plain
            best = start
            if self._searching:
                yield from self._search(start, before if before and len(before.plan) else None)
                best = self.race.best if self.race else start
            self._arms = list({id(arm): arm for arm in (plain, start, best)}.values())
            yield from self._watch(best)
            before = best

    def _search(self, start: Arm, known: Arm | None) -> Iterator[Arm]:
        """Find out which sub-layers change least, and race plans without them, and a known one."""
        while not self._may_search():
            yield known or start
        begin = self._now()
        effects = self._effects(self._contexts[0])
        self.search_seconds += self._now() - begin
        order = order_parts(
            effects,
            self._decoder.depth,
            self._sizes,
            whole_layers=len(self._decoder.sub_layers) < 2,
        )
        before = self.tried
        self.race = PlanRace(order, start, self._make_arm, self._verify, known)
        for arm in self.race.turns():
            self.tried = before + self.race.tried
            yield arm

    def _watch(self, arm: Arm, expected: float | None = None) -> Iterator[Arm]:
        """Draft with the settled plan until its acceptance is another one for good, or it drafts
        next to nothing. ``expected``: the acceptance rate that was seen before."""
        self.settled_after, self._settled = self.tokens, arm
        self.save()
        acceptance, reference = arm.proposer.policy.acceptance, expected
        (hits, count), steps = acceptance.skip_counts, arm.steps
        while True:
            yield arm
            now = acceptance.skip_counts
            if now[1] - count < self._watched:
                if arm.steps - steps < IDLE * self._watched:
                    continue
                break
            rate = (now[0] - hits) / (now[1] - count)
            known = rate if reference is None else reference
            spread = max((known * (1 - known) / self._watched) ** 0.5, LEAST_SPREAD)
            if abs(rate - known) > CHANGE * spread:
                break
            reference = (known + rate) / 2
            (hits, count), steps = now, arm.steps
        self._watched *= 2  # the next search must have better grounds
        self.settled_after, self._settled = None, None

    def _may_search(self) -> bool:
        """Whether there is text, room in the cache, and time for a pass over some of it."""
        context = self._contexts[0]
        room = context.cache.capacity - len(context.tokens)
        if room < EFFECT_TOKENS or len(context.tokens) <= EFFECT_TOKENS:
            return False
        cost = self._verify.costs([EFFECT_TOKENS])[EFFECT_TOKENS]
        return self.search_seconds + cost <= self._budget * self.seconds

    def _effects(self, context: Context) -> dict[tuple[int, str], float]:
        filled = len(context.tokens) - 1
        positions = torch.arange(filled - EFFECT_TOKENS, filled)[None]
        tokens = torch.tensor([context.tokens[filled - EFFECT_TOKENS : filled]])
        # In slots behind the text: what the text holds stays as it is.
        slots = positions + EFFECT_TOKENS
        cache = context.cache.view(0, 1) if context.cache.batch > 1 else context.cache
        return sub_layer_effects(self._decoder, tokens, positions, cache, slots)

    def _make_arm(self, plan: SkipPlan, rate: float, draft: PassTimes | None = None) -> Arm:
        """An arm that shares n-grams with the others; ``rate``: the acceptance expected."""
        arm = Arm(plan, self._share(plan), draft or PassTimes())
        costs = arm.costs(self._verify, self._rows, self._decoder.depth)
        arm.proposer = MixedProposer(
            self._decoder,
            plan or None,
            costs,
            prior=rate if plan else None,
            max_tokens=MAX_DRAFT_TOKENS,
            rows_apart=False,  # passes are timed with it
            alike=self._arms[0].proposer if self._arms else None,
        )
        self._arms.append(arm)
        return arm

    def _share(self, plan: SkipPlan) -> float:
        """A draft pass's seconds over a full one's, by those of a plan with the same weights."""
        share = pass_share(self._decoder.depth, plan, self._sizes)
        for arm in self._arms:
            if arm.plan and arm.plan.weights == plan.weights and arm.times.known:
                timed = arm.times.costs((1,))[1] / self._verify.costs((1,))[1]
                return share * timed / pass_share(self._decoder.depth, arm.plan, self._sizes)
        return share

    def _is_earned(self, seconds: float) -> bool:
        """Whether the run is long enough for rounding the weights, which takes so long, to pay."""
        known = self._learnt
        if known is not None and known.plan.weights and max(self._limits) >= LONG:
            return True
        return self.tokens >= SHORT and self.seconds >= EARNED * seconds

    def _round(self) -> bool:
        """Make the weights in four bits; False: there is no memory for them."""
        begin, zero = self._now(), torch.zeros((1, 1), dtype=torch.int64)
        plan = SkipPlan(weights="int4")
        try:
            self._decoder.forward(zero, zero, self._decoder.new_cache(1), plan)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        self.setup_seconds += self._now() - begin
        return True
