"""Local improvement of any plan under the objective.

ConfLayers selects layers by one threshold, and the few layers it selects wrongly cost most of the
gain. Here skipped layers are put back and further ones skipped, one at a time, as long as the
predicted tokens per second rise; then the same with single sub-layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from conflayers_cli.search.objective import Objective, Score
from conflayers_cli.skip_plan import SkipPlan

MIN_GAIN = 0.002
"""A relative gain under this is noise of a few hundred positions, not an improvement."""
FEW_TEXTS = 2  # texts that a move is first judged by; only promising ones are judged by all
PROMISING = 5  # moves per round judged by all texts; more only where none of them gains

OnBetter = Callable[[Score, int], None]
"""Called with a better plan's score, and the number of plans judged so far."""


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
    """Hill climbing over single moves; ``judged`` counts the plans judged.

    Args:
        objective: judges plans.
        single_sub_layers: whether sub-layers may be skipped one by one.
        on_progress: called with every better plan.
        max_plans, out_of_time: no further round begins once as many plans were judged, or once it
            returns True.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        single_sub_layers: bool,
        on_progress: OnBetter,
        max_plans: int,
        out_of_time: Callable[[], bool] = lambda: False,
    ) -> None:
        self._objective = objective
        self._single = single_sub_layers
        self._on_progress = on_progress
        self._max_plans = max_plans
        self._out_of_time = out_of_time
        self._inner = range(1, objective.decoder.depth - 1)
        self.best: Score | None = None
        self.judged = 0

    @property
    def _spent(self) -> bool:
        return self.judged >= self._max_plans or self._out_of_time()

    def refine(self, start: SkipPlan) -> Score:
        """The best plan found from ``start`` on; never worse than it under the objective."""
        best = self.best = self._objective.score(start)
        while True:
            before = best.speedup
            best = self._climb(best, self._restore_moves)
            best = self._climb(best, self._skip_moves)
            if best.speedup <= before * (1 + MIN_GAIN) or self._spent:
                break
        # Single sub-layers last and once: there are twice as many, and each can gain but little.
        return self._climb(best, self._single_moves) if self._single else best

    def _restore_moves(self, plan: SkipPlan) -> list[Move]:
        return [Move(i, True, True) for i in plan.layers]

    def _skip_moves(self, plan: SkipPlan) -> list[Move]:
        named = {*plan.attention, *plan.mlp}
        return [Move(i, True, True) for i in self._inner if i not in named]

    def _single_moves(self, plan: SkipPlan) -> list[Move]:
        return [
            Move(i, attention, not attention) for i in self._inner for attention in (True, False)
        ]

    def _climb(self, best: Score, moves_of: Callable[[SkipPlan], list[Move]]) -> Score:
        """Take the best move while one gains.

        A first round judges every move on few texts; later rounds judge those that came out best
        then, and all of them again once none of these gains.
        """
        promise: dict[Move, float] = {}
        while not self._spent:
            # Never down to the empty plan: vanilla's speed is known, the best plan's is wanted.
            moves = [move for move in moves_of(best.plan) if move.apply(best.plan)]
            first = not promise
            if first:
                promise = {move: self._score(best, move, FEW_TEXTS).speedup for move in moves}
            ranked = sorted((m for m in moves if m in promise), key=promise.__getitem__)
            gain = self._first_gain(best, ranked[::-1], promise, thorough=first)
            if gain is None:
                if first:
                    break
                promise = {}
                continue
            taken, best = gain
            self.best = best
            promise.pop(taken)
            self._on_progress(best, self.judged)
        return best

    def _first_gain(
        self, best: Score, ranked: list[Move], promise: dict[Move, float], *, thorough: bool
    ) -> tuple[Move, Score] | None:
        """The best of the first few moves of which one gains, and its score; None: none gains.

        Few texts rank moves roughly: where the first few gain nothing, a thorough look goes on to
        all others that did not look bad.
        """
        rough = self._objective.score(best.plan, FEW_TEXTS).speedup
        for i in range(0, len(ranked), PROMISING):
            few = ranked[i : i + PROMISING]
            if i and (not thorough or promise[few[0]] < rough or self._spent):
                break
            judged = {move: self._score(best, move, None) for move in few}
            promise |= {move: score.speedup for move, score in judged.items()}
            taken = max(judged, key=lambda move: judged[move].speedup)
            if judged[taken].speedup > best.speedup * (1 + MIN_GAIN):
                return taken, judged[taken]
        return None

    def _score(self, best: Score, move: Move, texts: int | None) -> Score:
        plan = move.apply(best.plan)
        if not self._objective.is_cached(plan, texts):
            self.judged += 1
        return self._objective.score(plan, texts)
