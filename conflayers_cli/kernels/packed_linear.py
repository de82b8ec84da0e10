"""Linear layers whose weights lie in memory in the order in which the processor reads them.

PyTorch's CPU product with a plain weight rearranges it at every call. oneDNN can keep it rearranged
("packed"): a short pass then takes about half the time. A packed weight replaces the plain one,
except for an output embedding tied to the input embedding, which is held twice where rows can't be
read of the packed one. Unpacking gives the same bits back. From two rows on, a row's bits don't
depend on the number of rows here either (see :mod:`conflayers_cli.kernels.attention`).
"""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import nn

from conflayers_cli.models.device import describe_spread
from conflayers_cli.models.peft_modules import packable, packable_children

_MEASURED = 8
"""Weights by which packed and plain products are compared."""
_WORTH_MEASURING = 1 << 20
"""Bytes; a model with smaller weights is packed without measuring."""
_SLOWER = 1.1
"""Packed products must be slower than this for a model to stay plain: the two round differently, so
the choice must not depend on noise."""

_ATTRIBUTE = "conflayers_packing"
"""Where a packed model keeps its `Packing`, for when it is opened again."""

_MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Products of one input that are computed as one."""


class MergedLinear(ABC):
    """Several linear layers of one input, computed as one product.

    Attributes:
        in_features: the layers' inputs.
        sizes: the outputs of each.
    """

    def __init__(self, in_features: int, sizes: Sequence[int]) -> None:
        self.in_features = in_features
        self.sizes = list(sizes)
        self._last: tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None = None

    @abstractmethod
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The products of all layers side by side: ``[..., in] → [..., sum of sizes]``."""

    def part(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """One layer's product; the others' are kept until the last layer's is asked for."""
        if len(self.sizes) == 1:
            return self(x)
        last, self._last = self._last, None
        if last is None or last[0] is not x:
            last = x, self(x).split(self.sizes, dim=-1)
        if index < len(self.sizes) - 1:
            self._last = last
        return last[1][index]


class PackedWeight(MergedLinear):
    """One packed weight of one or several linear layers.

    Args:
        linears: the layers; their own weights become empty.
        keep: their weights stay, because they are used elsewhere too.
    """

    def __init__(self, linears: Sequence[nn.Linear], keep: bool = False) -> None:
        super().__init__(linears[0].in_features, [linear.out_features for linear in linears])
        self.linears = tuple(linears)
        self._keep = keep
        weights = [linear.weight.detach() for linear in linears]
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        self.pack(weights[0] if len(weights) == 1 else torch.cat(weights))
        self.drop_plain()

    def pack(self, weight: torch.Tensor) -> None:
        """Keep a plain weight ``[sum of sizes, in]`` in the order of these products."""
        self._weight = _reorder(weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self.bias, "none", [], ""
        )
        return product

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        other = memo[id(self)] = copy.copy(self)
        other.linears, other._last = copy.deepcopy(self.linears, memo), None
        other.bias = None if self.bias is None else self.bias.clone()
        other.pack_again()
        return other

    def pack_again(self) -> None:
        """Hold the weight for oneself after a shallow copy: PyTorch can't copy packed ones."""
        self.pack(self.dense())

    def dense(self) -> torch.Tensor:
        """The plain weights ``[sum of sizes, in]``, side by side."""
        weight: torch.Tensor = self._weight.to_dense()
        return weight

    def embedding(self) -> nn.Module | None:
        """A module that reads the packed weight's rows as an embedding; None: it can't be read."""
        return None

    def release(self) -> None:
        """The layers' own weights aren't kept after all."""
        self._keep = False
        self.drop_plain()

    @property
    def bits(self) -> int | None:
        """Of a weight; None: as it was."""
        return None

    @property
    def nbytes(self) -> int:
        """Of the packed weights."""
        return sum(self.sizes) * self.in_features * self.linears[0].weight.dtype.itemsize

    def restore_plain(self) -> None:
        """Give the layers their weights back."""
        if not self._keep:
            for linear, weight in zip(self.linears, self.dense().split(self.sizes), strict=True):
                linear.weight = nn.Parameter(weight, requires_grad=False)

    def drop_plain(self) -> None:
        """Take the layers' own weights away."""
        if not self._keep:
            for linear in self.linears:
                empty = torch.empty(0, dtype=linear.weight.dtype)
                linear.weight = nn.Parameter(empty, requires_grad=False)


class MergedLinearPart(nn.Module):
    """A module in place of one of the linear layers of a merged product."""

    def __init__(self, merged: MergedLinear, index: int = 0) -> None:
        super().__init__()
        self.merged = merged
        self.index = index
        self.in_features = merged.in_features
        self.out_features = merged.sizes[index]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.merged.part(x, self.index)


MakeFn = Callable[[Sequence[nn.Linear], bool], PackedWeight]
"""Makes the packed weight of linear layers of one input; whether to keep their own."""


class Packing:
    """A model's packed decoder layers and output embedding, which can be unpacked for a while.

    ``kind``: the class of its products, or what makes them.

    Raises:
        RuntimeError, TypeError, ValueError: a kind of weight that can't be packed.
    """

    def __init__(
        self, model: Any, layers: Sequence[nn.Module], kind: MakeFn = PackedWeight
    ) -> None:
        self.kind = kind
        self._model = model
        self._swaps: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []
        self._weights: list[PackedWeight] = []
        self._tied: tuple[nn.Embedding, nn.Linear] | None = None
        self._used_once = _used_once(model)
        try:
            for layer in layers:
                for parent in list(packable(layer)):
                    self._pack_children(parent)
            self._pack_head(model)
        except BaseException:
            self.undo()
            raise
        setattr(model, _ATTRIBUTE, self)

    @staticmethod
    def create(model: Any, layers: Sequence[nn.Module]) -> Packing | None:
        """Pack a model where that is possible and not slower; None: it stays plain."""
        existing = Packing.reuse(model, PackedWeight)
        if existing is not None or not _possible(model):
            return existing
        parents = [parent for layer in layers for parent in packable(layer)]
        found = [m for p in parents for _, m in packable_children(p) if is_plain(m)]
        try:
            return Packing(model, layers) if found and _faster(found) else None
        except (RuntimeError, TypeError, ValueError):
            return None

    @staticmethod
    def existing(model: Any) -> Packing | None:
        """The packing of a model that was packed before."""
        packing: Packing | None = getattr(model, _ATTRIBUTE, None)
        return packing

    @staticmethod
    def reuse(model: Any, kind: MakeFn) -> Packing | None:
        """The packing of a model that was packed before in this way; one of another is undone."""
        existing = Packing.existing(model)
        if existing is None or existing.kind is kind:
            return existing
        existing.undo()
        return None

    @contextmanager
    def unpacked(self) -> Iterator[None]:
        """Within: the model has its plain layers, which takes their memory a second time."""
        try:
            self._restore()
            yield
        finally:
            for parent, name, _, part in self._swaps:
                parent._modules[name] = part
            for packed in self._weights:
                packed.drop_plain()
            self._tie()

    def undo(self) -> None:
        """The model has its plain layers from now on."""
        self._restore()
        self.settle()

    def settle(self) -> None:
        """What the model has now is its own from now on; nothing is kept to undo it."""
        self._swaps.clear()
        self._weights.clear()
        self._tied = None
        if hasattr(self._model, _ATTRIBUTE):
            delattr(self._model, _ATTRIBUTE)

    def _restore(self) -> None:
        for packed in self._weights:
            packed.restore_plain()
        self._tie()
        for parent, name, module, _ in self._swaps:
            parent._modules[name] = module

    def _tie(self) -> None:
        if self._tied is not None:
            embedding, head = self._tied
            embedding.weight = head.weight

    def _pack_children(self, parent: nn.Module) -> None:
        linears = {
            name: child
            for name, child in packable_children(parent)
            if is_plain(child) and child in self._used_once
        }
        for names in _MERGED:
            parts = [linears[name] for name in names if name in linears]
            if len(parts) == len(names) and can_merge(parts):
                self._put(parent, names, self.kind(parts, False))
                linears = {name: each for name, each in linears.items() if name not in names}
        for name, linear in linears.items():
            self._put(parent, [name], self.kind([linear], False))

    def _pack_head(self, model: Any) -> None:
        head = model.get_output_embeddings()
        if not is_plain(head) or head not in self._used_once:
            return
        embedding = model.get_input_embeddings()
        tied = head.weight is getattr(embedding, "weight", None)
        packed = self.kind([head], tied)
        owner, name = find_parent(model, head)
        self._put(owner, [name], packed)
        if tied and type(embedding) is nn.Embedding and (rows := packed.embedding()) is not None:
            self._tied = embedding, head
            owner, name = find_parent(model, embedding)
            self._swaps.append((owner, name, embedding, rows))
            owner._modules[name] = rows
            packed.release()
            self._tie()

    def _put(self, parent: nn.Module, names: Sequence[str], packed: PackedWeight) -> None:
        self._weights.append(packed)
        for index, name in enumerate(names):
            part = MergedLinearPart(packed, index).eval()
            self._swaps.append((parent, name, packed.linears[index], part))
            parent._modules[name] = part


def is_plain(module: object) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear layer and no more: its weight says all that it computes.

    Quantised ones have another class, weights of another class (torchao), or a forward of their own
    (compressed-tensors), as layers have that accelerate moves between devices.
    """
    if type(module) is not nn.Linear or type(module._parameters.get("weight")) is not nn.Parameter:
        return False
    hooks = module._forward_pre_hooks or module._forward_hooks
    return not hooks and "forward" not in vars(module)


def _used_once(model: nn.Module) -> set[nn.Module]:
    """The modules that have a single parent."""
    uses = Counter(child for parent in model.modules() for child in parent._modules.values())
    return {module for module, count in uses.items() if module is not None and count == 1}


def can_merge(linears: Sequence[nn.Linear]) -> bool:
    """Whether layers can be one product: inputs of one size, and all have a bias or none has."""
    return len({(linear.in_features, linear.bias is None) for linear in linears}) == 1


def find_parent(model: nn.Module, child: nn.Module) -> tuple[nn.Module, str]:
    """The module that has ``child``, and its name there."""
    path = next(name for name, module in model.named_modules() if module is child)
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


def _reorder(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return packed


def _possible(model: Any) -> bool:
    if describe_spread(model):  # what is measured here might differ from process to process
        return False
    if model.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if model.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(model.dtype == torch.float32)


def _faster(linears: Sequence[nn.Linear]) -> bool:
    """Whether two rows' products with packed weights are not slower; measured in milliseconds."""
    largest = sorted(linears, key=lambda linear: linear.weight.nbytes)[-_MEASURED:]
    if largest[0].weight.nbytes < _WORTH_MEASURING:
        return True
    inputs = [linear.weight.new_ones((2, linear.in_features)) for linear in largest]
    packed = [PackedWeight([linear], keep=True) for linear in largest]
    plain_times, packed_times = [], []
    with torch.inference_mode():
        for _ in range(7):
            plain_times.append(_seconds(largest, inputs))
            packed_times.append(_seconds(packed, inputs))
    return sorted(packed_times)[3] <= _SLOWER * sorted(plain_times)[3]


def _seconds(
    products: Sequence[Callable[[torch.Tensor], torch.Tensor]], inputs: Sequence[torch.Tensor]
) -> float:
    begin = time.perf_counter()
    for product, x in zip(products, inputs, strict=True):
        product(x)
    return time.perf_counter() - begin
