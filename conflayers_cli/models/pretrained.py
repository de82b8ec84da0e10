"""Reading and checking a model's configuration, weights and tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from conflayers_cli.errors import ConfLayersError, InputError
from conflayers_cli.models.builtin import clear_gguf_leftovers
from conflayers_cli.models.checkpoint import (
    check_config,
    check_json,
    check_remote_code,
    check_size,
    inspect_weights,
)
from conflayers_cli.models.registry import GENERATIVE
from conflayers_cli.models.source import READ_ERRORS, ModelSource, unreadable


def read_config(origin: ModelSource, trust_remote_code: bool) -> PreTrainedConfig:
    """The config; InputError where it has code of its own or is not a causal language model's."""
    try:
        if origin.gguf is None and not origin.on_hub:
            check_json(Path(origin.location))
        raw = _raw_config(origin)
        if not trust_remote_code:
            check_config(raw, origin.source)
            check_remote_code(raw, origin.source, "config.json")
        config = AutoConfig.from_pretrained(
            origin.location, trust_remote_code=trust_remote_code, **origin.arguments
        )
    except READ_ERRORS as error:
        raise unreadable(origin, "config", error) from error
    text = config.get_text_config()
    depth = getattr(text, "num_hidden_layers", None)
    if not isinstance(depth, int) or depth < 1:
        raise InputError(f"the config of {origin.source} is broken: it names no number of layers")
    context = getattr(text, "max_position_embeddings", None)
    if isinstance(context, int) and context < 1:
        raise InputError(
            f"the config of {origin.source} is broken: max_position_embeddings is {context}"
        )
    names = getattr(config, "architectures", None) or [type(config).__name__]
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{origin.source} is an encoder-decoder model ({names[0]}): not supported")
    is_known = getattr(config, "model_type", None) in CONFIG_MAPPING
    has_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) is not None
    no_class = is_known and not (has_class or "AutoModelForCausalLM" in raw.get("auto_map", {}))
    named = raw.get("architectures")
    if no_class or (named and not any(name.endswith(GENERATIVE) for name in names)):
        raise InputError(f"{origin.source} is not a causal language model ({names[0]})")
    return config


def _raw_config(origin: ModelSource) -> dict[str, Any]:
    """The content of the configuration file."""
    raw, _ = PreTrainedConfig.get_config_dict(origin.location, **origin.arguments)
    if not isinstance(raw, dict):
        raise ValueError("config.json holds no JSON object")
    return raw


def check_files(origin: ModelSource, config: PreTrainedConfig) -> None:
    """Compare the weight files with the config before the model is built."""
    try:
        raw = _raw_config(origin)
        stored = inspect_weights(origin.location, origin.arguments, raw)
        if stored.non_float:
            name, dtype = stored.non_float
            raise InputError(
                f"the weights of {origin.source} are broken: {name} holds {dtype}, which are no "
                "weights"
            )
        if not raw.get("auto_map"):
            check_size(config, stored, origin.source)
    except READ_ERRORS as error:
        raise unreadable(origin, "weights", error) from error


def read_model(
    origin: ModelSource,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    trust_remote_code: bool,
    kwargs: Mapping[str, Any],
) -> PreTrainedModel:
    """The model in evaluation mode, on the CPU or where ``kwargs`` of from_pretrained put it."""
    safetensors = {} if origin.gguf else {"use_safetensors": True}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            origin.location,
            config=config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            # reported below, by name
            ignore_mismatched_sizes=True,
            **safetensors,
            **kwargs,
            **origin.arguments,
        )
    except torch.OutOfMemoryError as error:
        raise ConfLayersError(f"{origin.source} does not fit into the devices' memory") from error
    except READ_ERRORS as error:
        raise unreadable(origin, "weights", error) from error
    for fault, keys in (("missing", "missing_keys"), ("of another shape", "mismatched_keys")):
        if names := sorted(key if isinstance(key, str) else key[0] for key in info[keys]):
            raise InputError(
                f"the weights of {origin.source} don't fit its config: {len(names)} {fault}, "
                f"the first is {names[0]}"
            )
    if origin.gguf:
        clear_gguf_leftovers(model)
    return finish_model(model)


def finish_model(model: PreTrainedModel) -> PreTrainedModel:
    """A model for inference alone, whose config names its class."""
    if not model.config.architectures:
        model.config.architectures = [type(model).__name__]
    model.eval()
    model.requires_grad_(False)
    return model


def to_device(model: PreTrainedModel, device: torch.device, source: str) -> PreTrainedModel:
    try:
        return model.to(device)
    except torch.OutOfMemoryError as error:
        advice = ""
        if device.type == "cuda" and torch.cuda.device_count() > 1:
            advice = ": device_map auto, or torchrun, spreads it over several devices"
        raise ConfLayersError(
            f"{source} does not fit into the memory of {device}{advice}",
            names=("device_map auto",),
        ) from error


def read_tokenizer(origin: ModelSource, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer; InputError where it has code of its own or is broken."""
    try:
        if origin.gguf is None and not trust_remote_code:
            raw = get_tokenizer_config(origin.location, **origin.arguments)
            check_remote_code(raw, origin.source, "tokenizer_config.json")
        return AutoTokenizer.from_pretrained(
            origin.location, trust_remote_code=trust_remote_code, **origin.arguments
        )
    except InputError:
        raise
    except Exception as error:  # the tokenizers package raises bare ones
        raise unreadable(origin, "tokenizer", error) from error
