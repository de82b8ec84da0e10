"""Linear layers whose weights lie in memory in the order in which the processor reads them.

PyTorch's CPU product with a plain weight rearranges it, or reads it against the grain, at every
call. oneDNN can keep it rearranged ("packed"), which PyTorch itself does for models it has compiled
and frozen. A pass over a few rows then takes about half the time. Packing a weight replaces it: it
is not held twice, but for an output embedding that is the input embedding, too. Unpacking gives the
same bits back.

A row's bits don't depend on the number of rows here, either, from two on (see :mod:`conflayers_cli.kernels.attention`).
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

from conflayers_cli.models.device import spread_of
from conflayers_cli.models.peft_modules import packable, packable_children

_MEASURED = 8
"""Weights by which packed and plain products are compared."""
_WORTH_MEASURING = 1 << 20
"""Bytes; a model with smaller weights than this is packed as it is."""
_SLOWER = 1.1
"""Packed products must be slower than this for a model to be left as it is: what is chosen must
not hang on noise, because the two round differently."""

_ATTRIBUTE = "conflayers_packing"
"""Where a packed model keeps what was done to it, for whoever opens it again."""

_MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Products of one input that are computed as one."""


class Joint(ABC):
    """Products of one input with the weights of several linear layers, computed as one.

    Attributes:
        sizes: the layers' outputs.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = list(sizes)
        self._last: tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None = None

    @abstractmethod
    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """The products of all layers side by side: ``[..., in] → [..., sum of sizes]``."""

    def part(self, rows: torch.Tensor, index: int) -> torch.Tensor:
        """One layer's product; the others' are kept until the next input comes."""
        if len(self.sizes) == 1:
            return self(rows)
        last, self._last = self._last, None
        if last is None or last[0] is not rows:
            last = rows, self(rows).split(self.sizes, dim=-1)
        if index < len(self.sizes) - 1:  # the last one to be asked leaves nothing behind
            self._last = last
        return last[1][index]


class Packed(Joint):
    """One packed weight, which may serve several linear layers of the same input.

    Args:
        linears: the layers; their weights become empty, unless ``keep`` says that someone else
            has use for them.
    """

    def __init__(self, linears: Sequence[nn.Linear], keep: bool = False) -> None:
        super().__init__([linear.out_features for linear in linears])
        self.linears = tuple(linears)
        self._keep = keep
        weights = [linear.weight.detach() for linear in linears]
        self._weight = _reorder(weights[0] if len(weights) == 1 else torch.cat(weights))
        biases = [linear.bias for linear in linears if linear.bias is not None]
        self.bias = torch.cat([bias.detach() for bias in biases]) if biases else None
        if not keep:
            self.drop_plain()

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self._weight, self.bias, "none", [], ""
        )
        return product

    def __deepcopy__(self, memo: dict[int, Any]) -> Packed:
        """A copy with a weight of its own, for whoever copies a model: PyTorch can't copy these."""
        other = memo[id(self)] = object.__new__(Packed)
        other.linears = copy.deepcopy(self.linears, memo)
        other.sizes, other._keep, other._last = self.sizes, self._keep, None
        other._weight = _reorder(self.dense())
        other.bias = None if self.bias is None else self.bias.clone()
        return other

    def dense(self) -> torch.Tensor:
        """The weights ``[sum of sizes, in]``, side by side."""
        weight: torch.Tensor = self._weight.to_dense()
        return weight

    @property
    def nbytes(self) -> int:
        """What the weights take in memory."""
        linear = self.linears[0]
        return sum(self.sizes) * linear.in_features * self._weight.dtype.itemsize

    def restore_plain(self) -> None:
        """Give the layers their weights back."""
        if self._keep:
            return
        weights = self.dense().split(self.sizes)
        for linear, weight in zip(self.linears, weights, strict=True):
            linear.weight = nn.Parameter(weight, requires_grad=False)

    def drop_plain(self) -> None:
        """Take the layers' own weights away again."""
        if self._keep:
            return
        for linear in self.linears:
            empty = torch.empty(0, dtype=linear.weight.dtype)
            linear.weight = nn.Parameter(empty, requires_grad=False)


class JointLinear(nn.Module):
    """Stands where a linear layer was."""

    def __init__(self, joint: Joint, index: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.joint = joint
        self.index = index
        self.in_features = in_features
        self.out_features = out_features

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.joint.part(rows, self.index)


class PackedLinear(JointLinear):
    """One with packed weights."""

    joint: Packed

    def __init__(self, packed: Packed, index: int = 0) -> None:
        linear = packed.linears[index]
        super().__init__(packed, index, linear.in_features, linear.out_features)


class Packing:
    """A model's packed layers: makes them, and takes them back for a while.

    Args:
        model: a transformers causal language model.
        layers: its decoder layers.
    """

    def __init__(self, model: Any, layers: Sequence[nn.Module]) -> None:
        self._model = model
        self._places: list[tuple[nn.Module, str, nn.Linear, PackedLinear]] = []
        self._once = _used_once(model)
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
    def of(model: Any, layers: Sequence[nn.Module]) -> Packing | None:
        """Pack a model where that is possible and not slower; None: it stays as it is."""
        earlier = Packing.earlier(model)
        if earlier is not None or not _possible(model):
            return earlier
        parents = [parent for layer in layers for parent in packable(layer)]
        found = [m for p in parents for _, m in packable_children(p) if is_plain(m)]
        try:
            return Packing(model, layers) if found and _faster(found) else None
        except (RuntimeError, TypeError, ValueError):  # a kind of weight that can't be packed
            return None

    @staticmethod
    def earlier(model: Any) -> Packing | None:
        """What was done to the model before; None: nothing."""
        earlier: Packing | None = getattr(model, _ATTRIBUTE, None)
        return earlier

    @contextmanager
    def unpacked(self) -> Iterator[None]:
        """Within: the model has its plain layers, which takes their memory a second time."""
        try:
            self._restore()
            yield
        finally:
            self._install()
            for packed in self._weights():
                packed.drop_plain()

    def undo(self) -> None:
        """The model has its plain layers from now on."""
        self._restore()
        self._places.clear()
        if hasattr(self._model, _ATTRIBUTE):
            delattr(self._model, _ATTRIBUTE)

    def _restore(self) -> None:
        for packed in self._weights():
            packed.restore_plain()
        for parent, name, linear, _ in self._places:
            parent._modules[name] = linear

    def _weights(self) -> list[Packed]:
        return list(dict.fromkeys(stand_in.joint for *_, stand_in in self._places))

    def _install(self) -> None:
        for parent, name, _, stand_in in self._places:
            parent._modules[name] = stand_in

    def _pack_children(self, parent: nn.Module) -> None:
        children = packable_children(parent)
        linears = [name for name, child in children if is_plain(child) and child in self._once]
        for names in _MERGED:
            if not all(name in linears for name in names):
                continue
            parts = [child for name in names if is_plain(child := parent._modules[name])]
            if alike(parts):
                self._put(parent, names, Packed(parts))
                linears = [name for name in linears if name not in names]
        for name in linears:
            self._put(parent, [name], Packed([parent._modules[name]]))  # type: ignore[list-item]

    def _pack_head(self, model: Any) -> None:
        head = model.get_output_embeddings()
        if not is_plain(head) or head not in self._once:
            return
        owner, name = owner_of(model, head)
        embedding = model.get_input_embeddings()
        tied = head.weight is getattr(embedding, "weight", None)
        self._put(owner, [name], Packed([head], keep=tied))

    def _put(self, parent: nn.Module, names: Sequence[str], packed: Packed) -> None:
        for index, name in enumerate(names):
            stand_in = PackedLinear(packed, index)
            stand_in.eval()
            self._places.append((parent, name, packed.linears[index], stand_in))
            parent._modules[name] = stand_in


def is_plain(module: object) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear layer and no more: its weight says all that it computes.

    Quantised layers are of other kinds, or have weights of other kinds (torchao); with
    compressed-tensors, and where accelerate moves a model's layers between devices, they are
    ordinary ones with a forward of their own.
    """
    if type(module) is not nn.Linear or type(module._parameters.get("weight")) is not nn.Parameter:
        return False
    hooks = module._forward_pre_hooks or module._forward_hooks
    return not hooks and "forward" not in vars(module)


def _used_once(model: nn.Module) -> set[nn.Module]:
    """The modules that stand in one place only."""
    places = Counter(child for parent in model.modules() for child in parent._modules.values())
    return {module for module, count in places.items() if module is not None and count == 1}


def alike(linears: Sequence[nn.Linear]) -> bool:
    """Whether layers can be one product: inputs of one size, and all have a bias or none has."""
    inputs = {linear.in_features for linear in linears}
    return len(inputs) == 1 and len({linear.bias is None for linear in linears}) == 1


def owner_of(model: nn.Module, child: nn.Module) -> tuple[nn.Module, str]:
    """(the module that a module stands in, its name there)."""
    path = next(name for name, module in model.named_modules() if module is child)
    owner, _, name = path.rpartition(".")
    return model.get_submodule(owner), name


def _reorder(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return packed


def _possible(model: Any) -> bool:
    if spread_of(model):  # what is measured here might differ from process to process
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
    rows = [linear.weight.new_ones((2, linear.in_features)) for linear in largest]
    packed = [Packed([linear], keep=True) for linear in largest]
    plain_times, packed_times = [], []
    with torch.inference_mode():
        for _ in range(7):
            plain_times.append(_seconds(largest, rows))
            packed_times.append(_seconds(packed, rows))
    return sorted(packed_times)[3] <= _SLOWER * sorted(plain_times)[3]


def _seconds(
    products: Sequence[Callable[[torch.Tensor], torch.Tensor]], rows: Sequence[torch.Tensor]
) -> float:
    begin = time.perf_counter()
    for product, row in zip(products, rows, strict=True):
        product(row)
    return time.perf_counter() - begin
