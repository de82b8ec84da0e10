"""Models with a PEFT adapter in memory; PEFT itself is not needed here.

PEFT replaces a model's linear layers by modules that hold them: a LoRA layer has the linear layer
and two narrow ones, whose product it adds (arXiv 2106.09685 §4.1).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from conflayers_cli.errors import InputError

KINDS = ("LORA", "ADALORA", "IA3", "LOHA", "LOKR", "VERA", "OFT")
"""Supported adapters: each changes what linear layers compute of a token, by that token alone."""

_VIRTUAL = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CPT")

_REFUSED_SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        "alora_invocation_tokens": "it begins to act at a place in the text",
        "arrow_config": "it chooses among several adapters",
        "layer_replication": "it has other layers than its base",
        "megatron_config": "it is made for Megatron's layers",
        "monteclora_config": "it draws its weights at random",
    }
)
"""Settings of LoRA that are not supported, and why."""


def unwrap_peft(model: Any) -> Any:
    """The transformers model inside a ``PeftModel``, which computes the same; others as they are.

    Raises:
        InputError: it has several adapters, or an unsupported one.
    """
    configs = getattr(model, "peft_config", None)
    if isinstance(configs, Mapping):  # by the adapters' names
        if len(configs) > 1:
            raise InputError(
                f"the model has {len(configs)} adapters ({', '.join(map(str, configs))}), which "
                "can be switched under a decoder's feet: keep one (delete_adapter), or merge them "
                "(merge_and_unload)"
            )
        for config in configs.values():
            check_kind(vars(config), "the model's adapter")
    if any(_is_peft(kind) for kind in type(model).__mro__) and hasattr(model, "get_base_model"):
        return model.get_base_model()
    return model


def check_kind(settings: Mapping[str, Any], whose: str) -> None:
    """Raise InputError about ``whose`` adapter where its settings are not supported."""
    given = settings.get("peft_type")
    kind = str(getattr(given, "value", given))
    if kind in _VIRTUAL:
        raise InputError(
            f"{whose} is of the kind {kind}: it puts virtual tokens before the text, and the "
            "positions of drafts know of no such tokens; not supported"
        )
    if kind not in KINDS:
        raise InputError(f"{whose} is of the kind {kind[:100]!r}: there is {', '.join(KINDS)}")
    for name, reason in _REFUSED_SETTINGS.items():
        if settings.get(name):
            raise InputError(f"{whose} has {name}: {reason}; not supported")


def packable(root: nn.Module) -> Iterator[nn.Module]:
    """A module and those within it that call their linear children, parents first.

    Adapted layers are left out, as they may read their parts' weights, except for plain LoRA
    layers: those only call the linear layer that they hold, and ask their own two for their dtype.
    """
    yield root
    if _is_peft(type(root)):
        return
    for child in root.children():
        if not _is_peft(type(child)):
            yield from packable(child)
        elif calls_its_base(child):
            yield child


def packable_children(parent: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children of one of the modules of :func:`packable` that may be replaced, by name."""
    inside = _is_peft(type(parent))
    for name, child in parent.named_children():
        if not inside or name == "base_layer":
            yield name, child


def calls_its_base(layer: Any) -> bool:
    """Whether a module is a plain LoRA layer; DoRA and others also read the weight they hold."""
    kind = type(layer)
    plain = (kind.__module__, kind.__name__) == ("peft.tuners.lora.layer", "Linear")
    return plain and not getattr(layer, "lora_variant", {"unknown": True})


def mixes_dtypes(model: Any) -> bool:
    """Whether an adapter's dtype is not the model's, as PEFT's float32 by default."""
    return any(
        weight.is_floating_point() and weight.dtype != model.dtype
        for module in model.modules()
        if _is_peft(type(module))
        for name, weight in module.named_parameters()
        if "base_layer" not in name and "original_module" not in name
    )


def adapter_key(model: nn.Module) -> str | None:
    """The classes of an adapter's modules, with their numbers of modules and weights, as JSON.

    Passes with the same cost alike. None for models without an adapter.
    """
    found: dict[str, list[int]] = {}
    for module in model.modules():
        if _is_peft(type(module)):
            counts = found.setdefault(type(module).__name__, [0, 0])
            counts[0] += 1
            counts[1] += sum(weight.numel() for weight in module.parameters())
    return json.dumps(found, sort_keys=True) if found else None


@dataclass(frozen=True)
class Weight:
    """A weight of a decoder layer, and the LoRA layer that adds to it, if any."""

    plain: torch.Tensor
    adapted_by: Any = None

    def whole(self) -> torch.Tensor:
        """The weight with what the adapter adds, in its dtype."""
        if self.adapted_by is None:
            return self.plain
        total = self.plain
        for name in self.adapted_by.active_adapters:
            if name in self.adapted_by.lora_A:
                total = total + self.adapted_by.get_delta_weight(name).to(total.device)
        return total.to(self.plain.dtype)


def layer_weights(layer: nn.Module) -> dict[str, Weight] | None:
    """A decoder layer's weights by their names without an adapter.

    None: an adapter changes them otherwise than by adding to them.
    """
    found: dict[str, Weight] = {}
    adapted = [(name, module) for name, module in layer.named_modules() if _is_peft(type(module))]
    for name, module in adapted:
        if not calls_its_base(module):
            return None
        if not (module.merged or module.disable_adapters):
            found[f"{name}.weight"] = Weight(module.base_layer.weight, module)
    inside = tuple(f"{name}." for name, _ in adapted)
    for name, weight in layer.named_parameters():
        if not name.startswith(inside):
            found[name] = Weight(weight)
        elif ".base_layer." in name:
            found.setdefault(name.replace(".base_layer.", ".", 1), Weight(weight))
    return found


def _is_peft(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "peft"
