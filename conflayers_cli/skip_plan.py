"""Which sub-layers a draft leaves out."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from conflayers_cli.errors import InputError

Weights = Literal["int4"]
"""Quantised weights that a draft may use instead of the model's own."""
WEIGHTS: tuple[Weights, ...] = ("int4",)


@dataclass(frozen=True)
class SkipPlan:
    """The sub-layers that a draft leaves out, and the weights that the others use.

    The residual stream passes a skipped sub-layer unchanged. The empty plan is the full model.

    Attributes:
        attention, mlp: layer indices, sorted and unique, so that plans can key a dictionary; a
            layer in both is skipped whole.
        weights: see :mod:`conflayers_cli.kernels.int4_linear`; None: the model's own.

    Raises:
        ValueError: indices or weights are not like that.
    """

    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()
    weights: Weights | None = None

    def __post_init__(self) -> None:
        for name, indices in (("attention", self.attention), ("mlp", self.mlp)):
            if not isinstance(indices, tuple):
                raise ValueError(f"{name}: a tuple of layer indices is needed, got {indices!r}")
            if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in indices):
                raise ValueError(f"{name}: layer indices must be integers from 0, got {indices}")
            if list(indices) != sorted(set(indices)):
                raise ValueError(f"{name}: layer indices must be sorted and unique, got {indices}")
        if self.weights is not None and self.weights not in WEIGHTS:
            raise ValueError(f"weights: {' or '.join(WEIGHTS)} or none, got {self.weights!r}")

    @classmethod
    def of(
        cls, attention: Iterable[int] = (), mlp: Iterable[int] = (), weights: Weights | None = None
    ) -> SkipPlan:
        """A plan from indices in any order, repeats merged."""
        return cls(tuple(sorted(set(attention))), tuple(sorted(set(mlp))), weights)

    @classmethod
    def of_layers(cls, layers: Iterable[int]) -> SkipPlan:
        """A plan that skips whole layers."""
        indices = tuple(sorted(set(layers)))
        return cls(indices, indices)

    @classmethod
    def balanced(cls, depth: int) -> SkipPlan:
        """Every second layer, 1, 3, 5, …, never the last (ConfLayers' starting set)."""
        return cls.of_layers(range(1, depth - 1, 2))

    @classmethod
    def unified(cls, depth: int, speedup: float) -> SkipPlan:
        """Of L layers, max(2, round(L / speedup)) are kept, evenly spaced, with both ends, the rest
        skipped (Unified Layer Skipping, arXiv 2404.06954).

        Raises:
            ValueError: the speed-up is under 1 or no finite number.
        """
        if not (math.isfinite(speedup) and speedup >= 1):
            raise ValueError("allowed is a finite number from 1 on")
        kept = min(max(2, round(depth / speedup)), depth)
        steps = max(kept - 1, 1)
        spaced = {round(i * (depth - 1) / steps) for i in range(kept)}
        return cls.of_layers(i for i in range(depth) if i not in spaced)

    def __bool__(self) -> bool:
        return bool(self.attention or self.mlp or self.weights)

    def __len__(self) -> int:
        """The number of sub-layers left out."""
        return len(self.attention) + len(self.mlp)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers skipped whole."""
        return tuple(sorted(set(self.attention) & set(self.mlp)))

    @property
    def partial(self) -> tuple[int, ...]:
        """The layers of which one sub-layer is skipped."""
        return tuple(sorted(set(self.attention) ^ set(self.mlp)))

    def check(self, depth: int) -> None:
        """Raise ValueError unless the plan fits a model of ``depth`` layers, of which the first and
        the last are never skipped (as in ConfLayers and SWIFT)."""
        named = set(self.attention) | set(self.mlp)
        if named and not 1 <= min(named) <= max(named) <= depth - 2:
            raise ValueError(
                f"layers {min(named)}–{max(named)} named, but of a model with {depth} layers only "
                f"1–{depth - 2} may be skipped (the first and the last never)"
            )


def check_target_speedup(target_speedup: float | None) -> None:
    """Raise InputError unless a target speed-up is a finite number from 1 on, or None."""
    if target_speedup is not None and not 1 <= target_speedup < math.inf:
        raise InputError(
            f"target_speedup {target_speedup:g}: allowed is a finite number from 1 on",
            names=("target_speedup",),
        )
