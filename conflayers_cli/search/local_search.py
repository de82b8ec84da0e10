"""The best plan under the objective, from any start, in few looks.

ConfLayers selects layers by one threshold, and the few layers it selects wrongly cost most of the
gain. Here what is left out follows from predicted tokens per second:

1. Sub-layers are ordered by how much they change the hidden states for the time they take. Plans
   that leave out the first 1/8, 2/8, … of that order are judged, and more between the best of them.
2. Single changes of the best plan (put back, leave out; layers, then sub-layers) are raced: judged
   by one text first, the best of them by three, and of these the best by all. To leave out more is
   tried in that order, until a run of moves gains nothing. Those that gain are taken together where
   that is better than the best of them alone.

Successive halving: Jamieson and Talwalkar, arXiv 1502.07943.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from conflayers_cli.search.objective import Objective, Score
from conflayers_cli.skip_plan import SkipPlan, Weights

MIN_GAIN = 0.002
"""A relative gain under this is noise of a few hundred positions, not an improvement."""
NOISE = 0.005
"""Plans closer to one another than this share are taken as equal, and the simpler one is kept."""
NEAR = 0.9
"""A start that looks worse than this share of another plan's speed is not judged by all texts."""
RACE = ((1, 6), (3, 3))
"""Texts that moves are judged by before all are, and how many of them stay in the race."""
PATIENCE = 6
"""Moves to leave out more in a row, the likeliest first, that gain nothing on the first text: no
more are tried. All to put something back are: what is left out wrongly looks like any other."""
NESTED = 8
"""Parts of the order of effects whose multiples are left out first."""

OnBetter = Callable[[Score, int], None]
"""Called with a better plan's score, and the number of plans judged so far."""
OnLook = Callable[[int, float], None]
"""Called after every look with the number of plans judged, and about the share of all looks."""
_STAGES = (0.0, 0.25, 0.45, 0.65, 1.0)
"""Shares of the looks after the nested plans, and after each kind of moves' race."""


def ignore_look(judged: int, done: float) -> None:
    """No-op callback."""


@dataclass(frozen=True)
class Move:
    """One change of a plan: skip or put back a layer or one of its sub-layers."""

    layer: int
    attention: bool
    mlp: bool

    def apply(self, plan: SkipPlan) -> SkipPlan:
        """The plan with the named sub-layers flipped."""
        attention, mlp = set(plan.attention), set(plan.mlp)
        if self.attention:
            attention ^= {self.layer}
        if self.mlp:
            mlp ^= {self.layer}
        return SkipPlan.of(attention, mlp, plan.weights)


class LocalSearch:
    """Search over sets of sub-layers and single moves; ``judged`` counts the plans judged.

    Args:
        objective: judges plans.
        single_sub_layers: whether sub-layers may be skipped one by one.
        on_progress: called with every better plan.
        max_plans, out_of_time: nothing further is judged once as many plans were, or once it
            returns True.
        on_look: told of every look.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        single_sub_layers: bool,
        on_progress: OnBetter,
        max_plans: int,
        out_of_time: Callable[[], bool] = lambda: False,
        on_look: OnLook = ignore_look,
    ) -> None:
        self._objective = objective
        self._single = single_sub_layers
        self._on_progress = on_progress
        self._max_plans = max_plans
        self._out_of_time = out_of_time
        self._on_look = on_look
        self._stage = 0
        self._inner = range(1, objective.decoder.depth - 1)
        self._effects = objective.effects()
        self.best: Score | None = None
        self.judged = 0

    @property
    def _spent(self) -> bool:
        return self.judged >= self._max_plans or self._out_of_time()

    def refine(self, start: SkipPlan) -> Score:
        """The best plan found; but for noise never worse than ``start`` under the objective."""
        self.best, self._stage = None, 0
        few = RACE[-1][0]
        nested = self._search_nested(start.weights, few)
        # Vanilla's speed is known, the best plan's is wanted, whether it pays or not.
        rough = self._score(start, few).speedup if start else 0.0
        if nested is not None and nested.speedup > rough * (1 + MIN_GAIN):
            self._take(self._score(nested.plan))
        if self.best is None or rough > NEAR * self.best.speedup:
            self._take(self._score(start))
        best = self.best or self._score(start)
        while not self._spent:
            before = best.speedup
            kinds = (self._restore_moves, self._skip_moves, self._single_moves)
            for stage, moves_of in enumerate(kinds, 1):
                self._stage = stage
                patience = None if moves_of == self._restore_moves else PATIENCE
                best = self._race(best, moves_of(best.plan), patience)
            if best.speedup <= before * (1 + MIN_GAIN):
                break
        return self._simplify(best)

    def _simplify(self, best: Score) -> Score:
        """The plan with the layers of which it skips a half skipped whole or not at all, if that is
        as good but for noise."""
        plan = best.plan
        attention, mlp = set(plan.attention), set(plan.mlp)
        for layers in (attention | mlp, attention & mlp):
            if plan.partial and layers and not self._spent:
                whole = self._score(SkipPlan.of(layers, layers, plan.weights))
                if whole.speedup >= best.speedup * (1 - NOISE):
                    self.best = whole
                    self._on_progress(whole, self.judged)
                    return whole
        return best

    def _tell(self, part: float) -> None:
        """Say that a part of the current stage is done."""
        begin, end = _STAGES[self._stage : self._stage + 2]
        self._on_look(self.judged, begin + min(part, 1.0) * (end - begin))

    def _take(self, score: Score) -> Score:
        """The better of the best and this one, which is the best from then on."""
        if self.best is None or score.speedup > self.best.speedup:
            if self.best is not None:
                self._on_progress(score, self.judged)
            self.best = score
            self._objective.anchor(score.plan)
        return self.best

    def _effect(self, move: Move) -> float:
        """How much a move's sub-layers change the hidden states, for the time they take."""
        costs, kinds = self._objective.costs, (("attention", move.attention), ("mlp", move.mlp))
        named = [kind for kind, wanted in kinds if wanted]
        seconds = sum(getattr(costs, kind) for kind in named) or 1.0
        return sum(self._effects.get((move.layer, kind), 0.0) for kind in named) / seconds

    def _search_nested(self, weights: Weights | None, texts: int) -> Score | None:
        """The best of the plans that leave out the first so many in the order of effects."""
        pairs = ((True, False), (False, True)) if self._single else ((True, True),)
        order = sorted((Move(i, *pair) for i in self._inner for pair in pairs), key=self._effect)
        scores: dict[int, Score] = {}

        def judge(count: int) -> None:
            if 0 < count <= len(order) and count not in scores and not self._spent:
                plan = SkipPlan(weights=weights)
                for move in order[:count]:
                    plan = move.apply(plan)
                scores[count] = self._score(plan, texts)
                self._tell(len(scores) / (2 * NESTED))

        step = max(len(order) // NESTED, 1)
        for part in range(1, NESTED):
            judge(part * step)
            tried = [scores[n].speedup for n in sorted(scores)]
            if len(tried) > 2 and tried[-1] < tried[-2] < tried[-3]:
                break  # the more is left out, the worse
        while step > 1 and scores and not self._spent:
            step = -(-step // 2)
            best = max(scores, key=lambda n: scores[n].speedup)
            judge(best - step)
            judge(best + step)
        return max(scores.values(), key=lambda score: score.speedup, default=None)

    def _restore_moves(self, plan: SkipPlan) -> list[Move]:
        """Those that change most first."""
        moves = (Move(i, True, True) for i in plan.layers)
        return sorted(moves, key=self._effect, reverse=True)

    def _skip_moves(self, plan: SkipPlan) -> list[Move]:
        """Those that change least first."""
        named = {*plan.attention, *plan.mlp}
        moves = (Move(i, True, True) for i in self._inner if i not in named)
        return sorted(moves, key=self._effect)

    def _single_moves(self, plan: SkipPlan) -> list[Move]:
        """The other half of what is skipped alone, and what changes most of the sub-layers skipped
        and least of the others."""
        if not self._single:
            return []
        skipped = {(i, True) for i in plan.attention} | {(i, False) for i in plan.mlp}
        moves = [Move(i, kind, not kind) for i in self._inner for kind in (True, False)]
        moves.sort(key=self._effect)
        inside = [move for move in moves if (move.layer, move.attention) in skipped]
        outside = [move for move in moves if (move.layer, move.attention) not in skipped]
        alone = [move for move in moves if move.layer in plan.partial]
        turns = zip_longest(outside[:PATIENCE], reversed(inside[-PATIENCE:]))
        return list(dict.fromkeys([*alone, *(m for pair in turns for m in pair if m is not None)]))

    def _race(self, best: Score, moves: Sequence[Move], patience: int | None) -> Score:
        """The best plan, perhaps with some of the moves taken."""
        # Never down to the empty plan: vanilla's speed is known, the best plan's is wanted.
        racing = [move for move in moves if move.apply(best.plan)]
        levels = [(texts, stay) for texts, stay in RACE if texts < self._objective.num_texts]
        for level, (texts, stay) in enumerate(levels):
            racing = self._ahead(best, racing, texts, stay, None if level else patience)
            self._tell((level + 1) / (len(levels) + 1))
        gains = {}
        for move in racing:
            if self._spent:
                break
            gains[move] = self._score(move.apply(best.plan))
        good = [m for m in gains if gains[m].speedup > best.speedup * (1 + self._least(m, best))]
        if not good:
            return best
        taken, together = max((gains[m] for m in good), key=_speedup), best.plan
        for move in good:
            together = move.apply(together)
        if len(good) > 1 and together and not self._spent:
            taken = max(taken, self._score(together), key=_speedup)
        return self._take(taken)

    def _ahead(
        self, best: Score, moves: Sequence[Move], texts: int, stay: int, patience: int | None
    ) -> list[Move]:
        """The first ``stay`` moves by so many texts."""
        own, ratios, vain = self._score(best.plan, texts).speedup, {}, 0
        for move in moves:
            if self._spent or (patience is not None and vain >= patience):
                break
            ratios[move] = self._score(move.apply(best.plan), texts).speedup / own
            vain = 0 if ratios[move] > 1 else vain + 1
        return sorted(ratios, key=ratios.__getitem__, reverse=True)[:stay]

    def _least(self, move: Move, best: Score) -> float:
        """The gain from which on a move counts: any, where it leaves out more."""
        skips_more = len(move.apply(best.plan)) > len(best.plan)
        return 0.0 if skips_more else MIN_GAIN

    def _score(self, plan: SkipPlan, texts: int | None = None) -> Score:
        if not self._objective.is_cached(plan, texts):
            self.judged += 1
        return self._objective.score(plan, texts)


def _speedup(score: Score) -> float:
    return score.speedup
