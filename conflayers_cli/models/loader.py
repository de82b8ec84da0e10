"""A name, folder, GGUF file or built-in model → model and tokenizer, ready to run."""

from __future__ import annotations

from typing import Any

import torch

from conflayers_cli.errors import InputError
from conflayers_cli.models.builtin import quiet_transformers
from conflayers_cli.models.device import check_device_map, find_device
from conflayers_cli.models.dtype import check_dtype, choose_dtype
from conflayers_cli.models.loaded_model import LoadedModel, as_loaded
from conflayers_cli.models.peft_loading import CONFIG as ADAPTER_CONFIG
from conflayers_cli.models.peft_loading import Adapter, attach, check_merge
from conflayers_cli.models.pretrained import check_files, read_config, read_model, to_device
from conflayers_cli.models.quantization import check_bits, describe, quantization_kwargs
from conflayers_cli.models.source import ModelSource, find_source, prepare_builtin
from conflayers_cli.models.tensor_parallel import sharding
from conflayers_cli.models.tokenizer import read_tokenizer
from conflayers_cli.utils.distributed import begin, on_first, world
from conflayers_cli.utils.progress import ProgressCallback


def load_model(
    source: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    device_map: str | None = None,
    quantize: str | None = None,
    merge_adapter: bool | None = None,
    progress: ProgressCallback | None = None,
) -> LoadedModel:
    """Load a built-in model, a local folder, a ``.gguf`` file or a model of the Hugging Face Hub.

    A built-in name wins over a folder of that name, a local path over a Hub id. Weights come from
    safetensors or GGUF only, never from pickles. Under torchrun each process gets its part of every
    layer. An adapter of PEFT is loaded with the base that it names (see :mod:`.peft_loading`).

    Args:
        device: ``auto`` (CUDA where there is one, else the CPU), ``cpu``, ``cuda``, ``cuda:1`` or
            ``mps``.
        dtype: ``auto`` (what is fast on the device), ``float32``, ``bfloat16`` or ``float16``.
        trust_remote_code: run Python code that comes with the model.
        device_map: ``auto`` spreads the layers over all devices there are, and over the host's
            memory where those are too small; None: one device.
        quantize: load a plain checkpoint's weights in fewer bits, ``int8`` or ``int4``.
        merge_adapter: add an adapter's weights to its base's; None: where the base's are plain.
        progress: told about conversion and loading.

    Raises:
        InputError: no such model, device or dtype; broken or refused files; not a causal language
            model, or one that can't be spread so.
        ConfLayersError: it does not fit into the memory, or a conversion failed.
    """
    check_device_map(device_map, device)
    begin()  # before files are looked for: what fails on one rank alone is told there
    on = find_device(device)
    check_dtype(dtype)
    check_bits(quantize)
    prepare_builtin(source, progress)
    origin = find_source(source, progress)
    if origin.adapter is not None:
        _check_spread(source, device_map)
        same = {"device": device, "dtype": dtype, "quantize": quantize, "progress": progress}
        base = _load_base(origin.adapter, source, trust_remote_code=trust_remote_code, **same)
        return _adapted(base, origin, origin.adapter, merge_adapter, trust_remote_code)
    if merge_adapter is not None:
        name = "merge_adapter" if merge_adapter else "merge_adapter=False"
        raise InputError(f"{name}: {source} is no adapter: leave it out", names=(f"{name}:",))
    if quantize and origin.gguf:
        raise InputError(
            f"quantize takes safetensors, and {source} is a GGUF file", names=("quantize takes",)
        )
    return _load_whole(
        origin,
        on=on,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        device_map=device_map,
        quantize=quantize,
        progress=progress,
    )


def _load_whole(
    origin: ModelSource,
    *,
    on: torch.device,
    dtype: str,
    trust_remote_code: bool,
    device_map: str | None,
    quantize: str | None,
    progress: ProgressCallback | None,
) -> LoadedModel:
    """A model that is no adapter; the arguments are those of :func:`load_model`, checked."""
    source = origin.source

    def step(done: float) -> None:
        if progress:
            progress(f"loading {source}", done)

    step(0.0)
    with quiet_transformers(step):
        config = read_config(origin, trust_remote_code)
        check_files(origin, config)
        kind, reason = on_first(lambda: choose_dtype(dtype, on, config))
        spreading = {"device_map": device_map} if device_map else sharding(config, source)
        quantising = quantization_kwargs(config, source, quantize, on, kind, trust_remote_code)
        if quantising is not None:
            spreading = {**(spreading or {"device_map": {"": str(on)}}), **quantising}
        model = read_model(origin, config, kind, trust_remote_code, spreading)
        tokenizer = read_tokenizer(origin, trust_remote_code)
    step(1.0)
    if quantising is not None and model.dtype != kind:
        reason = f"{str(model.dtype).removeprefix('torch.')}: what its quantised layers compute in"
    if weights := describe(model.config, quantize):
        reason = f"{reason}; {weights}"
    on_device = model if spreading else to_device(model, on, source)
    return as_loaded(on_device, tokenizer, source, reason)


def _load_base(adapter: Adapter, source: str, **how: Any) -> LoadedModel:
    """The model that an adapter was made for."""
    try:
        if find_source(adapter.base, None).adapter is not None:
            raise InputError(f"{adapter.base} is an adapter itself")
        return load_model(adapter.base, **how)
    except InputError as error:
        raise InputError(
            f"{source} is an adapter of {adapter.base!r}: {error}; base_model_name_or_path in its "
            f"{ADAPTER_CONFIG} says where the base is",
            names=error.names,
        ) from error


def _check_spread(source: str, device_map: str | None) -> None:
    """Refuse to share an adapter's base among devices: what an adapter adds is not shared along."""
    if device_map or world().size > 1:
        way = "device_map" if device_map else "torchrun"
        raise InputError(
            f"{source} is an adapter, which {way} can't spread: save it merged with its base first "
            "(merge_and_unload and save_pretrained of peft)",
            names=("device_map can't",),
        )


def _adapted(
    base: LoadedModel,
    origin: ModelSource,
    adapter: Adapter,
    merge: bool | None,
    trust_remote_code: bool,
) -> LoadedModel:
    """The base with its adapter, and with the adapter's tokenizer where that brings one."""
    source = origin.source
    merged = check_merge(merge, base.model.config, source)
    model = attach(base.model, adapter, source, merge=merged)
    with quiet_transformers():
        own = adapter.tokenizer
        tokenizer = read_tokenizer(origin, trust_remote_code) if own else base.tokenizer
    how = "merged into the weights" if merged else "beside the weights"
    return as_loaded(model, tokenizer, source, f"{base.dtype_reason}; adapter {how}")
