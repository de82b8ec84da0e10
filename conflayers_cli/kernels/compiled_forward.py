"""The fused forward with what lies between its attention calls compiled (``torch.compile``).

What follows an attention call in one layer and what precedes it in the next are short operations
between matrix products: compiled, the norms, rotations, activations and sums of each stretch become
a kernel or two. Weights are arguments, so all layers share what is compiled; only passes of a few
shapes are, those of single texts, and PyTorch keeps the results on disk between runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from conflayers_cli.kernels.fused_forward import (
    Attend,
    FusedForward,
    Layer,
    Norm,
    Plain,
    Turns,
    repeated,
)
from conflayers_cli.kernels.packed_linear import is_plain

MOST_SHAPES = 6
"""Shapes that are compiled; passes of others run as they are."""

_Linear = tuple[torch.Tensor, torch.Tensor | None]
_Scale = tuple[torch.Tensor, torch.Tensor]


class CompiledForward(FusedForward):
    """The forward of one model, compiled.

    Args:
        model, layers, config: as for `FusedForward`.
        backend: of ``torch.compile``.

    Attributes:
        seconds: what compiling took, the first pass of each kind.

    Raises:
        AttributeError, KeyError, ValueError: as for `FusedForward`; or layers that are not what is
            compiled here: norms before each sub-layer, none of queries and keys, SiLU, plain
            weights.
    """

    def __init__(
        self, model: Any, layers: Sequence[nn.Module], config: Any, backend: str = "inductor"
    ) -> None:
        super().__init__(model, layers, config)
        self._weights = {id(layer): _weights_of(layer) for layer in self.layers}
        self._sizes = self.heads, self.shared, self.size

        def compiled(function: FunctionType) -> Callable[..., Any]:
            # PyTorch counts the shapes of a piece of code, whoever runs it: each model has its own.
            own = FunctionType(function.__code__.replace(), function.__globals__)
            return torch.compile(own, dynamic=False, fullgraph=True, backend=backend)

        enter, leave, through_mlp, mlp = (
            compiled(cast(FunctionType, each))
            for each in (_enter, _leave, _leave_through_mlp, _mlp)
        )
        self._enter, self._leave, self._mlp_alone = enter, {True: through_mlp, False: leave}, mlp
        self._shapes: set[torch.Size] = set()
        self._begun: set[tuple[torch.Size, bool, bool]] = set()
        self.seconds = 0.0

    def _turns(self, x: torch.Tensor, positions: torch.Tensor) -> Turns:
        """Of all tokens: so that no shape that is compiled depends on how many have places."""
        own = positions.shape[1]
        if own < x.shape[1]:
            positions = repeated(positions, x.shape[1])
        return super()._turns(x, positions)._replace(own=own)

    def _through(
        self,
        layer: Layer,
        x: torch.Tensor,
        turns: Turns,
        attend: Attend,
        cached: Any,
        kept: tuple[bool, bool],
    ) -> torch.Tensor:
        many = x.shape not in self._shapes and len(self._shapes) == MOST_SHAPES
        if many or id(layer) not in self._weights:  # other shapes, and rounded weights
            cos, sin, own = turns
            turns = Turns(cos[:, :, :own], sin[:, :, :own], own)
            return super()._through(layer, x, turns, attend, cached, kept)
        self._shapes.add(x.shape)
        kind = (x.shape, *kept)
        begin = None if kind in self._begun else time.perf_counter()
        self._begun.add(kind)
        x = self._compiled(layer, x, turns, attend, cached, kept)
        if begin is not None:
            self.seconds += time.perf_counter() - begin
        return x

    def _compiled(
        self,
        layer: Layer,
        x: torch.Tensor,
        turns: Turns,
        attend: Attend,
        cached: Any,
        kept: tuple[bool, bool],
    ) -> torch.Tensor:
        before, qkv, output, mlp = self._weights[id(layer)]
        attention, with_mlp = kept
        if not attention:
            return self._mlp_alone(x, *mlp) if with_mlp else x
        cos, sin, own = turns
        query, key, value = (
            states[:, :, :own] for states in self._enter(x, before, qkv, cos, sin, *self._sizes)
        )
        keys, values = cached.update(key, value)
        batch, tokens, _ = x.shape
        rows = attend(query, keys, values, scaling=layer.scaling).reshape(batch, own, -1)
        if own < tokens:
            rows = torch.cat([rows, rows[:, -1:].expand(-1, tokens - own, -1)], dim=1)
        return self._leave[with_mlp](x, rows, output, *(mlp if with_mlp else ()))


def _weights_of(layer: Layer) -> tuple[_Scale, _Linear, _Linear, tuple[_Scale, _Linear, _Linear]]:
    """(the norm, qkv and output of its attention; the norm, gate and up, and down of its MLP)."""
    before, behind = layer.before_attention, layer.before_mlp
    strange = (layer.query_norm, layer.key_norm, layer.after_attention, layer.after_mlp)
    if before is None or behind is None or any(norm is not None for norm in strange):
        raise ValueError("norms in places that are not compiled")
    if layer.activation is not F.silu:
        raise ValueError("an activation that is not compiled")
    mlp = _scale(behind), _linear(layer.gate_up), _linear(layer.down)
    return _scale(before), _linear(layer.qkv), _linear(layer.output), mlp


def _scale(norm: Norm) -> _Scale:
    return norm.weight.detach(), norm.epsilon


def _linear(product: Any) -> _Linear:
    if not (isinstance(product, Plain) or is_plain(product)):
        raise ValueError("weights that are not plain")
    weight, bias = product.weight, product.bias
    return weight.detach(), None if bias is None else bias.detach()


def _normed(x: torch.Tensor, scale: _Scale) -> torch.Tensor:
    """RMSNorm, rounded where transformers rounds."""
    weight, epsilon = scale
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return wide.to(x.dtype) * weight


def _enter(
    x: torch.Tensor,
    norm: _Scale,
    qkv: _Linear,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    shared: int,
    size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values ``[B, H, T, D]``, turned."""
    product = F.linear(_normed(x, norm), *qkv)
    states = product.view(*x.shape[:2], -1, size).transpose(1, 2)
    turning, value = states.split((heads + shared, shared), dim=1)
    turned = turning * cos + turning.roll(size // 2, -1) * sin
    query, key = turned.split((heads, shared), dim=1)
    return query, key, value


def _leave(x: torch.Tensor, rows: torch.Tensor, output: _Linear) -> torch.Tensor:
    return x + F.linear(rows, *output)


def _leave_through_mlp(
    x: torch.Tensor,
    rows: torch.Tensor,
    output: _Linear,
    norm: _Scale,
    gate_up: _Linear,
    down: _Linear,
) -> torch.Tensor:
    return _mlp(x + F.linear(rows, *output), norm, gate_up, down)


def _mlp(x: torch.Tensor, norm: _Scale, gate_up: _Linear, down: _Linear) -> torch.Tensor:
    gate, up = F.linear(_normed(x, norm), *gate_up).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, *down)


@dataclass(frozen=True)
class Compilation:
    """What came of it.

    Attributes:
        used: whether the compiled forward is used now.
        reason: which and why, for people.
        seconds: what compiling took, if it came to that.
    """

    used: bool
    reason: str
    seconds: float = 0.0
