"""Models with an adapter of PEFT beside their weights, as they are in memory.

PEFT puts modules of its own where a model's linear layers were: a LoRA layer holds the linear layer
and two narrow ones, and adds their product to its own (arXiv 2106.09685 §4.1). The decoder layers
stay where they were, so what is left out of a pass, and how, stays as it is; what is done to the
linear layers themselves must not pass by what stands around them.

Nothing here needs PEFT: without it no model has such modules.
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
"""Types of adapters that are decoded with: each changes what linear layers compute of a row, by
that row alone."""

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
"""Settings of a LoRA adapter that make something else of it."""


def unwrapped(model: Any) -> Any:
    """The transformers model that runs behind a ``PeftModel``; any other model as it is.

    Its modules are the adapted ones: it computes the same as the ``PeftModel`` does.

    Raises:
        InputError: its adapter is of a kind that can't be decoded with, or it has several.
    """
    check_configs(getattr(model, "peft_config", None))
    if any(_is_peft(kind) for kind in type(model).__mro__) and hasattr(model, "get_base_model"):
        return model.get_base_model()
    return model


def check_configs(configs: Any) -> None:
    """Refuse adapters that can't be decoded with.

    Args:
        configs: the ``PeftConfig`` of every adapter of a model by its name; None: it has none.

    Raises:
        InputError: there are several, or it is of a kind that can't be; the message says why.
    """
    if not isinstance(configs, Mapping):
        return
    if len(configs) > 1:
        raise InputError(
            f"the model has {len(configs)} adapters ({', '.join(map(str, configs))}), which can be "
            "switched under a decoder's feet: keep one (delete_adapter), or merge them "
            "(merge_and_unload)"
        )
    for config in configs.values():
        check_kind(vars(config), "the model's adapter")


def check_kind(settings: Mapping[str, Any], whose: str) -> None:
    """Refuse an adapter whose settings say that it can't be decoded with.

    Args:
        settings: of its ``PeftConfig``, or of the file that has them.
        whose: whom the error is about.

    Raises:
        InputError: the message says why.
    """
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
    """A module and those within it whose linear children are what a pass calls, parents first.

    Left out is what stands inside an adapted layer, which may read its parts' weights rather than
    call them. A plain LoRA layer only ever calls the linear layer that it holds; its own two it
    asks for their dtype.
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
    """Of one of the modules of :func:`packable`, the children that may be replaced, by name."""
    inside = _is_peft(type(parent))
    for name, child in parent.named_children():
        if not inside or name == "base_layer":
            yield name, child


def calls_its_base(layer: Any) -> bool:
    """Whether a module is a LoRA layer that only calls the layer it holds.

    DoRA's and other variants compute with its weight, too.
    """
    kind = type(layer)
    plain = (kind.__module__, kind.__name__) == ("peft.tuners.lora.layer", "Linear")
    return plain and not getattr(layer, "lora_variant", {"unknown": True})


def is_adapted(model: nn.Module) -> bool:
    """Whether a model has modules of an adapter in it; one whose adapter was merged has none."""
    return any(_is_peft(type(module)) for module in model.modules())


def mixes_dtypes(model: Any) -> bool:
    """Whether an adapter computes in another dtype than the model around it.

    PEFT keeps adapters in float32 unless told otherwise (``autocast_adapter_dtype=False``).
    """
    return any(
        weight.is_floating_point() and weight.dtype != model.dtype
        for module in model.modules()
        if _is_peft(type(module))
        for name, weight in module.named_parameters()
        if "base_layer" not in name and "original_module" not in name
    )


def signature(model: nn.Module) -> str | None:
    """Tells what adapters cost apart, as JSON: how many modules of which kind, and their weights.

    None for models without one.
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
    """A weight of a decoder layer, and the LoRA layer that adds to it, if there is one."""

    plain: torch.Tensor
    adapted_by: Any = None

    def whole(self) -> torch.Tensor:
        """The weight that the layer computes with, in its dtype."""
        if self.adapted_by is None:
            return self.plain
        total = self.plain
        for name in self.adapted_by.active_adapters:
            if name in self.adapted_by.lora_A:
                total = total + self.adapted_by.get_delta_weight(name).to(total.device)
        return total.to(self.plain.dtype)


def weights_of(layer: nn.Module) -> dict[str, Weight] | None:
    """The weights of a decoder layer, under the names that they have without an adapter.

    None: an adapter changes them in another way than by adding to them.
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
