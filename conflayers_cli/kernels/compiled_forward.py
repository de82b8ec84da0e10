"""The fused forward with what lies between its attention calls compiled (``torch.compile``).

The short operations between one layer's attention and the next one's (norms, rotations, activations
and sums) become a kernel or two. Weights are arguments, so all layers share what is compiled; only
passes of a few shapes are, those of single prompts, and PyTorch caches the results on disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from conflayers_cli.kernels.fused_forward import (
    AttentionFn,
    FusedForward,
    FusedLayer,
    PlainLinear,
    RMSNorm,
    RotaryCosSin,
    repeat_last,
)
from conflayers_cli.kernels.kv_cache import SlotLayer
from conflayers_cli.kernels.packed_linear import is_plain

MAX_SHAPES = 6
"""Shapes that are compiled; passes of others run uncompiled."""

_Linear = tuple[torch.Tensor, torch.Tensor | None]
"""Weight and bias."""
_Norm = tuple[torch.Tensor, torch.Tensor]
"""Weight and epsilon."""


class _LayerWeights(NamedTuple):
    attention_norm: _Norm
    qkv: _Linear
    output: _Linear
    mlp: tuple[_Norm, _Linear, _Linear]  # norm, gate and up, down


class CompiledForward(FusedForward):
    """The forward of one model, compiled with a backend of ``torch.compile``.

    Attributes:
        seconds: spent on compiling: the first pass of each kind.

    Raises:
        AttributeError, KeyError, ValueError: as for `FusedForward`; or there are norms elsewhere
            than before each sub-layer, another activation than SiLU, or weights that aren't plain.
    """

    def __init__(
        self, model: Any, layers: Sequence[nn.Module], config: Any, backend: str = "inductor"
    ) -> None:
        super().__init__(model, layers, config)
        self._compilable = {id(layer): _read_weights(layer) for layer in self.layers}

        def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
            # PyTorch counts shapes per code object: each model gets a copy of its own.
            function = cast(FunctionType, function)
            own = FunctionType(function.__code__.replace(), function.__globals__)
            return torch.compile(own, dynamic=False, fullgraph=True, backend=backend)

        self._before_attention, self._mlp_alone = compiled(_before_attention), compiled(_mlp)
        self._after_attention = compiled(_after_attention)
        self._after_attention_with_mlp = compiled(_after_attention_with_mlp)
        self._shapes: set[torch.Size] = set()
        self._begun: set[tuple[torch.Size, tuple[bool, bool]]] = set()
        self.seconds = 0.0

    def _rotary(self, x: torch.Tensor, positions: torch.Tensor) -> RotaryCosSin:
        """Of all tokens, so that no compiled shape depends on the number of positions."""
        rotary = super()._rotary(x, repeat_last(positions, x.shape[1]))
        return rotary._replace(num_positions=positions.shape[1])

    def _layer(
        self,
        layer: FusedLayer,
        x: torch.Tensor,
        rotary: RotaryCosSin,
        attend: AttentionFn,
        cached: SlotLayer,
        runs: tuple[bool, bool],
    ) -> torch.Tensor:
        weights = self._compilable.get(id(layer))
        too_many = x.shape not in self._shapes and len(self._shapes) == MAX_SHAPES
        cos, sin, num_positions = rotary
        if too_many or weights is None:  # another shape, or four-bit weights
            rotary = RotaryCosSin(
                cos[:, :, :num_positions], sin[:, :, :num_positions], num_positions
            )
            return super()._layer(layer, x, rotary, attend, cached, runs)
        self._shapes.add(x.shape)
        first = (x.shape, runs) not in self._begun
        self._begun.add((x.shape, runs))
        begin = time.perf_counter()
        if runs[0]:
            states = self._before_attention(
                x, weights.attention_norm, weights.qkv, cos, sin, self.heads, self.kv_heads
            )
            query, key, value = (each[:, :, :num_positions] for each in states)
            keys, values = cached.update(key, value)
            out = attend(query, keys, values, scaling=layer.scaling).flatten(2)
            out = repeat_last(out, x.shape[1])
            if runs[1]:
                x = self._after_attention_with_mlp(x, out, weights.output, *weights.mlp)
            else:
                x = self._after_attention(x, out, weights.output)
        elif runs[1]:
            x = self._mlp_alone(x, *weights.mlp)
        if first:
            self.seconds += time.perf_counter() - begin
        return x


def _read_weights(layer: FusedLayer) -> _LayerWeights:
    before_attention, before_mlp = layer.before_attention, layer.before_mlp
    others = (layer.query_norm, layer.key_norm, layer.after_attention, layer.after_mlp)
    if before_attention is None or before_mlp is None or any(norm is not None for norm in others):
        raise ValueError("norms in places that are not compiled")
    if layer.activation is not F.silu:
        raise ValueError("an activation that is not compiled")
    return _LayerWeights(
        _read_norm(before_attention),
        _read_linear(layer.qkv),
        _read_linear(layer.output),
        (_read_norm(before_mlp), _read_linear(layer.gate_up), _read_linear(layer.down)),
    )


def _read_norm(norm: RMSNorm) -> _Norm:
    return norm.weight.detach(), norm.epsilon


def _read_linear(linear: Any) -> _Linear:
    if not (isinstance(linear, PlainLinear) or is_plain(linear)):
        raise ValueError("weights that are not plain")
    return linear.weight.detach(), None if linear.bias is None else linear.bias.detach()


def _rms_norm(x: torch.Tensor, norm: _Norm) -> torch.Tensor:
    """RMSNorm, rounded where transformers rounds."""
    weight, epsilon = norm
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return wide.to(x.dtype) * weight


def _before_attention(
    x: torch.Tensor,
    norm: _Norm,
    qkv: _Linear,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    kv_heads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values ``[B, H, T, D]``, rotated."""
    head_dim = cos.shape[-1]
    product = F.linear(_rms_norm(x, norm), *qkv)
    states = product.view(*x.shape[:2], -1, head_dim).transpose(1, 2)
    query_key, value = states.split((heads + kv_heads, kv_heads), dim=1)
    rotated = query_key * cos + query_key.roll(head_dim // 2, -1) * sin
    query, key = rotated.split((heads, kv_heads), dim=1)
    return query, key, value


def _after_attention(x: torch.Tensor, attended: torch.Tensor, output: _Linear) -> torch.Tensor:
    return x + F.linear(attended, *output)


def _after_attention_with_mlp(
    x: torch.Tensor,
    attended: torch.Tensor,
    output: _Linear,
    norm: _Norm,
    gate_up: _Linear,
    down: _Linear,
) -> torch.Tensor:
    return _mlp(x + F.linear(attended, *output), norm, gate_up, down)


def _mlp(x: torch.Tensor, norm: _Norm, gate_up: _Linear, down: _Linear) -> torch.Tensor:
    gate, up = F.linear(_rms_norm(x, norm), *gate_up).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, *down)


@dataclass(frozen=True)
class CompileResult:
    """Whether a compiled forward is used, why (one sentence), and the seconds spent on it."""

    used: bool
    reason: str
    seconds: float = 0.0
