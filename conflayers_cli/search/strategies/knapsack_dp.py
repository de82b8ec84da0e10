"""The dynamic programme on hidden states behind knapsack selection.

Source: KnapSpec, arXiv 2602.20217, and CLaSp, arXiv 2505.24196. A state (i, j) is the best path
through the layers up to i that saves j units of time: the hidden states of the window's tokens on
it. From it the next layer is passed in every way; of the paths that arrive at the same state, the
one whose hidden states are closest to the full model's is kept.

Two things are done otherwise than in the papers. A layer's sub-layers are decided on together (in
full, without one, without both), which keeps paths that a comparison in mid-layer would drop and
works where the two run in parallel. And a token sees its own draft key beside the full model's, as
the first token of a real draft does, so the states are exactly those of a draft.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.layer_skipping import LayerCall
from conflayers_cli.search.strategies.knapsack_window import Window
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.utils.distributed import agreed

PACED = 16
"""A layer passed by so many states tells the pace; with fewer, overheads would."""
SPARE = 0.85
"""Share of the time left that the layers may take; the model's head comes after them."""


@dataclass(frozen=True)
class Weights:
    """What sub-layers weigh, in units of time; None: sub-layers can't be left out alone.

    Attributes:
        attention, mlp: of one sub-layer, 1 at least.
        layer: of a whole layer.
    """

    attention: int | None
    mlp: int | None
    layer: int

    @classmethod
    def of(cls, attention: int, mlp: int) -> Weights:
        return cls(attention, mlp, attention + mlp)

    @classmethod
    def whole(cls) -> Weights:
        """Layers weigh one unit each and are left out whole."""
        return cls(None, None, 1)


@dataclass(frozen=True)
class Path:
    """The best way found to save so much time.

    Attributes:
        plan: what is left out.
        saved: units of time.
        similarity: mean cosine similarity of the last layer's output to the full model's.
        agreement: share of the window's tokens after which the choice is what the model wrote.
    """

    plan: SkipPlan
    saved: int
    similarity: float
    agreement: float


@dataclass(frozen=True)
class _Way:
    """A way to pass a layer: its number, what is left out, and the units that saves."""

    number: int
    attention: bool
    mlp: bool
    saved: int

    def plan(self, layer: int) -> SkipPlan:
        here = (layer,)
        return SkipPlan(here if self.attention else (), here if self.mlp else ())


class Programme:
    """One run of the dynamic programme.

    The first and the last layer always run. Memory: two buffers of ``most_saved + 1`` states
    ``[T, d]`` in the model's dtype, and what `Window.states_at_once` bounds.

    Args:
        decoder: the model.
        window: the tokens.
        weights: of the sub-layers.
        most_saved: units that a path may save at the most.
        least_similarity: paths whose similarity falls under it end.
        deadline: `time.perf_counter()` by which it should be through. Where the pace is too slow
            for that, layers are left out whole or not at all from then on, which takes a fraction
            of the time; None: it takes what it takes.

    Attributes:
        similarity: of the state after layer i that saves j units, float32 ``[L, most_saved + 1]``;
            NaN where no path leads.
    """

    def __init__(
        self,
        decoder: Decoder,
        window: Window,
        weights: Weights,
        *,
        most_saved: int,
        least_similarity: float,
        deadline: float | None = None,
    ) -> None:
        self._decoder = decoder
        self._window = window
        self._ways = _ways(weights)
        self._most_saved = most_saved
        self._most_distance = 1 - least_similarity
        self._deadline = deadline
        self._layer = weights.layer
        self._grid = 1  # states that save other than multiples of this are dropped
        self._taken = torch.full((decoder.depth, most_saved + 1), -1, dtype=torch.int8)
        self.similarity = torch.full((decoder.depth, most_saved + 1), torch.nan)
        self._alive = [0]
        self._states = torch.empty(0)

    @torch.inference_mode()
    def run(self) -> tuple[Path, ...]:
        """The paths that reach the end, by the units they save; the first is the full model.

        There are none where the deadline came first.
        """
        try:
            self._window.forward(self._pass)
        except _OutOfTimeError:
            return ()
        arrived = self._states[self._alive]
        choices = self._window.choices(arrived)
        agreement = (choices == self._window.following).float().mean(dim=-1).tolist()
        return tuple(
            Path(self._plan_of(saved), saved, float(self.similarity[-1, saved]), share)
            for saved, share in zip(self._alive, agreement, strict=True)
        )

    def _pass(self, i: int, hidden: torch.Tensor, layer: LayerCall) -> torch.Tensor:
        """All states pass layer i; what the model goes on with is the full model's ``[1, T, d]``.

        The state that saves nothing is the full model itself.
        """
        begin = time.perf_counter()
        if self._deadline is not None and agreed(begin >= self._deadline):
            raise _OutOfTimeError
        if i == 0:
            self._states = hidden.new_empty((self._most_saved + 1, *hidden.shape[1:]))
            self._states[0] = hidden[0]
        inner = 0 < i < self._decoder.depth - 1
        full = layer(hidden)
        arrivals = _Arrivals(self._states, full, self._most_distance)
        ways = [way for way in self._ways if inner or not way.saved]
        for start in range(0, len(self._alive), self._window.states_at_once):
            self._pass_chunk(i, start, layer, ways, arrivals)
        passed = len(self._alive)
        self._states = arrivals.states
        self._taken[i], self.similarity[i] = arrivals.taken.cpu(), 1 - arrivals.distance.cpu()
        self.similarity[i][self._taken[i] < 0] = torch.nan
        self._alive = self._taken[i].ge(0).nonzero().flatten().tolist()
        if inner and passed >= PACED:
            self._keep_pace(i, (time.perf_counter() - begin) / passed)
        return full

    def _pass_chunk(
        self, i: int, start: int, layer: LayerCall, ways: Sequence[_Way], arrivals: _Arrivals
    ) -> None:
        """As many states as fit at once, from the alive one at ``start`` on, pass layer i in all
        ways."""
        stack = self._decoder.stack
        alive = self._alive[start : start + self._window.states_at_once]
        saved = torch.tensor(alive, device=self._states.device)
        states = self._states[saved]
        ways = [way for way in ways if way.saved % self._grid == 0]
        for way in ways:
            if way.attention and way.mlp:
                arrivals.add(way, saved, states)
            elif way.attention:
                with stack.without(way.plan(i)):
                    arrivals.add(way, saved, layer(states))
        with stack.attending_once(i):
            for way in ways:
                if not way.attention:
                    with stack.without(way.plan(i)):
                        arrivals.add(way, saved, layer(states))

    def _keep_pace(self, i: int, pace: float) -> None:
        """Give up the finer budgets where the layers behind i would take too long at this pace,
        in seconds per state."""
        if self._deadline is None or self._grid == self._layer:
            return
        ahead = range(i + 1, self._decoder.depth - 1)
        states = sum(min(self._most_saved, k * self._layer) + 1 for k in ahead)
        if agreed(pace * states > SPARE * (self._deadline - time.perf_counter())):
            self._grid = self._layer
            self._alive = [j for j in self._alive if j % self._grid == 0]

    def _plan_of(self, saved: int) -> SkipPlan:
        """What the path to the last layer's state leaves out."""
        attention, mlp = [], []
        for i in reversed(range(self._decoder.depth)):
            way = self._ways[int(self._taken[i, saved])]
            attention += [i] * way.attention
            mlp += [i] * way.mlp
            saved -= way.saved
        return SkipPlan.of(attention, mlp)


class _OutOfTimeError(Exception):
    """The deadline came before the end."""


class _Arrivals:
    """The states behind a layer: of those that arrive with the same units saved, the closest.

    Args:
        before: the states before it, for their number and form; slot 0 is the full model's.
        full: what the full model makes of the layer, ``[1, T, d]``.
        most_distance: what is farther does not arrive.
    """

    def __init__(self, before: torch.Tensor, full: torch.Tensor, most_distance: float) -> None:
        self.states = torch.empty_like(before)
        self.states[0] = full[0]
        self.distance = torch.full((len(before),), torch.inf, device=before.device)
        self.taken = torch.full((len(before),), -1, dtype=torch.int8, device=before.device)
        self.distance[0], self.taken[0] = 0.0, 0
        self._direction = torch.nn.functional.normalize(full.float(), dim=-1)
        self._most_distance = most_distance

    def add(self, way: _Way, saved: torch.Tensor, states: torch.Tensor) -> None:
        """States ``[c, T, d]`` arrive by a way; before it they had saved ``[c]`` units, no two the
        same. Those that save more than there are states for don't arrive.
        """
        saved = saved + way.saved
        room = saved < len(self.states)
        saved, states = saved[room], states[room]
        direction = torch.nn.functional.normalize(states.float(), dim=-1)
        # 1 − cos in the one form that does not cancel: near-identity layers differ by 1e-7 in it.
        distance = (direction - self._direction).square().sum(dim=-1).mean(dim=-1) / 2
        better = (distance < self.distance[saved]) & (distance <= self._most_distance)
        winners = saved[better]
        self.states[winners] = states[better]
        self.distance[winners] = distance[better]
        self.taken[winners] = way.number


def _ways(weights: Weights) -> tuple[_Way, ...]:
    """All ways to pass a layer, in full first."""
    ways = [_Way(0, False, False, 0), _Way(1, True, True, weights.layer)]
    if weights.attention is not None and weights.mlp is not None:
        ways += [_Way(2, True, False, weights.attention), _Way(3, False, True, weights.mlp)]
    return tuple(ways)
