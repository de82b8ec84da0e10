"""Where a model keeps its decoder layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from conflayers_cli.errors import InputError


def find_layers(model: nn.Module) -> nn.ModuleList:
    """The ModuleList of decoder layers.

    Raises:
        InputError: there is none.
    """
    get_decoder: Any = getattr(model, "get_decoder", None)
    decoder = get_decoder() if get_decoder is not None else model
    config: Any = getattr(decoder, "config", None)
    depth = getattr(config.get_text_config(), "num_hidden_layers", None) if config else None
    queue: list[nn.Module] = [decoder]
    while queue:
        module = queue.pop(0)
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == depth:
                return child
            queue.append(child)
    raise InputError(f"no list of {depth} decoder layers found in {type(model).__name__}")
