"""Ridge regression of what a block of layers does to the residual stream, from sums over tokens.

Hidden states x that enter the block, standardised feature by feature, and the change y that the
block makes to them give, with weights w, the least squares solution

    A = (Zᵀ W Z / n + λ I)⁻¹ Zᵀ W (y − ȳ) / n,    z = (x − x̄) / σ

in closed form; σ and x̄ are folded back into a matrix and a bias on x. Only sums over tokens are
kept, in float64, so that memory does not grow with the text. Tokens that attention uses as sinks
have hidden states hundreds of times as large as all others (Massive Activations, arXiv 2402.17762);
they would decide everything and are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

SINK = 5.0
"""A token is left out whose hidden state is so many times as long as the median."""
RIDGE = 0.01
"""λ; the features' variance is 1. From 0.0001 to 0.1 it makes next to no difference."""
LARGEST = 6.0e4
"""The largest weight that float16 is trusted with."""


@dataclass(frozen=True)
class Fit:
    """A linear map fitted: ``change = W x + b``.

    Attributes:
        factors: as in `StandIn`; float16, or float32 where they reach too far.
        bias: in the same dtype.
        explained: the share of the change's variance that the map explains.
    """

    factors: tuple[torch.Tensor, ...]
    bias: torch.Tensor
    explained: float


def sinks(states: torch.Tensor) -> torch.Tensor:
    """Which of the hidden states ``[n, d]`` are sinks, bool ``[n]``."""
    norms = states.float().norm(dim=-1)
    return norms > SINK * norms.median()


class Moments:
    """Sums over tokens of blocks that begin at one layer, in float64.

    They take d² numbers for the input and d² for each block's change, however long the texts.

    Args:
        size: d, features.
        ends: tell the blocks apart.
    """

    def __init__(self, size: int, ends: Iterable[int], device: torch.device | str = "cpu") -> None:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.weight = 0.0
        self._shift: torch.Tensor | None = None
        self._x, self._xx = zeros(size), zeros(size, size)
        self._changes = {end: _Change(zeros(size), zeros(size), zeros(size, size)) for end in ends}

    def add(
        self, entering: torch.Tensor, leaving: Mapping[int, torch.Tensor], weights: torch.Tensor
    ) -> None:
        """Count tokens in.

        Args:
            entering: hidden states before the blocks, ``[n, d]``.
            leaving: those behind each block.
            weights: ``[n]``; tokens of weight 0 don't count.
        """
        states = entering.double()
        if self._shift is None:  # about the mean, sums of squares lose no digits
            self._shift = states.mean(0)
        x = states - self._shift
        w = weights.to(x.device, torch.float64)[:, None]
        weighted = x * w
        self.weight += float(w.sum())
        self._x += weighted.sum(0)
        self._xx += weighted.T @ x
        for end, change in self._changes.items():
            y = leaving[end].double() - states
            change.sum += (y * w).sum(0)
            change.squares += (y * y * w).sum(0)
            change.products += weighted.T @ y

    def fit(self, end: int, rank: int | None = None, ridge: float = RIDGE) -> Fit:
        """The map of one block.

        Args:
            end: which.
            rank: of the matrix at the most (reduced-rank regression: the best such map of the
                inputs seen, Izenman 1975); None: d.
            ridge: λ.

        Raises:
            ValueError: no tokens were counted in, or they are not numbers.
        """
        if self._shift is None or self.weight <= 0:
            raise ValueError("no tokens to fit to")
        n, change = self.weight, self._changes[end]
        x, y = self._x / n, change.sum / n
        xx = self._xx / n - torch.outer(x, x)
        xy = change.products / n - torch.outer(x, y)
        variance = float((change.squares / n - y * y).clamp(min=0).sum())
        spread = xx.diagonal().clamp(min=0).sqrt()
        # A feature that never changes explains nothing: its weight is 0 whatever it is divided by.
        spread = spread.where(spread > 1e-6 * spread.mean(), 1.0)
        gram = xx / spread[:, None] / spread
        target = xy / spread[:, None]
        if not bool(gram.isfinite().all() & target.isfinite().all()):
            raise ValueError("hidden states that are no numbers")
        damped = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        solution = torch.cholesky_solve(target, torch.linalg.cholesky(damped))
        left, right = solution, None
        if rank is not None and rank < len(gram):
            right = torch.linalg.eigh(solution.T @ gram @ solution)[1][:, -rank:]
            left = solution @ right
            solution = left @ right.T
        error = variance - 2 * (solution * target).sum() + (solution * (gram @ solution)).sum()
        bias = y - ((x + self._shift) / spread) @ solution
        first = (left / spread[:, None]).T
        factors = (first,) if right is None else (first, right)
        explained = 1 - float(error) / variance if variance > 0 else 1.0
        return _stored(factors, bias, explained)


@dataclass
class _Change:
    """Sums of what a block does: y, its squares ``[d]``, and z y ``[d, d]``."""

    sum: torch.Tensor
    squares: torch.Tensor
    products: torch.Tensor


def _stored(factors: tuple[torch.Tensor, ...], bias: torch.Tensor, explained: float) -> Fit:
    """In the dtype that a profile keeps them in: what is judged is what is written."""
    largest = max(float(tensor.abs().max()) for tensor in (*factors, bias))
    dtype = torch.float16 if largest < LARGEST else torch.float32
    kept = tuple(tensor.to("cpu", dtype).contiguous() for tensor in factors)
    return Fit(kept, bias.to("cpu", dtype), explained)
