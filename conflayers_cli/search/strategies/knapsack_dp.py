"""The dynamic program on hidden states behind knapsack selection.

Source: KnapSpec, arXiv 2602.20217, and CLaSp, arXiv 2505.24196. A state (i, j) is the best path
through the layers up to i that saves j units of time: the hidden states of the window's tokens on
it. From it the next layer is passed in every way; of the paths that arrive at the same state, the
one whose hidden states are closest to the full model's is kept.

Two things differ from the papers. A layer's sub-layers are decided on together (in full, without
one, without both), which keeps paths that a comparison in mid-layer would drop and works where the
two run in parallel. And a token sees its own draft key beside the full model's, as the first token
of a real draft does, so the states are exactly those of a draft.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.layer_skipping import LayerCall
from conflayers_cli.search.strategies.knapsack_window import TokenWindow
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.utils.distributed import broadcast_rank0

MIN_TIMED_STATES = 16  # with fewer states passing a layer, overheads would hide the time per state
LAYERS_SHARE = 0.85
"""Share of the time left that the layers may take; the model's head comes after them."""


@dataclass(frozen=True)
class KnapsackWeights:
    """Units of time of the sub-layers.

    Attributes:
        attention, mlp: of one sub-layer, 1 at least; None: it can't be skipped alone.
        layer: of a whole layer.
    """

    attention: int | None
    mlp: int | None
    layer: int

    @classmethod
    def of(cls, attention: int, mlp: int) -> KnapsackWeights:
        return cls(attention, mlp, attention + mlp)

    @classmethod
    def whole(cls) -> KnapsackWeights:
        """One unit per layer; layers are skipped whole."""
        return cls(None, None, 1)


@dataclass(frozen=True)
class SkipPath:
    """The best path found for an amount of time saved.

    Attributes:
        plan: what is skipped.
        saved: units of time.
        similarity: mean cosine similarity of the last layer's output to the full model's.
        agreement: share of the window's tokens after which the choice is what the model wrote.
    """

    plan: SkipPlan
    saved: int
    similarity: float
    agreement: float


@dataclass(frozen=True)
class _LayerOption:
    """A way to pass a layer: its number, what is skipped, and the units that saves."""

    number: int
    attention: bool
    mlp: bool
    saved: int


class DynamicProgram:
    """One run of the dynamic program.

    The first and the last layer always run. Memory: two buffers of ``max_saved + 1`` states
    ``[T, d]`` in the model's dtype, and what `TokenWindow.states_at_once` bounds.

    Args:
        decoder: the model.
        window: the tokens.
        weights: of the sub-layers.
        max_saved: units that a path may save.
        min_similarity: paths whose similarity falls under it end.
        deadline: `time.perf_counter()` by which it should be through; None: no deadline. Where the
            pace is too slow for it, layers are skipped whole or not at all from then on, which
            takes a fraction of the time.

    Attributes:
        similarity: of the state after layer i that saves j units, float32 ``[L, max_saved + 1]``;
            NaN where no path leads.
    """

    def __init__(
        self,
        decoder: Decoder,
        window: TokenWindow,
        weights: KnapsackWeights,
        *,
        max_saved: int,
        min_similarity: float,
        deadline: float | None = None,
    ) -> None:
        self._decoder = decoder
        self._window = window
        self._options = _layer_options(weights)
        self._max_saved = max_saved
        self._max_distance = 1 - min_similarity
        self._deadline = deadline
        self._layer_weight = weights.layer
        self._grid = 1  # states that save other than multiples of this are dropped
        self._taken = torch.full((decoder.depth, max_saved + 1), -1, dtype=torch.int8)
        self.similarity = torch.full((decoder.depth, max_saved + 1), torch.nan)
        self._alive = [0]
        self._states = torch.empty(0)

    @torch.inference_mode()
    def run(self) -> tuple[SkipPath, ...]:
        """The paths that reach the end, by the units they save; the first is the full model.

        There are none where the deadline came first.
        """
        try:
            self._window.forward(self._pass)
        except _OutOfTimeError:
            return ()
        choices = self._window.choices(self._states[self._alive])
        agreement = (choices == self._window.following).float().mean(dim=-1).tolist()
        return tuple(
            SkipPath(self._plan_of(saved), saved, float(self.similarity[-1, saved]), share)
            for saved, share in zip(self._alive, agreement, strict=True)
        )

    def _pass(self, i: int, hidden: torch.Tensor, layer: LayerCall) -> torch.Tensor:
        """All states pass layer i; returns the full model's state ``[1, T, d]``, which is the one
        that saves nothing."""
        begin = time.perf_counter()
        if self._deadline is not None and broadcast_rank0(begin >= self._deadline):
            raise _OutOfTimeError
        if i == 0:
            self._states = hidden.new_empty((self._max_saved + 1, *hidden.shape[1:]))
            self._states[0] = hidden[0]
        inner = 0 < i < self._decoder.depth - 1
        full = layer(hidden)
        arrivals = _Arrivals(self._states, full, self._max_distance)
        options = [
            option
            for option in self._options
            if not option.saved or (inner and option.saved % self._grid == 0)
        ]
        for start in range(0, len(self._alive), self._window.states_at_once):
            self._pass_chunk(i, start, layer, options, arrivals)
        passed = len(self._alive)
        self._states = arrivals.states
        self._taken[i], self.similarity[i] = arrivals.taken.cpu(), 1 - arrivals.distance.cpu()
        self.similarity[i][self._taken[i] < 0] = torch.nan
        self._alive = self._taken[i].ge(0).nonzero().flatten().tolist()
        if inner and passed >= MIN_TIMED_STATES:
            self._coarsen_if_slow(i, (time.perf_counter() - begin) / passed)
        return full

    def _pass_chunk(
        self,
        i: int,
        start: int,
        layer: LayerCall,
        options: Sequence[_LayerOption],
        arrivals: _Arrivals,
    ) -> None:
        """As many states as fit at once, from the alive one at ``start`` on, pass layer i in all
        ways."""
        stack = self._decoder.stack
        alive = self._alive[start : start + self._window.states_at_once]
        saved = torch.tensor(alive, device=self._states.device)
        states = self._states[saved]
        for option in options:
            if option.attention and option.mlp:
                arrivals.add(option, saved, states)
            elif option.attention:
                with stack.without(SkipPlan(attention=(i,))):
                    arrivals.add(option, saved, layer(states))
        with stack.caching_attention(i):
            for option in options:
                if not option.attention:
                    with stack.without(SkipPlan(mlp=(i,) if option.mlp else ())):
                        arrivals.add(option, saved, layer(states))

    def _coarsen_if_slow(self, i: int, seconds_per_state: float) -> None:
        """Skip only whole layers from now on where the layers behind i would take too long."""
        if self._deadline is None or self._grid == self._layer_weight:
            return
        ahead = range(i + 1, self._decoder.depth - 1)
        states = sum(min(self._max_saved, k * self._layer_weight) + 1 for k in ahead)
        left = LAYERS_SHARE * (self._deadline - time.perf_counter())
        if broadcast_rank0(seconds_per_state * states > left):
            self._grid = self._layer_weight
            self._alive = [j for j in self._alive if j % self._grid == 0]

    def _plan_of(self, saved: int) -> SkipPlan:
        """What the path to the last layer's state skips."""
        attention, mlp = [], []
        for i in reversed(range(self._decoder.depth)):
            option = self._options[int(self._taken[i, saved])]
            attention += [i] * option.attention
            mlp += [i] * option.mlp
            saved -= option.saved
        return SkipPlan.of(attention, mlp)


class _OutOfTimeError(Exception):
    """The deadline came before the end."""


class _Arrivals:
    """The states behind a layer: of those that arrive with the same units saved, the closest.

    Args:
        before: the states before it, for their number and shape.
        full: the full model's state behind it, ``[1, T, d]``, which becomes state 0.
        max_distance: states farther from it are dropped.
    """

    def __init__(self, before: torch.Tensor, full: torch.Tensor, max_distance: float) -> None:
        self.states = torch.empty_like(before)
        self.states[0] = full[0]
        self.distance = torch.full((len(before),), torch.inf, device=before.device)
        self.taken = torch.full((len(before),), -1, dtype=torch.int8, device=before.device)
        self.distance[0], self.taken[0] = 0.0, 0
        self._direction = torch.nn.functional.normalize(full.float(), dim=-1)
        self._max_distance = max_distance

    def add(self, option: _LayerOption, saved: torch.Tensor, states: torch.Tensor) -> None:
        """States ``[c, T, d]`` arrive; they had saved ``[c]`` units, all different.

        Those that save more than the maximum are dropped.
        """
        saved = saved + option.saved
        allowed = saved < len(self.states)
        saved, states = saved[allowed], states[allowed]
        direction = torch.nn.functional.normalize(states.float(), dim=-1)
        # 1 − cos in the one form that does not cancel: near-identity layers differ by 1e-7 in it.
        distance = (direction - self._direction).square().sum(dim=-1).mean(dim=-1) / 2
        better = (distance < self.distance[saved]) & (distance <= self._max_distance)
        winners = saved[better]
        self.states[winners] = states[better]
        self.distance[winners] = distance[better]
        self.taken[winners] = option.number


def _layer_options(weights: KnapsackWeights) -> tuple[_LayerOption, ...]:
    """All ways to pass a layer, in full first."""
    options = [_LayerOption(0, False, False, 0), _LayerOption(1, True, True, weights.layer)]
    if weights.attention is not None and weights.mlp is not None:
        options.append(_LayerOption(2, True, False, weights.attention))
        options.append(_LayerOption(3, False, True, weights.mlp))
    return tuple(options)
