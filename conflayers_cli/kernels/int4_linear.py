"""Draft passes with the layers' weights quantised to four bits.

A pass over one token takes the time in which its weights are read. In four bits and groups of 32,
each with a scale and a zero of its own, weights take a quarter to a third of their memory in half
precision, and draft nearly as well. Verification uses the model's own weights. (Self-speculation
with quantised weights: QuantSpec, arXiv 2502.10424, and QSpec, arXiv 2410.11305. Here it is a part
of the plan, searched for together with the sub-layers left out.)

The kernels are PyTorch's. Quantising the output embedding costs more agreement than all layers
together, so the few most likely tokens by it get the logits of the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import nn

from conflayers_cli.kernels.packed_linear import (
    MergedLinear,
    MergedLinearPart,
    PackedWeight,
    find_parent,
    is_plain,
)
from conflayers_cli.models.device import describe_spread
from conflayers_cli.models.peft_modules import packable, packable_children

GROUP_SIZE = 32
"""Inputs that share a scale and a zero."""
LEVELS = 16
MIN_MODEL_BYTES = 32 << 20
"""Weights below this lie in the processor's caches: fewer bytes are not quicker to read."""
RESCORED_TOKENS = 16
"""Tokens whose logits are computed with the output embedding as it is."""
_ROWS = 4096
"""Of a weight, quantised at a time: bounds what is held in float32."""
_TILES = 8
"""``innerKTiles`` of CUDA's kernel."""
_MULTIPLES = {"cpu": (16, GROUP_SIZE), "cuda": (8, 16 * _TILES)}
"""Rows and columns that the kernels take, as multiples of these."""
_MAX_ERROR = 0.02
"""Relative error of a kernel's product up to which it is taken for right."""


class Int4Linear(MergedLinear):
    """Products with a weight ``[out, in]`` in four bits, of layers with ``sizes`` outputs.

    Raises:
        RuntimeError: the device has no kernel for it.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, sizes: list[int]) -> None:
        super().__init__(weight.shape[1], sizes)
        self._bias = bias
        on_cpu = weight.device.type == "cpu"
        codes, self._scales = quantize_int4(weight)
        self._codes = _pack_codes(codes, on_cpu)
        ops = torch.ops.aten
        self._kernel: Callable[..., torch.Tensor] = (
            ops._weight_int4pack_mm_for_cpu if on_cpu else ops._weight_int4pack_mm
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in] → [..., out]``, in the dtype of ``x``."""
        flat = x.reshape(-1, x.shape[-1])
        product = self._kernel(flat, self._codes, GROUP_SIZE, self._scales)
        product = product.view(*x.shape[:-1], -1)
        return product if self._bias is None else product.add_(self._bias)


class Int4Head(MergedLinear):
    """Logits by an output embedding ``[V, d]`` in four bits, the highest of them computed again
    with the original, which stays in use; ``rows`` reads its rows: int64 ``[...] → [..., d]``."""

    def __init__(self, weight: torch.Tensor, rows: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__(weight.shape[1], [len(weight)])
        self._rows = rows
        self._int4 = Int4Linear(weight, None, self.sizes)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., d] → [..., V]``, in the dtype of ``x``."""
        logits = self._int4(x)
        top = logits.topk(min(RESCORED_TOKENS, logits.shape[-1]), dim=-1, sorted=False).indices
        exact = (self._rows(top) * x.unsqueeze(-2)).sum(-1)
        return logits.scatter_(-1, top, exact)


def quantize_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight's codes and scales: ``weight ≈ (code - 8) · scale + zero``.

    Each group of `GROUP_SIZE` inputs is spread over the levels between its extremes.

    Args:
        weight: ``[out, in]``, the latter a multiple of `GROUP_SIZE`.

    Returns:
        Codes 0 … 15, int32 ``[out, in]``; (scale, zero) ``[in / GROUP_SIZE, out, 2]`` in the
        weight's dtype.
    """
    codes = torch.empty(weight.shape, dtype=torch.int32, device=weight.device)
    groups = weight.shape[1] // GROUP_SIZE
    scales = torch.empty((groups, len(weight), 2), dtype=weight.dtype, device=weight.device)
    for begin in range(0, len(weight), _ROWS):
        here = slice(begin, begin + _ROWS)
        block = weight[here].float().unflatten(1, (groups, GROUP_SIZE))
        low, high = block.aminmax(dim=-1, keepdim=True)
        scale = ((high - low) / (LEVELS - 1)).clamp_(min=1e-8)
        code = (block - low).div_(scale).round_().clamp_(0, LEVELS - 1)
        codes[here] = code.flatten(1).int()
        both = torch.cat([scale, low + scale * (LEVELS // 2)], dim=-1)
        scales[:, here] = both.transpose(0, 1).to(weight.dtype)
    return codes, scales


def _pack_codes(codes: torch.Tensor, on_cpu: bool) -> torch.Tensor:
    """Codes as the device's kernel reads them."""
    if on_cpu:
        packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        return packed
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, _TILES)
    return packed


class Int4Weights:
    """The four-bit weights of one model and its layers, made when first asked for, and kept."""

    def __init__(self, model: Any, layers: tuple[nn.Module, ...]) -> None:
        self._model = model
        self._layers = layers
        self._made: dict[Any, Any] = {}
        self._parts: dict[nn.Module, MergedLinearPart] = {}

    @property
    def worthwhile(self) -> bool:
        """Whether there may be any, and the model is large enough for them to be quicker."""
        return self.reason is None and self.nbytes >= MIN_MODEL_BYTES

    @property
    def nbytes(self) -> int:
        """Of the weights that are rounded, as the model has them."""
        return sum(
            each.nbytes if isinstance(each, PackedWeight) else each.weight.nbytes
            for each in self._linears()
        )

    def product(self, linear: Any) -> Any:
        """A four-bit version of a packed weight, a linear layer, or anything with ``weight`` and
        ``bias``; itself where there is none."""
        if self.reason is not None:
            return linear
        if linear not in self._made:
            weight, bias, sizes = _read(linear)
            made = linear
            if weight is not None and _fits(weight):
                made = Int4Linear(weight, bias, sizes)
            self._made[linear] = made
        return self._made[linear]

    def head(self, linear: Any) -> Any:
        """The same for the output embedding, where its weight is held as it is."""
        if self.reason is not None:
            return linear
        if linear not in self._made:
            self._made[linear] = _make_head(linear) or linear
        return self._made[linear]

    def swaps(
        self, layers: Iterable[nn.Module]
    ) -> Iterator[tuple[nn.Module, str, nn.Module, nn.Module]]:
        """(parent, name, replacement, module) of the linear layers within decoder layers, and of
        the output embedding."""
        if self.reason is not None:
            return
        for parent, name, child in _linear_children(layers):
            if (part := self._part(child, self.product)) is not None:
                yield parent, name, part, child
        head = self._model.get_output_embeddings()
        if head is not None and (part := self._part(head, self.head)) is not None:
            yield (*find_parent(self._model, head), part, head)

    def _part(self, child: nn.Module, make: Callable[[Any], Any]) -> MergedLinearPart | None:
        """The module to use in place of a linear layer; None: there is none."""
        if child not in self._parts:
            merged: Any = child
            index = 0
            if isinstance(child, MergedLinearPart):
                merged, index = child.merged, child.index
            elif not is_plain(child):
                return None
            made = make(merged)
            if made is merged:
                return None
            self._parts[child] = MergedLinearPart(made, index).eval()
        return self._parts[child]

    def _linears(self) -> list[Any]:
        """The layers' products that can have four-bit weights."""
        children = (child for _, _, child in _linear_children(self._layers))
        products = (c.merged if isinstance(c, MergedLinearPart) else c for c in children)
        return [
            each
            for each in dict.fromkeys(products)
            if (isinstance(each, PackedWeight) and each.bits != 4)
            or (is_plain(each) and _fits(each.weight))
        ]

    @cached_property
    def reason(self) -> str | None:
        """Why there are none, one phrase; None: there are, or may be."""
        device, dtype = self._model.device, self._model.dtype
        if describe_spread(self._model):
            return "the model is spread over several devices"
        if device.type not in _MULTIPLES:
            return f"there are no kernels for four-bit weights on {device.type}"
        if device.type == "cuda" and dtype != torch.bfloat16:
            return "on a GPU the kernel for four-bit weights takes bfloat16 alone"
        if not self._linears():
            return "the layers have no plain weights of shapes that four-bit kernels take"
        try:
            return _try_kernel(device, dtype)
        except (RuntimeError, AttributeError, TypeError, ValueError) as error:
            return f"PyTorch's kernel for four-bit weights does not run here: {error}"


def _linear_children(layers: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, child) of the modules within decoder layers that may be replaced."""
    for layer in layers:
        for parent in packable(layer):
            for name, child in packable_children(parent):
                yield parent, name, child


def _read(linear: Any) -> tuple[torch.Tensor | None, torch.Tensor | None, list[int]]:
    """(weight, bias, outputs of each layer) of a product; no weight where it isn't plain."""
    if isinstance(linear, PackedWeight):
        return linear.dense(), linear.bias, linear.sizes
    weight: torch.Tensor | None = getattr(linear, "weight", None)
    if weight is None or (isinstance(linear, nn.Module) and not is_plain(linear)):
        return None, None, []
    return weight.detach(), None if linear.bias is None else linear.bias.detach(), [len(weight)]


def _make_head(linear: Any) -> Int4Head | None:
    """None: the kernels don't take the weight, or its rows can't be read."""
    own = linear.linears[0] if isinstance(linear, PackedWeight) else linear
    if not is_plain(own) or own.bias is not None:
        return None
    rows = linear.embedding() if isinstance(linear, PackedWeight) else None
    if rows is not None:
        weight = linear.dense()
    else:
        weight = own.weight.detach()
        rows = weight.__getitem__
    return Int4Head(weight, rows) if weight.numel() and _fits(weight) else None


def _fits(weight: torch.Tensor) -> bool:
    """Whether the kernels take a weight of this kind."""
    multiples = _MULTIPLES.get(weight.device.type)
    if multiples is None or weight.ndim != 2 or not weight.is_floating_point():
        return False
    return all(size % multiple == 0 for size, multiple in zip(weight.shape, multiples, strict=True))


def _try_kernel(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel can't be used, judged by a product with a small weight; None: it can."""
    generator = torch.Generator().manual_seed(0)
    made = torch.randn((64, 256), generator=generator) * 0.02
    weight = made.to(device, dtype)
    rows = torch.randn((3, 256), generator=generator).to(device, dtype)
    with torch.inference_mode():
        codes, scales = quantize_int4(weight)
        scale, zero = scales.float().transpose(0, 1).unbind(-1)
        levels = codes.float().unflatten(1, (-1, GROUP_SIZE)) - LEVELS // 2
        known = (levels * scale[..., None] + zero[..., None]).flatten(1)
        expected = rows.float() @ known.T
        error = (Int4Linear(weight, None, [64])(rows).float() - expected).norm() / expected.norm()
    if bool(error < _MAX_ERROR):
        return None
    return "PyTorch's kernel for four-bit weights gives something else here"
