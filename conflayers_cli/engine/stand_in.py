"""Linear maps that run in place of a block of layers while drafting.

Leaving layers out puts the identity in their place. A linear map of the residual stream, fitted to
what the layers do to it, comes much closer to them for about a tenth of what one of them costs (see
`docs/stand-ins.md`). A map works token by token: it knows nothing of the tokens before, which the
layers that are kept still attend to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from conflayers_cli.kernels.packed_linear import Packed

Product = Callable[[torch.Tensor], torch.Tensor]


class Map(nn.Module):
    """A stand-in on a device, in a dtype: hidden states ``[..., d] → [..., d]``, a new tensor.

    Args:
        factors: of the product, the one to be applied first in front.
        bias: ``[d]``.
        packed: keep the weights in the processor's order (see :mod:`conflayers_cli.kernels.packed_linear`).
    """

    def __init__(self, factors: tuple[torch.Tensor, ...], bias: torch.Tensor, packed: bool) -> None:
        super().__init__()
        linears = [_linear(factor, None) for factor in factors[:-1]]
        linears.append(_linear(factors[-1], bias))
        self.products: tuple[Product, ...] = tuple(
            Packed([linear]) if packed else linear for linear in linears
        )

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        change = states
        for product in self.products:
            change = product(change)
        return change.add_(states)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    rows, columns = weight.shape
    # made without memory of its own: the weight is there
    linear = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear.eval()


@dataclass(frozen=True, eq=False)
class StandIn:
    """What runs in place of the layers ``begin`` … ``end - 1``: ``x + W x + b``.

    Two of them are equal where they stand for the same layers with the same bits.

    Attributes:
        begin, end: the layers, the last one not included.
        factors: W ``[d, d]`` alone, or of low rank: what is applied first ``[r, d]``, then
            ``[d, r]``; all in one floating dtype, on the CPU.
        bias: b ``[d]``, in the same dtype.
        digest: SHA-256 of them, as hexadecimal digits.

    Raises:
        ValueError: they don't fit each other.
    """

    begin: int
    end: int
    factors: tuple[torch.Tensor, ...] = field(repr=False)
    bias: torch.Tensor = field(repr=False)
    digest: str = field(init=False)
    _maps: dict[tuple[torch.device, torch.dtype, bool], Map] = field(
        init=False, repr=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.end:
            raise ValueError(f"a stand-in for layers {self.begin}–{self.end - 1}")
        size = self.bias.numel()
        inner = [self.factors[0].shape[0]] if len(self.factors) == 2 else []
        sizes = [size, *inner, size]
        shapes = [(sizes[i + 1], sizes[i]) for i in range(len(sizes) - 1)]
        if [tuple(factor.shape) for factor in self.factors] != shapes or self.bias.ndim != 1:
            raise ValueError("a stand-in's factors and bias don't fit each other")
        dtypes = {tensor.dtype for tensor in self.tensors}
        if len(dtypes) > 1 or not self.bias.is_floating_point():
            raise ValueError("a stand-in's tensors are of one floating dtype")
        object.__setattr__(self, "digest", self._hash())

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The factors and the bias."""
        return (*self.factors, self.bias)

    @property
    def size(self) -> int:
        """d, features of the residual stream."""
        return self.bias.numel()

    @property
    def rank(self) -> int | None:
        """r; None where it is not bounded."""
        return self.factors[0].shape[0] if len(self.factors) == 2 else None

    @property
    def share(self) -> float:
        """Weights as a share of those of a map of full rank, which is what its time goes by."""
        return sum(factor.numel() for factor in self.factors) / self.size**2

    @property
    def layers(self) -> range:
        """The layers it stands for."""
        return range(self.begin, self.end)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StandIn) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def on(self, device: torch.device, dtype: torch.dtype, packed: bool) -> Map:
        """The map to be run; made once for each place and kept as long as this object, so that
        what was recorded with it stays valid."""
        key = (device, dtype, packed)
        if key not in self._maps:
            *factors, bias = (tensor.to(device, dtype, copy=True) for tensor in self.tensors)
            self._maps[key] = Map(tuple(factors), bias, packed)
        return self._maps[key]

    @property
    def _key(self) -> tuple[int, int, str]:
        return self.begin, self.end, self.digest

    def _hash(self) -> str:
        found = hashlib.sha256()
        for tensor in self.tensors:
            found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()
