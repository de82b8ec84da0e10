"""Load a model and its tokenizer from a built-in name, folder, GGUF file or Hub id."""

from __future__ import annotations

from dataclasses import replace

import torch

from conflayers_cli.errors import InputError
from conflayers_cli.models.builtin import quiet_transformers
from conflayers_cli.models.device import check_device_map, find_device
from conflayers_cli.models.dtype import check_dtype, choose_dtype
from conflayers_cli.models.few_bits import FewBits
from conflayers_cli.models.gguf_settings import (
    apply_to_config,
    apply_to_model,
    read_gguf_settings,
)
from conflayers_cli.models.gguf_tokenizer import build_tokenizer
from conflayers_cli.models.load_options import LoadOptions
from conflayers_cli.models.loaded_model import LoadedModel, wrap_model
from conflayers_cli.models.native_kernels import NativeKernels
from conflayers_cli.models.peft_loading import CONFIG as ADAPTER_CONFIG
from conflayers_cli.models.peft_loading import Adapter, attach_adapter, check_merge
from conflayers_cli.models.pretrained import (
    check_files,
    read_config,
    read_model,
    read_tokenizer,
    to_device,
)
from conflayers_cli.models.quantization import (
    check_quantize,
    describe_quantization,
    quantization_kwargs,
)
from conflayers_cli.models.source import ModelSource, find_source
from conflayers_cli.models.tensor_parallel import sharding
from conflayers_cli.utils.distributed import join_ranks, run_on_rank0, world
from conflayers_cli.utils.progress import ProgressCallback


def load_model(
    source: str,
    options: LoadOptions | None = None,
    *,
    progress: ProgressCallback | None = None,
    native: NativeKernels | None = None,
) -> LoadedModel:
    """Load a built-in model, a local folder, a ``.gguf`` file or a model of the Hugging Face Hub.

    A built-in name wins over a folder of that name, a local path over a Hub id. Weights come from
    safetensors or GGUF only, never from pickles. Under torchrun each process gets its part of every
    layer. A PEFT adapter is loaded with the base that it names (see :mod:`.peft_loading`).

    Args:
        options: its ``exact`` and ``compiled`` have no effect here.
        progress: called while a model is converted and loaded.
        native: the kernels that will run the model on a CPU, if they can.

    Raises:
        InputError: no such model, device or dtype; broken or refused files; not a causal language
            model, or one that can't be spread so.
        ConfLayersError: it does not fit into the memory, or a conversion failed.
    """
    return _load(source, options or LoadOptions(), progress, native, adapted=False)


def _load(
    source: str,
    options: LoadOptions,
    progress: ProgressCallback | None,
    native: NativeKernels | None,
    *,
    adapted: bool,
) -> LoadedModel:
    """`load_model`; ``adapted``: an adapter is going to be put into the model's layers."""
    check_device_map(options.device_map, options.device)
    join_ranks()  # first: an error of one rank alone is reported by it
    device = find_device(options.device)
    check_dtype(options.dtype)
    check_quantize(options.quantize)
    origin = find_source(source, progress)
    if origin.adapter is not None:
        return _load_adapter(origin, origin.adapter, options, progress, native)
    if options.merge_adapter is not None:
        name = "merge_adapter" if options.merge_adapter else "merge_adapter=False"
        raise InputError(f"{name}: {source} is no adapter: leave it out", names=(f"{name}:",))
    if options.quantize and origin.gguf:
        raise InputError(
            f"quantize takes safetensors, and {source} is a GGUF file", names=("quantize takes",)
        )
    few_bits = FewBits.choose(origin, device, options, native, adapted=adapted)
    return _load_plain(origin, device, options, progress, native, few_bits)


def _load_plain(
    origin: ModelSource,
    device: torch.device,
    options: LoadOptions,
    progress: ProgressCallback | None,
    native: NativeKernels | None,
    few_bits: FewBits,
) -> LoadedModel:
    """Load a model that is no adapter; the options are checked."""
    source, trusted = origin.source, options.trust_remote_code

    def on_step(done: float) -> None:
        if progress:
            progress(f"loading {source}", done)

    on_step(0.0)
    with quiet_transformers(on_step):
        header = read_gguf_settings(origin)  # first: it says more plainly what is wrong
        config = read_config(origin, trusted)
        if header is not None:
            apply_to_config(config, header, source)
        check_files(origin, config)
        measure = native.bfloat16_ratio if native else None
        dtype, reason = run_on_rank0(
            lambda: choose_dtype(options.dtype, device, config, native=measure)
        )
        kwargs = (
            {"device_map": options.device_map} if options.device_map else sharding(config, source)
        )
        bits = None if few_bits.rounds else options.quantize
        quantized = quantization_kwargs(config, source, bits, device, dtype, trusted)
        if quantized is not None:
            kwargs = {**(kwargs or {"device_map": {"": str(device)}}), **quantized}
        model = few_bits.read(origin, config, dtype)
        if model is None:
            model = read_model(origin, config, dtype, trusted, kwargs)
        few_bits.round(model, source, options.quantize)
        if header is None:
            tokenizer = read_tokenizer(origin, trusted)
        else:
            tokenizer = build_tokenizer(header, source)
            apply_to_model(model, header, tokenizer, source)
    on_step(1.0)
    if quantized is not None and model.dtype != dtype:
        reason = f"{str(model.dtype).removeprefix('torch.')}: what its quantised layers compute in"
    for more in (describe_quantization(model.config, bits), few_bits.note):
        reason = f"{reason}; {more}" if more else reason
    if not kwargs:
        model = to_device(model, device, source)
    return wrap_model(model, tokenizer, source, reason)


def _load_adapter(
    origin: ModelSource,
    adapter: Adapter,
    options: LoadOptions,
    progress: ProgressCallback | None,
    native: NativeKernels | None,
) -> LoadedModel:
    """Load an adapter's base, with the adapter, and its tokenizer where it brings one."""
    source = origin.source
    if options.device_map or world().size > 1:
        way = "device_map" if options.device_map else "torchrun"
        raise InputError(
            f"{source} is an adapter, which {way} can't spread: save it merged with its base first "
            "(merge_and_unload and save_pretrained of peft)",
            names=("device_map can't",),
        )
    try:
        if find_source(adapter.base, None).adapter is not None:
            raise InputError(f"{adapter.base} is an adapter itself")
        base_options = replace(options, merge_adapter=None)
        base = _load(adapter.base, base_options, progress, native, adapted=True)
    except InputError as error:
        raise InputError(
            f"{source} is an adapter of {adapter.base!r}: {error}; base_model_name_or_path in its "
            f"{ADAPTER_CONFIG} says where the base is",
            names=error.names,
        ) from error
    merge = check_merge(options.merge_adapter, base.model.config, source)
    model = attach_adapter(base.model, adapter, source, merge=merge)
    tokenizer = base.tokenizer
    if adapter.tokenizer:
        with quiet_transformers():
            tokenizer = read_tokenizer(origin, options.trust_remote_code)
    where = "merged into the weights" if merge else "beside the weights"
    return wrap_model(model, tokenizer, source, f"{base.dtype_reason}; adapter {where}")
