"""Which architectures can be decoded exactly, and the facts about one that this depends on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from conflayers_cli.errors import InputError

if TYPE_CHECKING:
    from torch import nn


def attention_kinds(config: Any, depth: int) -> list[str]:
    """Of each layer: "full_attention" or "sliding_attention"."""
    window = getattr(config, "sliding_window", None)
    default = "sliding_attention" if window else "full_attention"
    return list(getattr(config, "layer_types", None) or [default] * depth)


def refuse_unsupported(model: Any, config: Any) -> None:
    """Raise InputError for an architecture that can't be decoded exactly."""
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError(f"{name} is an encoder-decoder model; only decoders can be decoded here")
    if sharing := getattr(config, "num_kv_shared_layers", None):
        raise InputError(
            f"{name}'s last {sharing} layers use the keys and values of layers before them, which "
            "would be lost with the layer where one is left out; not supported"
        )
    kinds = set(getattr(config, "layer_types", None) or ()) - {
        "full_attention",
        "sliding_attention",
    }
    if kinds:
        raise InputError(
            f"{name} has layers of the kind {', '.join(sorted(kinds))}, whose state can't be "
            "rolled back token by token; only full and sliding-window attention can be exact"
        )
    if not getattr(model, "_supports_attention_backend", False):
        raise InputError(f"{name} does not use transformers' attention interface; not supported")


def sizes_by_layer(config: Any, name: str) -> tuple[int, ...]:
    """The distinct values of a size over the layers; empty where the configuration has none.

    A configuration whose layers differ in it (Gemma 4's ``head_dim``) raises an error unless the
    layer is named.
    """
    layers = getattr(config, "per_layer_config", None) or (config,)
    values = dict.fromkeys(getattr(layer, name, None) for layer in layers)
    return tuple(int(value) for value in values if value is not None)


def exact_positions(config: Any) -> int | None:
    """Length up to which a token's keys don't depend on the pass that made them; None: unbounded.

    Beyond the trained length "dynamic" and "longrope" rotate all tokens of a pass by angles that
    depend on its last position: drafts and chunks of a prompt would get other ones.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    by_kind = rope.values() if all(isinstance(v, dict) for v in rope.values()) else [rope]
    lengths = [
        entry.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
        for entry in by_kind
        if entry.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(map(int, lengths), default=None)


def context_length(config: Any) -> int | None:
    """Tokens that a model takes, prompt and answer together; None: its configuration names none.

    With "linear", "dynamic" and "yarn" scaling ``max_position_embeddings`` is the trained length in
    most configurations, and the factor says what becomes of it. "llama3" and "longrope" models name
    the scaled length, as do those whose kinds of layers differ (Gemma 3), and GGUF files.
    """
    length = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    factor = rope.get("factor")
    if not isinstance(length, int) or not isinstance(factor, int | float) or not factor > 1:
        return length if isinstance(length, int) else None
    if rope.get("rope_type") in ("linear", "dynamic"):
        return int(length * factor)
    if rope.get("rope_type") == "yarn":
        trained = rope.get("original_max_position_embeddings") or length
        return max(length, int(trained * factor))
    return length


def find_layers(model: nn.Module) -> nn.ModuleList:
    """The ModuleList of decoder layers; InputError where there is none."""
    from torch import nn

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
