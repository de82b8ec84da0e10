"""What the native forward reads of a Llama-like model's layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from conflayers_cli.kernels.int4_linear import GROUP_SIZE
from conflayers_cli.kernels.native_weights import (
    NativeWeight,
    pack,
    read_rows,
    round_packed,
    unpack,
)
from conflayers_cli.kernels.packed_linear import (
    MergedLinearPart,
    PackedWeight,
    can_merge,
    is_plain,
)
from conflayers_cli.models.support import attention_kinds


class NativeLinear(PackedWeight):
    """`PackedWeight` in the order of the native library, which also computes its products.

    ``native``: the weight, where it is known already; None: it is the layers' own.
    """

    def __init__(
        self,
        linears: Sequence[nn.Linear],
        keep: bool = False,
        native: NativeWeight | None = None,
    ) -> None:
        self._native = native
        super().__init__(linears, keep)

    @property
    def native(self) -> NativeWeight:
        if self._native is None:
            raise ValueError("a weight that is not packed yet")
        return self._native

    def pack(self, weight: torch.Tensor) -> None:
        self._native = self._native or pack(weight, self.bias)

    def pack_again(self) -> None:
        """The weight is shared: it never changes."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.native(x)

    def dense(self) -> torch.Tensor:
        return unpack(self.native).to(self.linears[0].weight.dtype)

    def embedding(self) -> nn.Module:
        return NativeEmbedding(self.native, self.linears[0].weight.dtype)

    @property
    def bits(self) -> int | None:
        return self.native.bits

    @property
    def nbytes(self) -> int:
        return self.native.nbytes


class NativeEmbedding(nn.Module):
    """Rows of a packed weight, in place of an embedding."""

    def __init__(self, native: NativeWeight, dtype: torch.dtype) -> None:
        super().__init__()
        self.native = native
        self._dtype = dtype

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 ``[...] → [..., d]``."""
        rows = read_rows(self.native, tokens.reshape(-1)).to(self._dtype)
        return rows.view(*tokens.shape, self.native.cols)

    def __deepcopy__(self, memo: dict[int, Any]) -> NativeEmbedding:
        return NativeEmbedding(self.native, self._dtype)


PackFn = Callable[[Sequence[Any]], NativeWeight]
"""Makes the packed weight of linear layers of one input."""


@dataclass(frozen=True, eq=False)
class NativeLayer:
    """The weights of one layer."""

    qkv: NativeWeight
    output: NativeWeight
    gate_up: NativeWeight
    down: NativeWeight

    def quantized(self) -> NativeLayer:
        """The same in four bits, where a weight can be."""
        return NativeLayer(
            *(to_int4(each) for each in (self.qkv, self.output, self.gate_up, self.down))
        )


def pack_linears(linears: Sequence[Any]) -> NativeWeight:
    """Linear layers of one input as one packed weight.

    Raises:
        ValueError: they aren't plain, or can't be one product.
    """
    if not all(map(is_plain, linears)) or not can_merge(linears):
        raise ValueError("layers that can't be one product")
    return pack(*merge_weights(linears))


def merge_weights(linears: Sequence[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weights of linear layers of one input side by side, and their biases."""
    weights = [linear.weight.detach() for linear in linears]
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    return weight, torch.cat(biases) if biases else None


def packed_before(linears: Sequence[Any]) -> NativeWeight:
    """The weight of linear layers of one input that are a `NativeLinear` of a packed model.

    Raises:
        ValueError: they are not.
    """
    found = {each.merged if isinstance(each, MergedLinearPart) else each for each in linears}
    product = found.pop()
    if found or not isinstance(product, NativeLinear) or len(product.sizes) != len(linears):
        raise ValueError("layers that are not packed together")
    return product.native


def to_int4(weight: NativeWeight) -> NativeWeight:
    """A weight in four bits; itself where it has them already, or can't have them."""
    if weight.bits == 4 or weight.cols % GROUP_SIZE:
        return weight
    return round_packed(weight)


def read_layer(layer: Any, pack: PackFn) -> NativeLayer:
    """The packed weights of a decoder layer.

    Raises:
        AttributeError, ValueError: it is built otherwise than its family's.
    """

    def merged(owner: Any, whole: str, parts: Sequence[str]) -> NativeWeight:
        if hasattr(owner, whole):  # Phi 3 has them in one
            return pack((getattr(owner, whole),))
        return pack([getattr(owner, part) for part in parts])

    attention, mlp = layer.self_attn, layer.mlp
    return NativeLayer(
        merged(attention, "qkv_proj", ("q_proj", "k_proj", "v_proj")),
        pack((attention.o_proj,)),
        merged(mlp, "gate_up_proj", ("gate_proj", "up_proj")),
        pack((mlp.down_proj,)),
    )


def windows_by_layer(config: Any, depth: int) -> list[int]:
    """The attention window of each layer; 0: it sees everything."""
    window = getattr(config, "sliding_window", None) or 0
    kinds = attention_kinds(config, depth)
    return [window if kind == "sliding_attention" else 0 for kind in kinds]
