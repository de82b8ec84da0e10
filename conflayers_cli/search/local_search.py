"""Local improvement of any plan under the objective.

One threshold selects what ConfLayers proposes; the few layers it takes wrongly cost most of the
gain. Here skipped layers are put back and further ones left out, one at a time, as long as the
predicted tokens per second rise; then the same with single sub-layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from conflayers_cli.search.objective import Objective, Score
from conflayers_cli.skip_plan import SkipPlan

LEAST_GAIN = 0.002
"""A relative gain under this is noise of a few hundred positions, not an improvement."""
FEW_TEXTS = 2
"""Texts that a move is first judged by; only promising ones are judged by all."""
PROMISING = 5
"""Moves per round judged by all texts; more only where none of them gains."""

Progress = Callable[[Score, int], None]


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


class Refiner:
    """Hill climbing over single moves.

    Args:
        objective: judges plans.
        single_sub_layers: whether sub-layers may be left out one by one.
        on_progress: told about every better plan and the plans judged so far.
        most_plans: no further round begins once as many plans were judged.
        out_of_time: no further round begins once it says so.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        single_sub_layers: bool,
        on_progress: Progress,
        most_plans: int,
        out_of_time: Callable[[], bool] = lambda: False,
    ) -> None:
        self._out_of_time = out_of_time
        self._objective = objective
        self._single = single_sub_layers
        self._on_progress = on_progress
        self._most_plans = most_plans
        self._best: Score | None = None
        self.judged = 0

    @property
    def _spent(self) -> bool:
        return self.judged >= self._most_plans or self._out_of_time()

    @property
    def best(self) -> Score | None:
        """The best plan so far; None before :meth:`refine`."""
        return self._best

    def refine(self, start: SkipPlan) -> Score:
        """The best plan found from ``start`` on; never worse than it under the objective."""
        best = self._best = self._objective.score(start)
        while True:
            before = best.speedup
            best = self._climb(best, self._layers_back)
            best = self._climb(best, self._layers_out)
            if best.speedup <= before * (1 + LEAST_GAIN) or self._spent:
                break
        # Single sub-layers last and once: there are twice as many, and each can gain but little.
        return self._climb(best, self._single_moves) if self._single else best

    def _layers_back(self, plan: SkipPlan) -> Iterable[Move]:
        return [Move(i, True, True) for i in plan.layers]

    def _layers_out(self, plan: SkipPlan) -> Iterable[Move]:
        named = set(plan.attention) | set(plan.mlp)
        inner = range(1, self._objective.decoder.depth - 1)
        return [Move(i, True, True) for i in inner if i not in named]

    def _single_moves(self, plan: SkipPlan) -> Iterable[Move]:
        inner = range(1, self._objective.decoder.depth - 1)
        return [Move(i, attention, not attention) for i in inner for attention in (True, False)]

    def _climb(self, best: Score, moves_of: Callable[[SkipPlan], Iterable[Move]]) -> Score:
        """Take the best move while one gains.

        A first round judges every move roughly; later rounds judge those that came out best then,
        and all of them again once none of these gains.
        """
        promise: dict[Move, float] = {}
        while not self._spent:
            # Never down to the empty plan: vanilla's speed is known, the best plan's is asked.
            moves = [move for move in moves_of(best.plan) if move.apply(best.plan)]
            fresh = not promise
            if fresh:
                promise = {move: self._score(best, move, FEW_TEXTS).speedup for move in moves}
            ranked = sorted((m for m in moves if m in promise), key=promise.__getitem__)
            taken, score = self._first_gain(best, ranked[::-1], promise, thorough=fresh)
            if taken is None:
                if fresh:
                    break
                promise = {}
                continue
            best = self._best = score
            promise.pop(taken)
            self._on_progress(best, self.judged)
        return best

    def _first_gain(
        self, best: Score, ranked: list[Move], promise: dict[Move, float], *, thorough: bool
    ) -> tuple[Move | None, Score]:
        """(the best of the first few moves of which one gains, its score); None: there is none.

        Few texts rank moves roughly: where the first few gain nothing, a thorough look goes on to
        all others that did not look bad.
        """
        rough = self._objective.score(best.plan, FEW_TEXTS).speedup
        for at in range(0, len(ranked), PROMISING):
            few = ranked[at : at + PROMISING]
            if at and (not thorough or promise[few[0]] < rough or self._spent):
                break
            judged = {move: self._score(best, move, None) for move in few}
            promise |= {move: score.speedup for move, score in judged.items()}
            taken = max(judged, key=lambda move: judged[move].speedup)
            if judged[taken].speedup > best.speedup * (1 + LEAST_GAIN):
                return taken, judged[taken]
        return None, best

    def _score(self, best: Score, move: Move, texts: int | None) -> Score:
        plan = move.apply(best.plan)
        if not self._objective.knows(plan, texts):
            self.judged += 1
        return self._objective.score(plan, texts)
