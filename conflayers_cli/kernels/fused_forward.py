"""A forward for Llama-like models: the same arithmetic in fewer operations.

transformers' modules spend a fifth to a third of a short pass on small operations and on Python.
Here q, k and v are one product, gate and up another, both rotations one, and a skipped sub-layer is
not run. The model's own weights are used, and only where the logits equal those of the modules
(checked when a model is opened). While modules are observed or replaced
(:class:`conflayers_cli.engine.layer_skipping.LayerStack`) the modules run instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from conflayers_cli.kernels.int4_linear import Int4Weights
from conflayers_cli.kernels.kv_cache import KVCache, SlotLayer
from conflayers_cli.kernels.packed_linear import MergedLinearPart, can_merge, is_plain
from conflayers_cli.models.support import attention_kinds
from conflayers_cli.skip_plan import SkipPlan

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2"})
"""Supported model types: RMSNorm, rotary positions, gated MLP."""

LinearFn = Callable[[torch.Tensor], torch.Tensor]


class AttentionFn(Protocol):
    """Attention of a pass: queries ``[B, Hq, T, D]``, keys and values ``[B, Hkv, S, D]`` →
    ``[B, T, Hq, D]``. What each token sees is bound to it."""

    def __call__(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scaling: float
    ) -> torch.Tensor: ...


class RMSNorm:
    """RMSNorm, rounded where transformers rounds."""

    def __init__(self, module: Any) -> None:
        if next(module.children(), None) is not None:
            raise ValueError("a norm with an adapter around it")
        self.weight = module.weight
        self.inverse_size = 1.0 / self.weight.shape[-1]
        self.epsilon = torch.tensor(float(module.variance_epsilon), device=self.weight.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.float32)
        scale = torch.addcmul(self.epsilon, norm, norm, value=self.inverse_size).rsqrt_()
        return torch.mul(x, scale).to(x.dtype).mul_(self.weight)


@dataclass(frozen=True)
class PlainLinear:
    """A product with plain weights ``[out, in]``."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class FusedLayer:
    """What one layer computes with. A sub-layer has a norm before or after it."""

    kind: str
    before_attention: RMSNorm | None
    qkv: LinearFn
    query_norm: RMSNorm | None
    key_norm: RMSNorm | None
    scaling: float
    output: LinearFn
    after_attention: RMSNorm | None
    before_mlp: RMSNorm | None
    gate_up: LinearFn
    activation: Callable[[torch.Tensor], torch.Tensor]
    down: LinearFn
    after_mlp: RMSNorm | None


class RotaryCosSin(NamedTuple):
    """The rotary embedding of a pass.

    Attributes:
        cos, sin: ``[B, 1, P, D]``; sin is negated in the first half of the features.
        num_positions: P, the tokens that are not repeats of the last one.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    num_positions: int


class FusedForward:
    """The forward of one model of :data:`FAMILIES`, from its decoder layers and text config.

    Raises:
        AttributeError, KeyError, ValueError: the model is built otherwise than its family.
    """

    def __init__(self, model: Any, layers: Sequence[nn.Module], config: Any) -> None:
        decoder = model.get_decoder()
        self.embedding = model.get_input_embeddings()
        self.rotary = decoder.rotary_emb
        self.norm = RMSNorm(decoder.norm)
        self.head = _linear_fn(model.get_output_embeddings())
        self.heads = int(config.num_attention_heads)
        self.kv_heads = int(config.num_key_value_heads)
        self.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // self.heads)
        # Qwen 3 norms each head's queries and keys; OLMo 2 all heads' together.
        self.norm_per_head = config.model_type == "qwen3"
        silu = config.hidden_act in ("silu", "swish")
        activation = F.silu if silu else ACT2FN[config.hidden_act]
        kinds = attention_kinds(config, len(layers))
        self.layers = tuple(
            _read_layer(layer, kinds[i], activation) for i, layer in enumerate(layers)
        )
        self._int4_layers: tuple[Int4Weights, tuple[FusedLayer, ...], LinearFn] | None = None

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
        """Logits ``[B, keep, V]`` of the last ``keep`` tokens (0: of all).

        Args:
            tokens: ``[B, T]``. Those beyond the positions repeat the last one, so that products
                have enough rows (see `.batch_invariance`); attention leaves them out.
            positions: ``[B, P]``, P ≤ T.
            attend: attention by kind of layer.
            cache: its slots are set.
            plan: the sub-layers left out.
            keep: see above.
            int4: the weights to use where there are any; None: the model's own.
        """
        x = self.embedding(tokens)
        rotary = self._rotary(x, positions)
        skipped_attention, skipped_mlp = set(plan.attention), set(plan.mlp)
        layers, head = self._weights(int4)
        for i, layer in enumerate(layers):
            runs = i not in skipped_attention, i not in skipped_mlp
            x = self._layer(layer, x, rotary, attend[layer.kind], cache.layers[i], runs)
        return head(self.norm(x[:, -keep:] if keep else x))

    def _weights(self, int4: Int4Weights | None) -> tuple[tuple[FusedLayer, ...], LinearFn]:
        """The layers and the output embedding, with four-bit weights where there are any."""
        if int4 is None or int4.reason is not None:
            return self.layers, self.head
        if self._int4_layers is None or self._int4_layers[0] is not int4:
            names = ("qkv", "output", "gate_up", "down")
            layers = (
                replace(layer, **{name: int4.product(getattr(layer, name)) for name in names})
                for layer in self.layers
            )
            self._int4_layers = int4, tuple(layers), int4.head(self.head)
        return self._int4_layers[1:]

    def _layer(
        self,
        layer: FusedLayer,
        x: torch.Tensor,
        rotary: RotaryCosSin,
        attend: AttentionFn,
        cached: SlotLayer,
        runs: tuple[bool, bool],
    ) -> torch.Tensor:
        """A layer; ``runs`` says whether its attention and its MLP do."""
        if runs[0]:
            x = self._attention(layer, x, rotary, attend, cached).add_(x)
        return self._mlp(layer, x).add_(x) if runs[1] else x

    def _rotary(self, x: torch.Tensor, positions: torch.Tensor) -> RotaryCosSin:
        cos, sin = self.rotary(x, positions)
        if cos.shape[-1] != self.head_dim:
            raise ValueError("only part of each head is rotated")
        sin[..., : self.head_dim // 2].neg_()
        return RotaryCosSin(cos[:, None], sin[:, None], positions.shape[1])

    def _attention(
        self,
        layer: FusedLayer,
        x: torch.Tensor,
        rotary: RotaryCosSin,
        attend: AttentionFn,
        cached: SlotLayer,
    ) -> torch.Tensor:
        batch, tokens, _ = x.shape
        qkv = layer.qkv(layer.before_attention(x) if layer.before_attention else x)
        cos, sin, num_positions = rotary
        # Norms before repeated tokens go: on a GPU a sum's order depends on how many there are.
        if layer.query_norm is not None and layer.key_norm is not None:
            qkv = self._norm_heads(layer.query_norm, layer.key_norm, qkv)
        states = qkv[:, :num_positions].view(batch, num_positions, -1, self.head_dim)
        query_key, value = states.transpose(1, 2).split(
            (self.heads + self.kv_heads, self.kv_heads), dim=1
        )
        rotated = torch.addcmul(query_key * cos, query_key.roll(self.head_dim // 2, -1), sin)
        query, key = rotated.to(x.dtype).split((self.heads, self.kv_heads), dim=1)
        keys, values = cached.update(key, value)
        out = attend(query, keys, values, scaling=layer.scaling).flatten(2)
        out = layer.output(repeat_last(out, tokens))
        return layer.after_attention(out) if layer.after_attention else out

    def _norm_heads(
        self, query_norm: RMSNorm, key_norm: RMSNorm, qkv: torch.Tensor
    ) -> torch.Tensor:
        """``[B, T, (Hq + 2 Hkv) D]`` with its queries and keys normed."""
        sizes = [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]
        query, key, value = qkv.split(sizes, dim=-1)
        if self.norm_per_head:
            query, key = (part.unflatten(-1, (-1, self.head_dim)) for part in (query, key))
            normed = query_norm(query).flatten(-2), key_norm(key).flatten(-2)
        else:
            normed = query_norm(query), key_norm(key)
        return torch.cat((*normed, value), dim=-1)

    def _mlp(self, layer: FusedLayer, x: torch.Tensor) -> torch.Tensor:
        gate_up = layer.gate_up(layer.before_mlp(x) if layer.before_mlp else x)
        gate, up = gate_up.chunk(2, dim=-1)
        out = layer.down(layer.activation(gate).mul_(up))
        return layer.after_mlp(out) if layer.after_mlp else out


def _read_layer(
    layer: Any, kind: str, activation: Callable[[torch.Tensor], torch.Tensor]
) -> FusedLayer:
    attention, mlp = layer.self_attn, layer.mlp
    post_norms = hasattr(layer, "post_feedforward_layernorm")

    def norm(name: str) -> RMSNorm | None:
        return RMSNorm(getattr(attention, name)) if hasattr(attention, name) else None

    def merged(owner: Any, whole: str, parts: Sequence[str]) -> LinearFn:
        if hasattr(owner, whole):  # Phi 3 has them in one
            return _linear_fn(getattr(owner, whole))
        return _merge([getattr(owner, part) for part in parts])

    return FusedLayer(
        kind=kind,
        before_attention=None if post_norms else RMSNorm(layer.input_layernorm),
        qkv=merged(attention, "qkv_proj", ("q_proj", "k_proj", "v_proj")),
        query_norm=norm("q_norm"),
        key_norm=norm("k_norm"),
        scaling=float(attention.scaling),
        output=_linear_fn(attention.o_proj),
        after_attention=RMSNorm(layer.post_attention_layernorm) if post_norms else None,
        before_mlp=None if post_norms else RMSNorm(layer.post_attention_layernorm),
        gate_up=merged(mlp, "gate_up_proj", ("gate_proj", "up_proj")),
        activation=activation,
        down=_linear_fn(mlp.down_proj),
        after_mlp=RMSNorm(layer.post_feedforward_layernorm) if post_norms else None,
    )


def _linear_fn(linear: Any) -> LinearFn:
    """A layer's product, without the module where it only wraps a packed weight."""
    alone = isinstance(linear, MergedLinearPart) and len(linear.merged.sizes) == 1
    product: LinearFn = linear.merged if alone else linear
    return product


def _merge(linears: Sequence[Any]) -> LinearFn:
    """One product for several layers of one input; their weights become views of one tensor."""
    if all(isinstance(linear, MergedLinearPart) for linear in linears):
        packed = {linear.merged for linear in linears}
        if len(packed) > 1:
            raise ValueError("packed apart")
        product: LinearFn = packed.pop()
        return product
    if not all(map(is_plain, linears)):  # quantised: a kernel takes one of them
        return lambda x: torch.cat([linear(x) for linear in linears], dim=-1)
    if not can_merge(linears):
        raise ValueError("layers that can't be one product")
    weight = _merged_before(linears)
    if weight is None:
        weight = torch.cat([linear.weight.detach() for linear in linears])
        sizes = [linear.out_features for linear in linears]
        for linear, view in zip(linears, weight.split(sizes), strict=True):
            linear.weight = nn.Parameter(view, requires_grad=False)
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    return PlainLinear(weight, torch.cat(biases) if biases else None)


def _merged_before(linears: Sequence[Any]) -> torch.Tensor | None:
    """The tensor that the layers' weights are adjacent views of, by an earlier forward of this
    model; None: there is none."""
    first = linears[0].weight.detach()
    storage, end = first.untyped_storage().data_ptr(), first.storage_offset()
    for linear in linears:
        weight = linear.weight
        here = weight.untyped_storage().data_ptr(), weight.storage_offset()
        if not weight.is_contiguous() or here != (storage, end):
            return None
        end += weight.numel()
    rows = sum(linear.out_features for linear in linears)
    whole: torch.Tensor = first.as_strided((rows, first.shape[1]), (first.shape[1], 1))
    return whole


def repeat_last(x: torch.Tensor, width: int) -> torch.Tensor:
    """``[B, T, …]`` with the last token repeated up to ``[B, width, …]``."""
    more = width - x.shape[1]
    return torch.cat([x, x[:, -1:].expand(-1, more, *x.shape[2:])], dim=1) if more else x
