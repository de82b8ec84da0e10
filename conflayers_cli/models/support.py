"""What a model's kind tells before it runs: whether it can be decoded exactly, and how far."""

from __future__ import annotations

from typing import Any

from conflayers_cli.errors import InputError


def refuse_unsupported(model: Any, config: Any) -> None:
    """Raise InputError where it is plain from a model's kind that it can't be decoded exactly."""
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
    """The values that a size of a configuration has over the layers, each once; none: it has none.

    Asked for a size in which layers differ (Gemma 4's ``head_dim``), a configuration of
    transformers raises an error unless the layer is named.
    """
    layers = getattr(config, "per_layer_config", None) or (config,)
    values = dict.fromkeys(getattr(layer, name, None) for layer in layers)
    return tuple(int(value) for value in values if value is not None)


def exact_positions(config: Any) -> int | None:
    """Length up to which a token's keys don't depend on the pass that made them; None: unbounded.

    "dynamic" and "longrope" rotations turn all tokens of a pass by angles that depend on its last
    position once that lies beyond the trained length: drafts checked together, or a prompt read in
    chunks, would not get the angles that transformers gives them.
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


def triton_errors() -> tuple[type[Exception], ...]:
    """What triton raises where a kernel can't be compiled or run here; none without it."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return ()
    return (TritonError,)
