"""Weights of a GGUF file in the bits that they have there.

Blocks of Q4_0, Q4_1 and Q8_0 are groups of 32 weights with a scale, and a least value, in float16,
as the native library has them: nothing is rounded again. Weights of other types are dequantised
(Q4_K and Q6_K have scales of scales, whose products float16 does not hold).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import accelerate
import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFReader, dequantize
from gguf.tensor_mapping import get_tensor_name_map
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from conflayers_cli.kernels.fused_forward import FAMILIES
from conflayers_cli.kernels.int4_linear import GROUP_SIZE
from conflayers_cli.kernels.native_layers import NativeEmbedding, NativeLinear
from conflayers_cli.kernels.native_weights import NativeWeight, from_groups, pack
from conflayers_cli.kernels.packed_linear import Packing, find_parent
from conflayers_cli.models.support import find_layers

Groups = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Codes ``[rows, groups, 32]``, scale and least ``[rows, groups]``: see `from_groups`."""
_HALF = GROUP_SIZE // 2
_ROTARY_PAIRS = ("llama", "mistral")
"""Architectures whose queries and keys llama.cpp rotates in pairs of neighbours: its converter
orders their rows so."""


def _codes4(packed: torch.Tensor) -> torch.Tensor:
    """Bytes ``[..., 16]``, of codes i (low half) and i + 16."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def _half(raw: torch.Tensor) -> torch.Tensor:
    return raw.contiguous().view(torch.float16).squeeze(-1)


def _q4_0(blocks: torch.Tensor) -> Groups:
    scale = _half(blocks[..., :2])
    return _codes4(blocks[..., 2:]), scale, scale * -8


def _q4_1(blocks: torch.Tensor) -> Groups:
    return _codes4(blocks[..., 4:]), _half(blocks[..., :2]), _half(blocks[..., 2:4])


def _q8_0(blocks: torch.Tensor) -> Groups:
    return blocks[..., 2:].contiguous().view(torch.int8), _half(blocks[..., :2]), None


_Type = GGMLQuantizationType
_READERS: dict[GGMLQuantizationType, tuple[int, Callable[[torch.Tensor], Groups]]] = {
    _Type.Q4_0: (4, _q4_0),
    _Type.Q4_1: (4, _q4_1),
    _Type.Q8_0: (8, _q8_0),
}
"""(bits, reader of bytes ``[rows, groups, bytes of a block]``) of types that are kept."""


class GGUFWeights:
    """The weights of one file, for a model of its config that computes in ``dtype``."""

    def __init__(self, file: Path, config: PreTrainedConfig, dtype: torch.dtype) -> None:
        reader = GGUFReader(file)
        self._tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
        field = reader.get_field("general.architecture")
        self._architecture = "" if field is None else str(field.contents())
        self._config, self._dtype = config, dtype

    def reason(self) -> str | None:
        """Why a model can't be made of them, one phrase; None: it can."""
        if self._config.model_type not in FAMILIES:
            return f"native kernels don't know models of type {self._config.model_type}"
        if self._architecture not in MODEL_ARCH_NAMES.values():
            return f"the architecture {self._architecture!r} is not known"
        if not any(each.tensor_type in _READERS for each in self._tensors.values()):
            types = sorted({each.tensor_type.name for each in self._tensors.values()})
            return f"its weights are {', '.join(types)}, and only Q4_0, Q4_1 and Q8_0 are kept"
        return None

    def model(self) -> Any:
        """The model.

        Raises:
            ValueError: a weight is missing, or has another shape.
        """
        arch = next(a for a, name in MODEL_ARCH_NAMES.items() if name == self._architecture)
        self._map = get_tensor_name_map(arch, self._config.num_hidden_layers)
        with accelerate.init_empty_weights():
            config = copy.deepcopy(self._config)
            model = AutoModelForCausalLM.from_config(config, dtype=self._dtype)
        self._names = {module: name for name, module in model.named_modules()}
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        self._tied = embedding.weight if config.tie_word_embeddings else None
        if self._tied is not None:
            head.weight = self._tied

        def make(linears: Sequence[nn.Linear], keep: bool) -> NativeLinear:
            return NativeLinear(linears, keep, self._product(linears))

        Packing(model, list(find_layers(model)), make).settle()
        if model.get_input_embeddings() is embedding and self._bits([embedding]) is not None:
            parent, name = find_parent(model, embedding)
            parent._modules[name] = NativeEmbedding(self._product([embedding]), self._dtype)
        for name, weight in list(model.named_parameters()):
            if weight.is_meta:
                owner, _, last = name.rpartition(".")
                module = model.get_submodule(owner)
                setattr(module, last, nn.Parameter(self._plain(module, last), requires_grad=False))
        return model

    def _product(self, modules: Sequence[Any]) -> NativeWeight:
        """The weights of layers of one input, in the file's bits where all have as many."""
        given = [self._plain(each, "bias") for each in modules if _has_bias(each)]
        bias = torch.cat(given) if given else None
        if self._bits(modules) is None:
            return pack(torch.cat([self._plain(each, "weight") for each in modules]), bias)
        codes, scales, least = zip(*map(self._groups, modules), strict=True)
        some = None if least[0] is None else torch.cat(least)
        return from_groups(torch.cat(codes), torch.cat(scales), some, bias)

    def _bits(self, modules: Iterable[Any]) -> int | None:
        """Of the layers' weights; None: some are kept in none, or in others than the rest."""
        types = [self._find(each, "weight").tensor_type for each in modules]
        found = {_READERS[kind][0] if kind in _READERS else None for kind in types}
        return found.pop() if len(found) == 1 else None

    def _groups(self, module: Any) -> Groups:
        tensor = self._find(module, "weight")
        rows, columns = module.weight.shape
        blocks = torch.tensor(tensor.data).view(rows, columns // GROUP_SIZE, -1)
        codes, scale, least = _READERS[tensor.tensor_type][1](blocks)
        if (order := self._order(module, rows)) is None:
            return codes, scale, least
        return codes[order], scale[order], None if least is None else least[order]

    def _plain(self, module: Any, name: str) -> torch.Tensor:
        """A dequantised weight in the model's dtype."""
        tensor = self._find(module, name)
        numbers = dequantize(tensor.data, tensor.tensor_type)
        plain = torch.tensor(numbers).view(getattr(module, name).shape).to(self._dtype)
        order = self._order(module, len(plain))
        return plain if order is None else plain[order]

    def _find(self, module: Any, name: str) -> Any:
        """The tensor of a module's parameter; raises ValueError where there is none that fits."""
        own = self._names[module]
        tied = self._tied is not None and getattr(module, name) is self._tied
        stem = "token_embd" if tied else self._map.get_name(own)
        tensor = self._tensors.get(f"{stem}.{name}")
        if tensor is None:
            raise ValueError(f"{own}.{name} is missing")
        wanted, shape = list(getattr(module, name).shape), list(map(int, reversed(tensor.shape)))
        if shape != wanted:
            raise ValueError(f"{own}.{name} is {shape}, not {wanted}")
        return tensor

    def _order(self, module: Any, rows: int) -> torch.Tensor | None:
        """The file's rows in the model's order; None: as they are."""
        kind = self._names[module].rpartition(".")[2]
        if self._architecture not in _ROTARY_PAIRS or kind not in ("q_proj", "k_proj"):
            return None
        config = self._config
        heads = config.num_attention_heads if kind == "q_proj" else config.num_key_value_heads
        return torch.arange(rows).view(heads, rows // heads // 2, 2).transpose(1, 2).reshape(-1)


def _has_bias(module: Any) -> bool:
    return getattr(module, "bias", None) is not None
