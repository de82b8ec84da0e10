"""A forward of our own for the Llama-like majority: the same arithmetic in fewer operations.

A pass over a few tokens is short, so what stands between the matrix products counts: transformers'
modules spend a fifth to a third of it on small operations and on Python. Here q, k and v are one
product, gate and up another, both rotations one, and layers are left out by not running them.

The model stays what it is: this reads its modules' weights and is used only where its logits equal
those of the modules (checked when a model is opened). Whoever changes modules for a while
(:class:`conflayers_cli.engine.layer_skipping.LayerStack`) gets the modules.
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
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.kernels.packed_linear import PackedLinear, alike, is_plain
from conflayers_cli.skip_plan import SkipPlan

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2"})
"""Model types whose layers this knows: RMSNorm, rotary positions, gated MLP."""

Product = Callable[[torch.Tensor], torch.Tensor]


class Attend(Protocol):
    """Attention of a pass: it knows what each token may see.

    Of queries ``[B, Hq, T, D]`` over keys and values ``[B, Hkv, S, D]`` it gives ``[B, T, Hq, D]``.
    """

    def __call__(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scaling: float
    ) -> torch.Tensor: ...


class Norm:
    """RMSNorm, rounded where transformers rounds."""

    def __init__(self, module: Any) -> None:
        if next(module.children(), None) is not None:
            raise ValueError("a norm with an adapter around it")
        self.weight = module.weight
        self.share = 1.0 / self.weight.shape[-1]
        self.epsilon = torch.tensor(float(module.variance_epsilon), device=self.weight.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.float32)
        scale = torch.addcmul(self.epsilon, norm, norm, value=self.share).rsqrt_()
        return torch.mul(x, scale).to(x.dtype).mul_(self.weight)


@dataclass(frozen=True)
class Plain:
    """A product with plain weights ``[out, in]``."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return F.linear(rows, self.weight, self.bias)


@dataclass(frozen=True)
class Layer:
    """What one layer computes with. Norms stand before a sub-layer or behind it."""

    kind: str
    before_attention: Norm | None
    qkv: Product
    query_norm: Norm | None
    key_norm: Norm | None
    scaling: float
    output: Product
    after_attention: Norm | None
    before_mlp: Norm | None
    gate_up: Product
    activation: Callable[[torch.Tensor], torch.Tensor]
    down: Product
    after_mlp: Norm | None


class Turns(NamedTuple):
    """The rotation of a pass.

    Attributes:
        cos, sin: ``[B, 1, T, D]``, the latter with the sign that half the features need.
        own: how many of a sequence's tokens have places of their own; the others repeat the last.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    own: int


class FusedForward:
    """The forward of one model.

    Args:
        model: a causal language model of one of :data:`FAMILIES`.
        layers: its decoder layers.
        config: its text config.

    Raises:
        AttributeError, KeyError, ValueError: the model is put together otherwise than its family.
    """

    def __init__(self, model: Any, layers: Sequence[nn.Module], config: Any) -> None:
        decoder = model.get_decoder()
        self.embedding = model.get_input_embeddings()
        self.rotary = decoder.rotary_emb
        self.norm = Norm(decoder.norm)
        self.head = _product(model.get_output_embeddings())
        self.heads = int(config.num_attention_heads)
        self.shared = int(config.num_key_value_heads)
        self.size = int(getattr(config, "head_dim", None) or config.hidden_size // self.heads)
        # Qwen 3 norms each head's queries and keys; OLMo 2 all heads' together.
        self.norm_heads = config.model_type == "qwen3"
        silu = config.hidden_act in ("silu", "swish")
        activation = F.silu if silu else ACT2FN[config.hidden_act]
        kinds = getattr(config, "layer_types", None)
        window = "sliding_attention" if getattr(config, "sliding_window", None) else ""
        self.layers = tuple(
            _read_layer(layer, kinds[i] if kinds else window or "full_attention", activation)
            for i, layer in enumerate(layers)
        )
        self._rounded: tuple[Int4Weights, tuple[Layer, ...], Product] | None = None

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
        """Logits ``[B, keep, V]`` of the last ``keep`` tokens (0: of all).

        Args:
            tokens: ``[B, T]``. There may be more of them than positions: they repeat the last one,
                and are there so that products have enough rows (see
                `.batch_invariance`). Attention needs no more rows than there are positions.
            positions: ``[B, P]``, P ≤ T.
            attend: attention of the positions' tokens by kind of layer; one entry serves all kinds.
            cache: has been told where the positions are written.
            plan: what is left out.
            keep: see above.
            int4: the weights of a plan that asks for them.
        """
        x = self.embedding(tokens)
        turns = self._turns(x, positions)
        only = next(iter(attend.values())) if len(attend) == 1 else None
        attention_out, mlp_out = set(plan.attention), set(plan.mlp)
        layers, head = self._products(plan, int4)
        for i, layer in enumerate(layers):
            own = attend[layer.kind] if only is None else only
            kept = i not in attention_out, i not in mlp_out
            x = self._through(layer, x, turns, own, cache.layers[i], kept)
        return head(self.norm(x[:, -keep:] if keep else x))

    def _products(
        self, plan: SkipPlan, int4: Int4Weights | None
    ) -> tuple[tuple[Layer, ...], Product]:
        """The layers and the output embedding, with the weights that the plan asks for."""
        if plan.weights is None or int4 is None or int4.reason is not None:
            return self.layers, self.head
        if self._rounded is None or self._rounded[0] is not int4:
            names = ("qkv", "output", "gate_up", "down")
            layers = (
                replace(layer, **{name: int4.product(getattr(layer, name)) for name in names})
                for layer in self.layers
            )
            self._rounded = int4, tuple(layers), int4.head(self.head)
        return self._rounded[1:]

    def _through(
        self,
        layer: Layer,
        x: torch.Tensor,
        turns: Turns,
        attend: Attend,
        cached: Any,
        kept: tuple[bool, bool],
    ) -> torch.Tensor:
        """A layer with its attention and its MLP, as far as they are kept."""
        attention, mlp = kept
        if attention:
            x = self._attention(layer, x, turns, attend, cached).add_(x)
        return self._mlp(layer, x).add_(x) if mlp else x

    def _turns(self, x: torch.Tensor, positions: torch.Tensor) -> Turns:
        """The rotation of tokens ``x`` of which those at the positions have places."""
        cos, sin = self.rotary(x, positions)
        if cos.shape[-1] != self.size:
            raise ValueError("only part of each head is rotated")
        sin[..., : self.size // 2].neg_()
        return Turns(cos[:, None], sin[:, None], positions.shape[1])

    def _attention(
        self,
        layer: Layer,
        x: torch.Tensor,
        turns: Turns,
        attend: Attend,
        cached: Any,
    ) -> torch.Tensor:
        batch, tokens, _ = x.shape
        product = layer.qkv(layer.before_attention(x) if layer.before_attention else x)
        cos, sin, own = turns
        # Norms before the repeated rows go: on a GPU a sum's order depends on how many there are.
        if layer.query_norm is not None and layer.key_norm is not None:
            product = self._normed(layer.query_norm, layer.key_norm, product)
        if own < tokens:
            product = product[:, :own]
        states = product.view(batch, own, -1, self.size).transpose(1, 2)
        turning, value = states.split((self.heads + self.shared, self.shared), dim=1)
        turned = torch.addcmul(turning * cos, turning.roll(self.size // 2, -1), sin).to(x.dtype)
        query, key = turned.split((self.heads, self.shared), dim=1)
        keys, values = cached.update(key, value)
        rows = attend(query, keys, values, scaling=layer.scaling).reshape(batch, own, -1)
        if own < tokens:
            rows = torch.cat([rows, rows[:, -1:].expand(-1, tokens - own, -1)], dim=1)
        product = layer.output(rows)
        return layer.after_attention(product) if layer.after_attention else product

    def _normed(self, query_norm: Norm, key_norm: Norm, product: torch.Tensor) -> torch.Tensor:
        """The product ``[B, T, ·]`` with its queries and keys normed."""
        sizes = [n * self.size for n in (self.heads, self.shared, self.shared)]
        parts = product.split(sizes, dim=-1)
        if self.norm_heads:
            query, key = (part.unflatten(-1, (-1, self.size)) for part in parts[:2])
            normed = query_norm(query).flatten(-2), key_norm(key).flatten(-2)
        else:
            normed = query_norm(parts[0]), key_norm(parts[1])
        return torch.cat((*normed, parts[2]), dim=-1)

    def _mlp(self, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        product = layer.gate_up(layer.before_mlp(x) if layer.before_mlp else x)
        gate, up = product.chunk(2, dim=-1)
        product = layer.down(layer.activation(gate).mul_(up))
        return layer.after_mlp(product) if layer.after_mlp else product


def _read_layer(layer: Any, kind: str, activation: Callable[[torch.Tensor], torch.Tensor]) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    post_norms = hasattr(layer, "post_feedforward_layernorm")

    def norm(owner: Any, name: str) -> Norm | None:
        return Norm(getattr(owner, name)) if hasattr(owner, name) else None

    def joined(owner: Any, whole: str, parts: Sequence[str]) -> Product:
        if hasattr(owner, whole):  # Phi 3 has them in one
            return _product(getattr(owner, whole))
        return _joined([getattr(owner, part) for part in parts])

    return Layer(
        kind=kind,
        before_attention=None if post_norms else Norm(layer.input_layernorm),
        qkv=joined(attention, "qkv_proj", ("q_proj", "k_proj", "v_proj")),
        query_norm=norm(attention, "q_norm"),
        key_norm=norm(attention, "k_norm"),
        scaling=float(attention.scaling),
        output=_product(attention.o_proj),
        after_attention=Norm(layer.post_attention_layernorm) if post_norms else None,
        before_mlp=None if post_norms else Norm(layer.post_attention_layernorm),
        gate_up=joined(mlp, "gate_up_proj", ("gate_proj", "up_proj")),
        activation=activation,
        down=_product(mlp.down_proj),
        after_mlp=Norm(layer.post_feedforward_layernorm) if post_norms else None,
    )


def _product(linear: Any) -> Product:
    """A layer's product, without the module around it where that is no more than its packing."""
    if isinstance(linear, PackedLinear) and len(linear.joint.sizes) == 1:
        return linear.joint
    product: Product = linear
    return product


def _joined(linears: Sequence[Any]) -> Product:
    """One product for several layers of one input; their weights become views of one tensor."""
    if all(isinstance(linear, PackedLinear) for linear in linears):
        packed = {linear.joint for linear in linears}
        if len(packed) > 1:
            raise ValueError("packed apart")
        product: Product = packed.pop()
        return product
    if not all(map(is_plain, linears)):  # quantised: a kernel takes one of them
        return lambda rows: torch.cat([linear(rows) for linear in linears], dim=-1)
    if not alike(linears):
        raise ValueError("layers that can't be one product")
    weight = _joined_before(linears)
    if weight is None:
        weight = torch.cat([linear.weight.detach() for linear in linears])
        sizes = [linear.out_features for linear in linears]
        for linear, view in zip(linears, weight.split(sizes), strict=True):
            linear.weight = nn.Parameter(view, requires_grad=False)
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    bias = torch.cat(biases) if biases else None
    return Plain(weight, bias)


def _joined_before(linears: Sequence[Any]) -> torch.Tensor | None:
    """The tensor that the layers' weights are views of, one behind the other; None: there is none.

    A second forward of the same model must not take its memory again.
    """
    first, end = linears[0].weight.detach(), 0
    for linear in linears:
        own = linear.weight
        if (
            not own.is_contiguous()
            or own.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            or own.storage_offset() != first.storage_offset() + end
        ):
            return None
        end += own.numel()
    rows = sum(linear.out_features for linear in linears)
    whole: torch.Tensor = first.as_strided((rows, first.shape[1]), (first.shape[1], 1))
    return whole


def repeated(row: torch.Tensor, width: int) -> torch.Tensor:
    """``[B, T]`` with the last column repeated up to ``[B, width]``."""
    return torch.cat([row, row[:, -1:].expand(-1, width - row.shape[1])], dim=1)
