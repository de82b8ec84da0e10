"""A model's configuration and weights, read from its files, checked before and after."""

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
    PreTrainedConfig,
    PreTrainedModel,
)

from conflayers_cli.errors import ConfLayersError, InputError
from conflayers_cli.models.builtin import clear_gguf_leftovers
from conflayers_cli.models.checkpoint import check_config, check_json, check_size, stored
from conflayers_cli.models.registry import GENERATIVE
from conflayers_cli.models.source import READ_ERRORS, ModelSource, unreadable


def read_config(origin: ModelSource, trust_remote_code: bool) -> PreTrainedConfig:
    """The config. Refuses what brings code of its own, and what is not a causal language model."""
    try:
        if origin.gguf is None and not origin.on_hub:
            check_json(Path(origin.place))
        raw = _raw_config(origin)
        if not trust_remote_code:
            check_config(raw, origin.source)
        if raw.get("auto_map") and not trust_remote_code:
            raise InputError(
                f"{origin.source} brings Python code of its own (auto_map in config.json): "
                "trust_remote_code lets it run",
                names=("trust_remote_code lets",),
            )
        config = AutoConfig.from_pretrained(
            origin.place, trust_remote_code=trust_remote_code, **origin.arguments
        )
    except READ_ERRORS as error:
        raise unreadable(origin, "config", error) from error
    depth = getattr(config.get_text_config(), "num_hidden_layers", None)
    if not isinstance(depth, int) or depth < 1:
        raise InputError(f"the config of {origin.source} is broken: it names no number of layers")
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(context, int) and context < 1:
        raise InputError(
            f"the config of {origin.source} is broken: max_position_embeddings is {context}"
        )
    names = getattr(config, "architectures", None) or [type(config).__name__]
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{origin.source} is an encoder-decoder model ({names[0]}): not supported")
    is_ours = getattr(config, "model_type", None) in CONFIG_MAPPING
    has_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) is not None
    if is_ours and not (has_class or "AutoModelForCausalLM" in raw.get("auto_map", {})):
        raise InputError(f"{origin.source} is not a causal language model ({names[0]})")
    if raw.get("architectures") and not any(name.endswith(GENERATIVE) for name in names):
        raise InputError(f"{origin.source} is not a causal language model ({names[0]})")
    return config


def _raw_config(origin: ModelSource) -> dict[str, Any]:
    """The configuration as its file has it."""
    raw, _ = PreTrainedConfig.get_config_dict(origin.place, **origin.arguments)
    if not isinstance(raw, dict):
        raise ValueError("config.json holds no JSON object")
    return raw


def check_files(origin: ModelSource, config: PreTrainedConfig) -> None:
    """See that the weights can be the model's before it is made."""
    try:
        raw = _raw_config(origin)
        holds = stored(origin.place, origin.arguments, raw)
        if holds.odd:
            raise InputError(
                f"the weights of {origin.source} are broken: {holds.odd[0]} holds {holds.odd[1]}, "
                "which are no weights"
            )
        if not raw.get("auto_map"):
            check_size(config, holds, origin.source)
    except READ_ERRORS as error:
        raise unreadable(origin, "weights", error) from error


def read_model(
    origin: ModelSource,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    trust_remote_code: bool,
    spreading: Mapping[str, Any],
) -> PreTrainedModel:
    """The model, complete, without gradients: on the CPU, or as ``spreading`` has it spread."""
    safetensors = {} if origin.gguf else {"use_safetensors": True}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            origin.place,
            config=config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            # Reported below instead of by an exception that names no weight.
            ignore_mismatched_sizes=True,
            **safetensors,
            **spreading,
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
