"""Draft passes with the layers' weights rounded to four bits.

A pass over one token takes the time in which its weights are read. Rounded to four bits in groups
of 32, each group with a scale and a zero of its own, weights are a quarter to a third of what they
are in half precision, and nearly as good at guessing. Only drafts use them: what decides is
computed with the model's own weights. (Drafting with the model's own weights at lower precision:
QuantSpec, arXiv 2502.10424, and QSpec, arXiv 2410.11305. Here it is a part of the plan, and is
searched for together with what is left out.)

The kernels are PyTorch's. The output embedding is a large part of a small model, but rounded it
costs more agreement than all layers together: so the few likeliest tokens by the rounded one get
the logits of the model's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from conflayers_cli.kernels.packed_linear import Joint, JointLinear, Packed, is_plain, owner_of
from conflayers_cli.models.device import spread_of
from conflayers_cli.models.peft_modules import packable, packable_children

GROUP = 32
"""Inputs that share a scale and a zero."""
LEVELS = 16
WORTHWHILE = 32 << 20
"""Bytes of weights from which on it is worth asking whether fewer of them are quicker to read:
processors hold less in their caches."""
SCREENED = 16
"""Tokens whose logits are computed with the output embedding as it is."""
_ROWS = 4096
"""Of a weight, rounded at a time: bounds what is held in float32."""
_TILES = 8
"""How CUDA's kernel wants weights laid out (``innerKTiles``)."""
_MULTIPLES = {"cpu": (16, GROUP), "cuda": (8, 16 * _TILES)}
"""Rows and columns that the kernels take, as multiples of these."""
_CLOSE = 0.02
"""Relative error of a kernel's product under which it does what it should."""


class Int4(Joint):
    """Products with one weight of four bits, which may be that of several linear layers.

    Args:
        weight: ``[out, in]``.
        bias: ``[out]``; None: there is none.
        sizes: the rows of each of the layers.

    Raises:
        RuntimeError: the device has no kernel for it.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, sizes: list[int]) -> None:
        super().__init__(sizes)
        self._bias = bias
        self._on_cpu = weight.device.type == "cpu"
        codes, self._scales = rounded(weight)
        self._codes = _laid_out(codes, self._on_cpu)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """``[..., in] → [..., out]``, in the dtype of the rows."""
        flat = rows.reshape(-1, rows.shape[-1])
        kernel = (
            torch.ops.aten._weight_int4pack_mm_for_cpu
            if self._on_cpu
            else torch.ops.aten._weight_int4pack_mm
        )
        product: torch.Tensor = kernel(flat, self._codes, GROUP, self._scales)
        product = product.view(*rows.shape[:-1], -1)
        return product if self._bias is None else product.add_(self._bias)

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return self._codes.nbytes + self._scales.nbytes


class Int4Head(Joint):
    """Logits by an output embedding of four bits, the highest of them computed anew without.

    Args:
        weight: the embedding ``[V, d]``, which stays in use.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__([len(weight)])
        self._weight = weight
        self.rough = Int4(weight, None, self.sizes)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """``[..., d] → [..., V]``, in the dtype of the rows."""
        logits = self.rough(rows)
        likeliest = logits.topk(min(SCREENED, logits.shape[-1]), dim=-1, sorted=False).indices
        exact = (self._weight[likeliest] * rows.unsqueeze(-2)).sum(-1)
        return logits.scatter_(-1, likeliest, exact)

    @property
    def nbytes(self) -> int:
        """What it takes in memory beside the embedding."""
        return self.rough.nbytes


def rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight's codes and what they stand for: ``weight ≈ (code - 8) · scale + zero``.

    Each group of `GROUP` inputs is spread over the levels from its least to its largest weight.

    Args:
        weight: ``[out, in]``, the latter a multiple of `GROUP`.

    Returns:
        Codes 0 … 15, int32 ``[out, in]``; (scale, zero) ``[in / GROUP, out, 2]`` in the weight's
        dtype.
    """
    codes = torch.empty(weight.shape, dtype=torch.int32, device=weight.device)
    groups = weight.shape[1] // GROUP
    scales = torch.empty((groups, len(weight), 2), dtype=weight.dtype, device=weight.device)
    for begin in range(0, len(weight), _ROWS):
        here = slice(begin, begin + _ROWS)
        block = weight[here].float().unflatten(1, (groups, GROUP))
        low, high = block.aminmax(dim=-1, keepdim=True)
        scale = ((high - low) / (LEVELS - 1)).clamp_(min=1e-8)
        code = (block - low).div_(scale).round_().clamp_(0, LEVELS - 1)
        codes[here] = code.flatten(1).int()
        both = torch.cat([scale, low + scale * (LEVELS // 2)], dim=-1)
        scales[:, here] = both.transpose(0, 1).to(weight.dtype)
    return codes, scales


def _laid_out(codes: torch.Tensor, on_cpu: bool) -> torch.Tensor:
    """Codes as the device's kernel reads them."""
    if on_cpu:
        packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        return packed
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, _TILES)
    return packed


class Int4Weights:
    """The four-bit weights of one model: made when they are first asked for, and kept.

    Args:
        model: a transformers causal language model.
        layers: its decoder layers.

    Attributes:
        reason: why there are none, one phrase; None: there are, or may be.
    """

    def __init__(self, model: Any, layers: tuple[nn.Module, ...]) -> None:
        self._model = model
        self._layers = layers
        self._made: dict[Any, Joint] = {}
        self._modules: dict[nn.Module, nn.Module] = {}
        self._asked = False
        self._reason: str | None = None

    @property
    def reason(self) -> str | None:
        if not self._asked:
            self._asked, self._reason = True, self._why_not()
        return self._reason

    @property
    def nbytes(self) -> int:
        """What those made so far take in memory."""
        own = (each for each in self._made.values() if isinstance(each, (Int4, Int4Head)))
        return sum(each.nbytes for each in own)

    @property
    def worthwhile(self) -> bool:
        """Whether there may be, and the model is large enough for them to be quicker."""
        return self.reason is None and sum(map(_weight_bytes, self._linears())) >= WORTHWHILE

    def product(self, given: Any) -> Any:
        """What computes in place of a product of the fused forward; itself where nothing can.

        Args:
            given: packed weights, a linear layer, or something with ``weight`` and ``bias``.
        """
        if self.reason is not None:
            return given
        if isinstance(given, Packed):
            return self._of_packed(given)
        weight: torch.Tensor | None = getattr(given, "weight", None)
        plain = is_plain(given) or not isinstance(given, nn.Module)
        if weight is None or not plain or not _fits(weight):
            return given
        if given not in self._made:
            bias = None if given.bias is None else given.bias.detach()
            self._made[given] = Int4(weight.detach(), bias, [len(weight)])
        return self._made[given]

    def head(self, given: Any) -> Any:
        """The same for the output embedding, where its rows can be had one by one."""
        if self.reason is not None:
            return given
        if given not in self._made:
            linear = given.linears[0] if isinstance(given, Packed) else given
            weight: torch.Tensor | None = getattr(linear, "weight", None)
            plain = is_plain(linear) and linear.bias is None
            if not plain or weight is None or weight.numel() == 0 or not _fits(weight):
                return given
            self._made[given] = Int4Head(weight.detach())
        return self._made[given]

    def head_swaps(self) -> list[tuple[nn.Module, str, nn.Module, nn.Module]]:
        """As :meth:`swaps`, of the output embedding."""
        module = self._model.get_output_embeddings()
        instead = None if module is None else self._module(module, self.head)
        return [] if instead is None else [(*owner_of(self._model, module), instead, module)]

    def swaps(self, layer: nn.Module) -> list[tuple[nn.Module, str, nn.Module, nn.Module]]:
        """(parent, name, what stands in, the linear layer) of all within a decoder layer."""
        if self.reason is not None:
            return []
        return [
            (parent, name, instead, child)
            for parent in packable(layer)
            for name, child in packable_children(parent)
            if (instead := self._module(child, self.product)) is not None
        ]

    def _module(self, child: nn.Module, make: Callable[[Any], Any]) -> nn.Module | None:
        """What stands in for a linear layer, with the product made; None: nothing can."""
        if child not in self._modules:
            joint: Any = child
            index = 0
            if isinstance(child, JointLinear):
                joint, index = child.joint, child.index
            elif not is_plain(child):
                return None
            made = make(joint)
            if made is joint:
                return None
            sizes = int(child.in_features), int(child.out_features)
            self._modules[child] = JointLinear(made, index, *sizes).eval()
        return self._modules[child]

    def _of_packed(self, packed: Packed) -> Joint:
        if packed not in self._made:
            weight = packed.dense()
            fits = _fits(weight)
            self._made[packed] = Int4(weight, packed.bias, packed.sizes) if fits else packed
        return self._made[packed]

    def _linears(self) -> list[Any]:
        """The layers' linear layers that four bits can be had of."""
        found: dict[Any, None] = {}
        for layer in self._layers:
            for parent in packable(layer):
                for _, child in packable_children(parent):
                    if isinstance(child, JointLinear):
                        found[child.joint] = None
                    elif is_plain(child) and _fits(child.weight):
                        found[child] = None
        return list(found)

    def _why_not(self) -> str | None:
        device, dtype = self._model.device, self._model.dtype
        if spread_of(self._model):
            return "the model is spread over several devices"
        if device.type not in _MULTIPLES:
            return f"there are no kernels for four-bit weights on {device.type}"
        if device.type == "cuda" and dtype != torch.bfloat16:
            return "on a GPU the kernel for four-bit weights takes bfloat16 alone"
        if not self._linears():
            return "the layers have no plain weights of shapes that four-bit kernels take"
        try:
            return _tried(device, dtype)
        except (RuntimeError, AttributeError, TypeError, ValueError) as error:
            return f"PyTorch's kernel for four-bit weights does not run here: {error}"


def _fits(weight: torch.Tensor) -> bool:
    """Whether the kernels take a weight of this kind."""
    multiples = _MULTIPLES.get(weight.device.type)
    if multiples is None or weight.ndim != 2 or not weight.is_floating_point():
        return False
    return all(size % multiple == 0 for size, multiple in zip(weight.shape, multiples, strict=True))


def _weight_bytes(linear: Any) -> int:
    if isinstance(linear, Packed):
        return linear.nbytes
    nbytes: int = linear.weight.nbytes
    return nbytes


def _tried(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel can't be used, by what it gives of a small weight; None: it can."""
    generator = torch.Generator().manual_seed(0)
    made = torch.randn((64, 256), generator=generator) * 0.02
    weight = made.to(device, dtype)
    rows = torch.randn((3, 256), generator=generator).to(device, dtype)
    with torch.inference_mode():
        codes, scales = rounded(weight)
        scale, zero = scales.float().transpose(0, 1).unbind(-1)
        levels = codes.float().unflatten(1, (-1, GROUP)) - LEVELS // 2
        known = (levels * scale[..., None] + zero[..., None]).flatten(1)
        expected = rows.float() @ known.T
        error = (Int4(weight, None, [64])(rows).float() - expected).norm() / expected.norm()
    if bool(error < _CLOSE):
        return None
    return "PyTorch's kernel for four-bit weights gives something else here"
