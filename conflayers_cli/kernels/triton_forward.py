"""The fused forward on a GPU: what stands between a layer's products is one launch each.

A layer is ten launches (four products, two of attention, and four of :mod:`conflayers_cli.kernels.triton_ops`) in place of
some thirty. What a sub-layer adds to the residual stream is added by the norm that comes next.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from conflayers_cli.kernels import fused_forward
from conflayers_cli.kernels.fused_forward import Attend, FusedForward, Layer, Turns
from conflayers_cli.kernels.int4_linear import Int4Weights
from conflayers_cli.kernels.kv_cache import KVCache, SlotLayer
from conflayers_cli.skip_plan import SkipPlan

if TYPE_CHECKING:
    from conflayers_cli.kernels.triton_ops import Norm

MOST_FEATURES = 16384
"""Of a row: a program of the norm's kernel holds a whole one."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_AMPERE = (8, 0)


class KernelForward(FusedForward):
    """The forward of one model, of which :meth:`why_not` has nothing to say.

    Models whose norms stand behind the sub-layers (OLMo 2) run as in the class above.

    Args:
        model: a causal language model of one of :data:`.fused.FAMILIES`, on a GPU.
        layers: its decoder layers.
        config: its text config.

    Raises:
        AttributeError, KeyError, ValueError: the model is put together otherwise than its family.
        ImportError: triton isn't installed.
    """

    def __init__(self, model: Any, layers: Sequence[nn.Module], config: Any) -> None:
        super().__init__(model, layers, config)
        # Only here is triton needed.
        from conflayers_cli.kernels import triton_ops

        self._add_norm = triton_ops.add_norm
        self._rotate_and_write = triton_ops.rotate_and_write
        self._gated = triton_ops.gated

        def read(norm: fused_forward.Norm) -> Norm:
            return triton_ops.Norm(norm.weight, float(norm.epsilon))

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
        over_all_heads = any(self._head_norms) and not self.norm_heads
        self._known = len(self._norms) == len(self.layers) and not over_all_heads

    @staticmethod
    def why_not(device: torch.device, dtype: torch.dtype, config: Any) -> str | None:
        """Why this can't be used, in words that follow "because"; None: it can be.

        Args:
            device: the model's.
            dtype: the model's.
            config: its text config.
        """
        hidden = int(config.hidden_size)
        if device.type != "cuda" or torch.version.hip is not None:
            return "the layer kernels need an NVIDIA GPU"
        if dtype not in _DTYPES:
            name = str(dtype).removeprefix("torch.")
            return f"the layer kernels take float32, float16 and bfloat16, not {name}"
        if hidden > MOST_FEATURES:
            return f"the layer kernels take up to {MOST_FEATURES} features, not {hidden}"
        if importlib.util.find_spec("triton") is None:
            return "the layer kernels need triton, which isn't installed"
        if torch.cuda.get_device_capability(device) < _AMPERE:
            return "the layer kernels need a GPU of compute capability 8.0 or later"
        return None

    def __call__(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attend: Mapping[str, Attend],
        cache: KVCache,
        plan: SkipPlan,
        keep: int,
        int4: Int4Weights | None = None,
    ) -> torch.Tensor:
        if not self._known:
            return super().__call__(tokens, positions, attend, cache, plan, keep, int4)
        x = self.embedding(tokens)
        turns = self._turns(x, positions)
        only = next(iter(attend.values())) if len(attend) == 1 else None
        attention_out, mlp_out = set(plan.attention), set(plan.mlp)
        # What the last sub-layer gave; the next norm adds it to x.
        delta: torch.Tensor | None = None
        layers, head = self._products(plan, int4)
        for i, layer in enumerate(layers):
            before_attention, before_mlp = self._norms[i]
            if i not in attention_out:
                normed = self._add_norm(x, delta, before_attention)
                product = layer.qkv(normed)
                query = self._turn(product, turns, cache.layers[i], self._head_norms[i])
                own = attend[layer.kind] if only is None else only
                delta = self._attended(layer, query, own, cache.layers[i], tokens.shape[1])
            if i not in mlp_out:
                normed = self._add_norm(x, delta, before_mlp)
                delta = layer.down(self._activated(layer, layer.gate_up(normed)))
        return head(self._add_norm(x, delta, self._last, keep))

    def _turn(
        self,
        product: torch.Tensor,
        turns: Turns,
        cached: SlotLayer,
        norms: tuple[Norm, Norm] | None,
    ) -> torch.Tensor:
        """Rotated queries ``[B, Hq, P, D]``; keys and values go straight to the cache's memory."""
        if not cached.is_initialized:
            like = product.new_empty((product.shape[0], self.shared, 0, self.size))
            cached.lazy_initialization(like, like)
        places = cached.writes.slots, cached.keys, cached.values
        return self._rotate_and_write(product, turns.cos, turns.sin, *places, self.heads, norms)

    def _attended(
        self, layer: Layer, query: torch.Tensor, attend: Attend, cached: SlotLayer, tokens: int
    ) -> torch.Tensor:
        """What attention adds to the residual stream, ``[B, T, H]``."""
        batch, _, own, _ = query.shape
        extent = cached.writes.extent
        keys, values = cached.keys[:, :, :extent], cached.values[:, :, :extent]
        rows = attend(query, keys, values, scaling=layer.scaling).reshape(batch, own, -1)
        if own < tokens:
            rows = torch.cat([rows, rows[:, -1:].expand(-1, tokens - own, -1)], dim=1)
        return layer.output(rows)

    def _activated(self, layer: Layer, product: torch.Tensor) -> torch.Tensor:
        if layer.activation is F.silu:
            return self._gated(product)
        gate, up = product.chunk(2, dim=-1)
        return layer.activation(gate).mul_(up)
