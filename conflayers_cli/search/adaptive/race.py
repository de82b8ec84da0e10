"""Which of nested plans drafts fastest, found by drafting with them.

Sub-layers are ordered by how much they change the hidden states for the time they take; the plans
are those that leave out the first so many. The more is left out, the cheaper a draft and the lower
its acceptance, so what a plan can be worth is bounded by the plans before it: most are never tried.
A plan is tried in turns with the best one, over the same text, until its bounds are apart from it
(successive elimination: Even-Dar et al., JMLR 7, 2006, §3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import log

from conflayers_cli.engine.effects import Effects
from conflayers_cli.search.adaptive.arm import CARE, Arm, speedup
from conflayers_cli.search.adaptive.pass_times import PassTimes
from conflayers_cli.skip_plan import SkipPlan

TURN = 4
"""Steps with one plan before the other has its turn."""
MIN_TOKENS, MAX_TOKENS = 24, 96
"""Tokens drafted with a plan before it may be dropped, and after which it is tried no more."""
MAX_STEPS = 64
"""Steps after which a plan is tried no more in any case."""
OPTIMISTIC = 0.9
"""Acceptance rate expected of the first plan that leaves something out."""
PARTS = 8
"""Parts of the order whose multiples are tried first."""
MIN_GAIN = 0.01
"""A plan that is better by less is no better."""
LARGEST_SHARE = 0.8
"""Of the inner sub-layers, that a plan leaves out at most."""

Part = tuple[int, str]
"""A sub-layer: (layer, "attention" or "mlp")."""


def order_parts(
    effects: Effects, depth: int, sizes: dict[str, float], *, whole_layers: bool
) -> list[tuple[float, tuple[Part, ...]]]:
    """What may be left out, the least effect for its time first: (effect by size, sub-layers).

    The first and the last layer stay. ``whole_layers``: sub-layers go together.
    """
    inner = range(1, depth - 1)
    kinds = ("attention", "mlp")
    units: list[tuple[Part, ...]] = [
        *(((i, "attention"), (i, "mlp")) for i in inner if whole_layers),
        *(((i, kind),) for i in inner for kind in kinds if not whole_layers),
    ]
    found = [
        (sum(effects.get(part, 0.0) for part in unit) / sum(sizes[kind] for _, kind in unit), unit)
        for unit in units
    ]
    return sorted(found)


class PlanRace:
    """Tries nested plans; ``turns`` says whose turn it is, step by step.

    Args:
        order: from `order_parts`.
        start: the arm to be beaten, with its kind of weights; leaves out nothing.
        make_arm: makes an arm of a plan and the acceptance rate expected.
        verify: what full passes cost.
        known: a plan from elsewhere that is likely to be good: the best one until another is.

    Attributes:
        best: the fastest arm by now.
        tried: plans tried beside the start.
    """

    def __init__(
        self,
        order: Sequence[tuple[float, tuple[Part, ...]]],
        start: Arm,
        make_arm: Callable[[SkipPlan, float], Arm],
        verify: PassTimes,
        known: Arm | None = None,
    ) -> None:
        self._order = order
        self._make_arm = make_arm
        self._verify = verify
        self._arms = {0: start}
        self._best = 0
        self._most = int(LARGEST_SHARE * len(order))
        if known is not None:
            self._best = max(min(len(known.plan), self._most), 1)
            self._arms[self._best] = known

    @property
    def best(self) -> Arm:
        return self._arms[self._best]

    @property
    def tried(self) -> int:
        return len(self._arms) - 1

    def turns(self) -> Iterator[Arm]:
        """The arm of each step, until the best one is found."""
        # The start is judged first: all bounds follow from it.
        for _ in range(MIN_TOKENS):
            yield self.best
            if self._tokens(self.best) >= MIN_TOKENS:
                break
        step = max(len(self._order) // PARTS, 1)
        for count in dict.fromkeys([self._widest_gap(), *range(step, self._most + 1, step)]):
            yield from self._try(count)
        while step > 1:
            step = -(-step // 2)
            best = self._best
            for count in (best - step, best + step):
                yield from self._try(count)

    def _widest_gap(self) -> int:
        """The count behind which effects rise most, in proportion, within what may be left out."""
        effects = [max(effect, 1e-12) for effect, _ in self._order]
        first = max(len(effects) // 16, 1)
        counts = range(first, min(self._most, len(effects) - 1) + 1)
        return max(counts, key=lambda n: log(effects[n] / effects[n - 1]), default=0)

    def _try(self, count: int) -> Iterator[Arm]:
        if not 0 < count <= self._most or count in self._arms:
            return
        # No more is accepted than with a plan that leaves out less.
        rate, bound = self._rates(self._arms[max(known for known in self._arms if known < count)])
        arm = self._make_arm(self._plan(count), rate)
        draft = arm.draft_seconds(self._verify, (1,))[1]
        if speedup(bound, draft, self._verify) <= self.best.speed(self._verify):
            return
        self._arms[count] = arm
        while self._tokens(arm) < MAX_TOKENS:
            for _ in range(TURN):
                yield arm
            if self._tokens(arm) >= MIN_TOKENS and not self._is_open(arm):
                break
            if arm.steps >= MAX_STEPS:  # its proposer does not think that drafting pays
                break
            for _ in range(TURN):
                yield self.best
        if arm.speed(self._verify) > self.best.speed(self._verify) * (1 + MIN_GAIN):
            self._best = count

    def _is_open(self, arm: Arm) -> bool:
        """Whether an arm may turn out to be better, or worse, than the best."""
        verify, best = self._verify, self.best
        return arm.speed(verify, CARE) > best.speed(verify, -CARE) and arm.speed(
            verify, -CARE
        ) < best.speed(verify, CARE)

    def _rates(self, arm: Arm) -> tuple[float, float]:
        """An arm's acceptance rate, and what it may be at most."""
        if not arm.plan:
            return OPTIMISTIC, 1.0
        acceptance = arm.proposer.policy.acceptance
        rate, (_, count) = acceptance.skip_rate, acceptance.skip_counts
        return rate, rate + CARE * (rate * (1 - rate) / (count + 1)) ** 0.5

    def _plan(self, count: int) -> SkipPlan:
        parts = [part for _, unit in self._order[:count] for part in unit]
        return SkipPlan.of(
            {layer for layer, kind in parts if kind == "attention"},
            {layer for layer, kind in parts if kind == "mlp"},
            self._arms[0].plan.weights,
        )

    def _tokens(self, arm: Arm) -> int:
        """Drafted tokens of an arm whose fate is known."""
        return arm.proposer.policy.acceptance.skip_counts[1]
