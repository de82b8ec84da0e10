"""Local improvement of any plan under the objective.

One threshold selects what ConfLayers proposes; the few layers it takes wrongly cost most of the gain.
Here skipped layers are put back and further ones left out, one at a time, as long as the predicted
tokens per second rise; then the same with single sub-layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from conflayers_cli.engine.plan import SkipPlan

from .objective import Objective, Score

LEAST_GAIN = 0.002
"""A relative gain under this is noise of a few hundred positions, not an improvement."""
FEW_TEXTS = 3
"""Texts that a move is first judged by; only promising ones are judged by all."""
PROMISING = 6
"""Moves per round judged by all texts."""

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
        return SkipPlan.of(attention, mlp)


class Refiner:
    """Hill climbing over single moves.

    Args:
        objective: judges plans.
        single_sub_layers: whether sub-layers may be left out one by one.
        on_progress: told about every better plan and the plans judged so far.
        most_plans: plans judged at the most.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        single_sub_layers: bool,
        on_progress: Progress,
        most_plans: int = 600,
    ) -> None:
        self._objective = objective
        self._single = single_sub_layers
        self._on_progress = on_progress
        self._left = most_plans
        self.judged = 0

    def refine(self, start: SkipPlan) -> Score:
        """The best plan found from ``start`` on; never worse than it under the objective."""
        self.best = self._objective.score(start)
        while True:
            before = self.best.speedup
            self._climb(self._layers_back)
            self._climb(self._layers_out)
            if self._single:
                self._climb(self._single_moves)
            if self.best.speedup <= before * (1 + LEAST_GAIN) or self._left <= 0:
                return self.best

    def _layers_back(self, plan: SkipPlan) -> Iterable[Move]:
        return [Move(i, True, True) for i in plan.layers]

    def _layers_out(self, plan: SkipPlan) -> Iterable[Move]:
        named = set(plan.attention) | set(plan.mlp)
        inner = range(1, self._objective.decoder.depth - 1)
        return [Move(i, True, True) for i in inner if i not in named]

    def _single_moves(self, plan: SkipPlan) -> Iterable[Move]:
        inner = range(1, self._objective.decoder.depth - 1)
        return [Move(i, attention, not attention) for i in inner for attention in (True, False)]

    def _climb(self, moves_of: Callable[[SkipPlan], Iterable[Move]]) -> None:
        """Take the best move while one gains.

        A first round judges every move; later rounds judge those again that came out best before,
        and all of them once none of these gains.
        """
        promise: dict[Move, float] = {}
        while self._left > 0:
            moves = list(moves_of(self.best.plan))
            fresh = not promise
            if fresh:
                promise = self._judge_roughly(moves)
            ranked = sorted(
                (m for m in moves if m in promise), key=lambda m: promise[m], reverse=True
            )
            taken = self._take_best(ranked[:PROMISING], promise)
            if taken is None:
                if fresh:
                    return
                promise = {}
            else:
                promise.pop(taken, None)

    def _judge_roughly(self, moves: Sequence[Move]) -> dict[Move, float]:
        promise = {}
        for move in moves:
            if self._left <= 0:
                break
            promise[move] = self._score(move, FEW_TEXTS).speedup
        return promise

    def _take_best(self, moves: Sequence[Move], promise: dict[Move, float]) -> Move | None:
        scored = [(self._score(move, None), move) for move in moves]
        for score, move in scored:
            promise[move] = score.speedup
        gaining = [
            (score, move)
            for score, move in scored
            if score.speedup > self.best.speedup * (1 + LEAST_GAIN)
        ]
        if not gaining:
            return None
        score, move = max(gaining, key=lambda pair: pair[0].speedup)
        self.best = score
        self._on_progress(score, self.judged)
        return move

    def _score(self, move: Move, texts: int | None) -> Score:
        self.judged += 1
        self._left -= 1
        return self._objective.score(move.apply(self.best.plan), texts)
