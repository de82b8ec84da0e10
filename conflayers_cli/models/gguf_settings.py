"""What a GGUF file says and transformers passes over: RoPE scaling, further end tokens, how text is
split before its tokens are found, whether a text begins with a special token.

A key of the architecture that neither of us reads is named in a note: it may change texts. See
``docs/compatibility.md``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from tokenizers import Regex, pre_tokenizers, processors
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from conflayers_cli.errors import InputError
from conflayers_cli.models.gguf_metadata import GGUFMetadata, read_metadata
from conflayers_cli.models.source import ModelSource

logger = logging.getLogger(__name__)

END_KEYS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
"""Ends of a turn and of a message, which end a text as the end of text does."""
FACTORS = "rope_freqs.weight"
"""Divisors of the rotary embedding's frequencies, as Llama 3 has them."""
LONG_FACTORS = ("rope_factors_long.weight", "rope_factors_short.weight")
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
GPT2, DIGITS = "gpt-2", "digits"
PRE_TOKENIZERS: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jina-es", "jina-de", "gigachat"), GPT2)
    | dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), DIGITS)
    | dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "smaug-bpe", "dbrx"), _LLAMA3)
    | dict.fromkeys(("qwen2", "stablelm2", "megrez", "deepseek-r1-qwen"), _QWEN2)
)
"""How llama.cpp's pre-tokenizers split a text: a regular expression, or one of two kinds."""
READ_HERE = frozenset(
    {
        *(f"rope.scaling.{name}" for name in ("type", "factor", "original_context_length")),
        *(f"rope.scaling.{name}" for name in ("attn_factor", "finetuned", "yarn_log_multiplier")),
        "rope.scale_linear",
    }
)
"""Keys of an architecture that are followed, or refused, here."""
WITHOUT_EFFECT = frozenset(
    {
        "tensor_data_layout",
        "leading_dense_block_count",
        "attention.causal",
        "attention.key_length",
        "attention.value_length",
        "attention.clamp_kqv",
        "pooling_type",
    }
)
"""Keys that change nothing in the families supported, or that shapes tell as well."""


def read_gguf_settings(origin: ModelSource) -> GGUFMetadata | None:
    """The header of a model's GGUF file; None: it has none. InputError: it is broken."""
    if origin.gguf is None:
        return None
    path = Path(origin.location) / origin.gguf
    try:
        return read_metadata(path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {origin.source}: {error}") from error


def apply_to_config(config: Any, known: GGUFMetadata, source: str) -> None:
    """Put the RoPE scaling into a configuration, and note what is not followed.

    Raises:
        InputError: the scaling is of a kind that can't be had from a GGUF file.
    """
    text = config.get_text_config()
    scaling = _scaling(known, source)
    if scaling:
        before = dict(getattr(text, "rope_parameters", None) or {})
        text.rope_parameters = {**before, **scaling}
    if unread := unread_keys(known):
        logger.warning(f"note: {', '.join(unread)} in {source} is not followed")


def _scaling(known: GGUFMetadata, source: str) -> dict[str, Any]:
    """The entries of ``rope_parameters``; none: there is no scaling."""
    kind = known.get("rope.scaling.type")
    factor = known.get("rope.scaling.factor", known.get("rope.scale_linear", 1.0))
    trained = known.get("rope.scaling.original_context_length")
    for value in (factor, 0 if trained is None else trained):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"{source} is broken: its RoPE scaling has {value!r:.60}")
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
    if kind == "yarn":
        more = {} if trained is None else {"original_max_position_embeddings": int(trained)}
        return {"rope_type": "yarn", "factor": float(factor), **more}
    raise InputError(f"{source} has RoPE scaling of the kind {kind!r:.60}: not supported")


def unread_keys(known: GGUFMetadata) -> list[str]:
    """Keys of the architecture that nobody reads."""
    name = known.architecture
    read = {
        key
        for kind, keys in GGUF_CONFIG_MAPPING.items()
        if kind.replace("_", "") in (name, name.replace("_", ""), "mistral", "general")
        for key in keys
    }
    own = (key.removeprefix(f"{name}.") for key in known.values if key.startswith(f"{name}."))
    return sorted(f"{name}.{key}" for key in own if key not in read | READ_HERE | WITHOUT_EFFECT)


def apply_to_model(model: Any, known: GGUFMetadata, source: str) -> None:
    """Further end tokens, and the factors of the rotary embedding's frequencies.

    Raises:
        InputError: the factors are cut off.
    """
    ends = [known.values[key] for key in END_KEYS if isinstance(known.values.get(key), int)]
    if ends and model.generation_config is not None:
        own = model.generation_config.eos_token_id
        before = own if isinstance(own, list) else [] if own is None else [own]
        if not before and isinstance(known.values.get("tokenizer.ggml.eos_token_id"), int):
            before = [known.values["tokenizer.ggml.eos_token_id"]]
        model.generation_config.eos_token_id = list(dict.fromkeys([*before, *ends]))
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


def apply_to_tokenizer(tokenizer: Any, known: GGUFMetadata, source: str) -> None:
    """How text is split, and what a text begins with."""
    backend, name = getattr(tokenizer, "backend_tokenizer", None), "tokenizer.ggml.pre"
    if backend is None:
        return
    if known.values.get("tokenizer.ggml.model") == "gpt2" and name in known.values:
        split = PRE_TOKENIZERS.get(str(known.values[name]))
        if split is None:
            logger.warning(
                f"note: {source} splits text as {known.values[name]!r} does, which is not known: "
                "its tokens may be others than the model was trained on"
            )
        else:
            backend.pre_tokenizer = _pre_tokenizer(split)
    begins = known.values.get("tokenizer.ggml.add_bos_token")
    if begins is None or tokenizer.bos_token is None:
        return
    ids = tokenizer("a")["input_ids"]
    if begins != (ids[:1] == [tokenizer.bos_token_id]):
        first = f"{tokenizer.bos_token} " if begins else ""
        special = [(tokenizer.bos_token, tokenizer.bos_token_id)] if begins else []
        backend.post_processor = processors.TemplateProcessing(
            single=f"{first}$A", pair=f"{first}$A {first}$B", special_tokens=special
        )


def _pre_tokenizer(split: str) -> Any:
    if split == GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split == DIGITS:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
