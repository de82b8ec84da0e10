"""What a GGUF file says of its model and transformers passes over: rotary embeddings, windows, soft
caps, biases, sizes of experts, further end tokens, sampling.

A key that nobody reads is named in a note: it may change texts. The tokenizer is in
`gguf_tokenizer`. See ``docs/compatibility.md``.
"""

from __future__ import annotations

import logging
from math import log
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from conflayers_cli.errors import InputError
from conflayers_cli.models.gguf_metadata import GGUFMetadata, read_metadata
from conflayers_cli.models.gguf_tokenizer import READ_KEYS as TOKENIZER_KEYS
from conflayers_cli.models.gguf_vocabulary import (
    END_KEYS,
    NAMED_TOKENS,
    PREFIX,
    end_numbers,
    find_ends,
)
from conflayers_cli.models.source import ModelSource
from conflayers_cli.utils.error_text import first_line

logger = logging.getLogger(__name__)

FACTORS = "rope_freqs.weight"
"""Divisors of the rotary embedding's frequencies, as Llama 3 has them."""
LONG_FACTORS = ("rope_factors_long.weight", "rope_factors_short.weight")
ATTRIBUTES = {
    "attention.key_length": "head_dim",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
"""Keys of an architecture that are taken where its config has such an attribute."""
BIASES = {"blk.0.attn_q.bias": "attention_bias", "blk.0.ffn_down.bias": "mlp_bias"}
"""Tensors that say whether a config's layers have biases."""
WINDOW, SCALE = "attention.sliding_window", "attention.scale"
ROPE_KEYS = frozenset(
    {
        *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"),
        *("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.finetuned"),
        *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.scale_linear"),
        *("rope.freq_base", "rope.freq_base_swa", "rope.dimension_count"),
    }
)
"""Keys of an architecture that are followed, or refused, here."""
WITHOUT_EFFECT = frozenset(
    {
        "tensor_data_layout",
        "leading_dense_block_count",
        "attention.causal",
        "attention.value_length",
        "attention.clamp_kqv",
        "pooling_type",
    }
)
"""Keys that change nothing in the families supported, or that shapes tell as well."""
SAMPLING_KEYS = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
}
_OWN_CONFIGS = ("gemma4", "qwen35", "qwen35moe", "lfm2")
"""Architectures whose attention transformers reads as a whole."""
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}
"""Layers of those models of a family whose queries are scaled by the width, not by a head's size:
no key says so, and llama.cpp knows them by their layers, too."""


def read_gguf_settings(origin: ModelSource) -> GGUFMetadata | None:
    """The header of a model's GGUF file; None: it has none.

    Raises:
        InputError: it is broken, a part of a model, or no model.
    """
    if origin.gguf is None:
        return None
    path = Path(origin.location) / origin.gguf
    try:
        known = read_metadata(path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {origin.source}: {error}") from error
    parts = known.values.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        raise InputError(
            f"{origin.source} is one of {parts} parts of a model: join them first "
            "(llama-gguf-split --merge FIRST-PART WHOLE.gguf)"
        )
    kind = known.values.get("general.type", "model")
    if kind != "model":
        raise InputError(f"{origin.source} is no model: its general.type is {str(kind)[:40]!r}")
    return known


def apply_to_config(config: Any, known: GGUFMetadata, source: str) -> None:
    """Put what the file says into a configuration, and note what is not followed.

    Raises:
        InputError: the rotary embedding is of a kind that can't be had from a GGUF file, or a value
            is of a type that the configuration does not take, or out of range.
    """
    try:
        _apply_to_config(config.get_text_config(), known, source)
    except (StrictDataclassError, TypeError, ArithmeticError, ValueError) as error:
        raise InputError(f"the metadata of {source} is broken: {first_line(error)}") from error


def _apply_to_config(text: Any, known: GGUFMetadata, source: str) -> None:
    embedding = known.tensors.get("token_embd.weight")
    if embedding is not None and len(embedding[1]) == 2:
        text.vocab_size = embedding[1][1]
    followed = set()
    if known.architecture not in _OWN_CONFIGS:
        followed = _apply_attention(text, known)
    _apply_rope(text, known, source)
    if unread := unread_keys(known, followed):
        logger.warning(f"note: {', '.join(unread)} in {source} is not followed")


def _apply_attention(text: Any, known: GGUFMetadata) -> set[str]:
    """What changes a layer's computation; returns the keys that were followed."""
    followed = set()
    for key, name in ATTRIBUTES.items():
        value = known.number(key)
        if value is not None and hasattr(text, name):
            setattr(text, name, value)
            followed.add(key)
        elif name == "head_dim" and value == _head_size(text):
            followed.add(key)
    for tensor, name in BIASES.items():
        if hasattr(text, name):
            setattr(text, name, tensor in known.tensors)
    kinds = getattr(text, "layer_types", None)
    window = known.number(WINDOW) or None
    if kinds is None and hasattr(text, "sliding_window"):
        text.sliding_window = window  # else a config's own default would hold
        followed.add(WINDOW)
    elif kinds is not None and "sliding_attention" in kinds and window:
        text.sliding_window = window
        followed.add(WINDOW)
    elif window is None or window >= (known.number("context_length") or 0):
        followed.add(WINDOW)
    if hasattr(text, "query_pre_attn_scalar"):
        size: float = text.head_dim
        if text.num_hidden_layers == _SCALED_BY_WIDTH.get(known.architecture):
            size = text.hidden_size / text.num_attention_heads
        scale = known.number(SCALE)
        text.query_pre_attn_scalar = round(scale**-2 if scale else size)
        followed.add(SCALE)
    return followed


def _apply_rope(text: Any, known: GGUFMetadata, source: str) -> None:
    """The rotary embedding's base, how much of a head it turns, and its scaling."""
    before = getattr(text, "rope_parameters", None)
    if not isinstance(before, dict):  # no rotary embedding
        return
    own = _scaling(known, source)
    if base := known.number("rope.freq_base"):
        own["rope_theta"] = float(base)
    turned, size = known.number("rope.dimension_count"), _head_size(text)
    if "partial_rotary_factor" in before and known.architecture not in _OWN_CONFIGS:
        own["partial_rotary_factor"] = turned / size if turned and size else 1.0
    elif turned and size and turned != size and not hasattr(text, "rotary_dim"):
        raise InputError(
            f"{source} turns {turned} of the {size} numbers of a head, which models of type "
            f"{text.model_type} can't: give the model's folder with safetensors"
        )
    if "full_attention" in before:
        windowed = dict(before.get("sliding_attention") or {})
        if base := known.number("rope.freq_base_swa"):
            windowed["rope_theta"] = float(base)
        full = {**before["full_attention"], **own}
        text.rope_parameters = {**before, "sliding_attention": windowed, "full_attention": full}
    elif own:
        text.rope_parameters = {**before, **own}


def _head_size(text: Any) -> int | None:
    own = getattr(text, "head_dim", None)
    heads = getattr(text, "num_attention_heads", None)
    if isinstance(own, int) or not heads:
        return own
    return int(text.hidden_size // heads)


def _scaling(known: GGUFMetadata, source: str) -> dict[str, Any]:
    """The entries of ``rope_parameters``; none: there is no scaling."""
    kind = known.get("rope.scaling.type")
    factor = known.number("rope.scaling.factor", "rope.scale_linear")
    if kind is None and known.get("rope.scale_linear"):
        kind = "linear"
    if kind == "longrope" or any(name in known.tensors for name in LONG_FACTORS):
        raise InputError(
            f"{source} has RoPE scaling of the kind longrope, which is not read from GGUF files: "
            "give the model's folder with safetensors"
        )
    if kind in (None, "none") or not factor or factor == 1.0:
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(factor)}
    if kind != "yarn":
        raise InputError(f"{source} has RoPE scaling of the kind {kind!r:.60}: not supported")
    found = {"rope_type": "yarn", "factor": float(factor)}
    if (trained := known.number("rope.scaling.original_context_length")) is not None:
        found["original_max_position_embeddings"] = int(trained)
    for name in ("beta_fast", "beta_slow"):
        if (beta := known.number(f"rope.scaling.yarn_{name}")) is not None:
            found[name] = float(beta)
    more = known.number("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor")
    if more is not None and more != 1.0:
        # llama.cpp multiplies YaRN's own factor, transformers takes the product
        found["attention_factor"] = float(more) * (0.1 * log(factor) + 1)
    return found


def unread_keys(known: GGUFMetadata, followed: set[str]) -> list[str]:
    """Keys that may change texts and that nobody reads; ``followed``: by a config's attributes."""
    name = known.architecture
    read = {
        key
        for kind, keys in GGUF_CONFIG_MAPPING.items()
        if _plain(kind) in (_plain(name), "mistral", "general")
        for key in keys
    }
    read |= ROPE_KEYS | WITHOUT_EFFECT | followed
    own = (key.removeprefix(f"{name}.") for key in known.values if key.startswith(f"{name}."))
    unread = [f"{name}.{key}" for key in own if key not in read]
    tokenizer = TOKENIZER_KEYS | {*NAMED_TOKENS.values(), *END_KEYS}
    unread += [
        key
        for key in known.values
        if (key.startswith(PREFIX) and key not in tokenizer)
        or (key.startswith("general.sampling.") and key not in SAMPLING_KEYS)
    ]
    if known.values.get(f"{PREFIX}add_sep_token"):
        unread.append(f"{PREFIX}add_sep_token")
    return sorted(unread)


def _plain(architecture: str) -> str:
    return architecture.replace("_", "").replace("-", "")


def apply_to_model(model: Any, known: GGUFMetadata, tokenizer: Any, source: str) -> None:
    """Further end tokens, sampling, and the factors of the rotary embedding's frequencies.

    Raises:
        InputError: the factors are cut off.
    """
    settings = model.generation_config
    if settings is not None:
        own = settings.eos_token_id
        before = own if isinstance(own, list) else [] if own is None else [own]
        if not before:
            before = end_numbers(known, (NAMED_TOKENS["eos_token"],))
        named = find_ends(tokenizer.backend_tokenizer.token_to_id)
        ends = [*before, *end_numbers(known, END_KEYS), *named.values()]
        settings.eos_token_id = list(dict.fromkeys(ends)) or None
        given = {name: known.values.get(key) for key, name in SAMPLING_KEYS.items()}
        for name, value in given.items():
            if value is not None:
                setattr(settings, name, value)
                settings.do_sample = given["temperature"] != 0
    try:
        factors = known.floats(FACTORS)
    except ValueError as error:
        raise InputError(f"cannot read {source}: {error}") from error
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    if factors is None or rotary is None or len(factors) != len(rotary.inv_freq):
        return
    divided = rotary.inv_freq / torch.from_numpy(factors).to(rotary.inv_freq)
    rotary.inv_freq = divided
    if hasattr(rotary, "original_inv_freq"):
        rotary.original_inv_freq = divided.clone()
