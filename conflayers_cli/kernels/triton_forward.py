"""The fused forward on a GPU with one launch for all that lies between a layer's products.

A layer is ten launches (four products, two of attention, and four of
:mod:`conflayers_cli.kernels.triton_ops`) in place of some thirty. What a sub-layer adds to the
residual stream is added by the norm that comes next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from conflayers_cli.kernels.flash_decode import why_no_triton
from conflayers_cli.kernels.fused_forward import (
    AttentionFn,
    FusedForward,
    FusedLayer,
    RMSNorm,
    RotaryCosSin,
    repeat_last,
)
from conflayers_cli.kernels.int4_linear import Int4Weights
from conflayers_cli.kernels.kv_cache import KVCache, SlotLayer
from conflayers_cli.skip_plan import SkipPlan

if TYPE_CHECKING:
    from conflayers_cli.kernels.triton_ops import NormParams

MAX_FEATURES = 16384
"""Of a token: a program of the norm's kernel holds all of them."""


class KernelForward(FusedForward):
    """The forward of one model for which :meth:`unsupported_reason` is None.

    Models whose norms follow the sub-layers (OLMo 2) run as in the class above. Raises as that
    does, or ImportError without triton.
    """

    def __init__(self, model: Any, layers: Sequence[nn.Module], config: Any) -> None:
        super().__init__(model, layers, config)
        # Only here is triton needed.
        from conflayers_cli.kernels import triton_ops

        self._add_norm, self._silu_and_mul = triton_ops.add_norm, triton_ops.silu_and_mul
        self._rotate_and_write = triton_ops.rotate_and_write

        def read(norm: RMSNorm) -> NormParams:
            return triton_ops.NormParams(norm.weight, float(norm.epsilon))

        self._last = read(self.norm)
        self._norms = tuple(
            (read(layer.before_attention), read(layer.before_mlp))
            for layer in self.layers
            if layer.before_attention and layer.before_mlp
        )
        self._head_norms = tuple(
            (read(layer.query_norm), read(layer.key_norm))
            if layer.query_norm and layer.key_norm
            else None
            for layer in self.layers
        )
        norms_all_heads = any(self._head_norms) and not self.norm_per_head
        self._supported = len(self._norms) == len(self.layers) and not norms_all_heads

    @staticmethod
    def unsupported_reason(device: torch.device, dtype: torch.dtype, config: Any) -> str | None:
        """Why this can't be used for a model with this text config; None: it can."""
        if config.hidden_size > MAX_FEATURES:
            return f"supported are up to {MAX_FEATURES} features, not {config.hidden_size}"
        return why_no_triton(device, dtype)

    def __call__(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attend: Mapping[str, AttentionFn],
        cache: KVCache,
        plan: SkipPlan,
        keep: int,
        int4: Int4Weights | None = None,
    ) -> torch.Tensor:
        if not self._supported:
            return super().__call__(tokens, positions, attend, cache, plan, keep, int4)
        x = self.embedding(tokens)
        rotary = self._rotary(x, positions)
        skipped_attention, skipped_mlp = set(plan.attention), set(plan.mlp)
        # What the last sub-layer gave; the next norm adds it to x.
        delta: torch.Tensor | None = None
        layers, head = self._weights(int4)
        for i, layer in enumerate(layers):
            before_attention, before_mlp = self._norms[i]
            cached: SlotLayer = cache.layers[i]
            if i not in skipped_attention:
                qkv = layer.qkv(self._add_norm(x, delta, before_attention))
                query = self._query(qkv, rotary, cached, self._head_norms[i])
                kv_len = cached.current.kv_len
                keys, values = cached.keys[:, :, :kv_len], cached.values[:, :, :kv_len]
                out = attend[layer.kind](query, keys, values, scaling=layer.scaling).flatten(2)
                delta = layer.output(repeat_last(out, tokens.shape[1]))
            if i not in skipped_mlp:
                normed = self._add_norm(x, delta, before_mlp)
                delta = layer.down(self._activate(layer, layer.gate_up(normed)))
        return head(self._add_norm(x, delta, self._last, keep))

    def _query(
        self,
        qkv: torch.Tensor,
        rotary: RotaryCosSin,
        cached: SlotLayer,
        norms: tuple[NormParams, NormParams] | None,
    ) -> torch.Tensor:
        """Rotated queries ``[B, Hq, P, D]``; keys and values are written to the cache."""
        if not cached.is_initialized:
            like = qkv.new_empty((qkv.shape[0], self.kv_heads, 0, self.head_dim))
            cached.lazy_initialization(like, like)
        return self._rotate_and_write(
            qkv,
            cos=rotary.cos,
            sin=rotary.sin,
            slots=cached.current.slots,
            keys=cached.keys,
            values=cached.values,
            heads=self.heads,
            norms=norms,
        )

    def _activate(self, layer: FusedLayer, gate_up: torch.Tensor) -> torch.Tensor:
        if layer.activation is F.silu:
            return self._silu_and_mul(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return layer.activation(gate).mul_(up)
