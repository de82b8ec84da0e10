"""Weights in fewer bits: quantised checkpoints, and quantising plain ones while they are loaded.

The latter is done by native kernels where they run (:mod:`.few_bits`), else by torchao: one package
for CPU and CUDA that computes with the layers' own inputs.
bitsandbytes' int8 rounds the inputs, and which of their columns it leaves out depends on all rows
of a pass (LLM.int8(), arXiv 2208.07339 §3). Whether a model's kernels give a token the same bits
beside other tokens is tested when it is opened (`conflayers_cli.engine.batch_invariance`).
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterable, Mapping
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from conflayers_cli.errors import InputError
from conflayers_cli.models.native_kernels import METHOD

BITS = ("int8", "int4")
GROUPS = (128, 64, 32)
"""Sizes of int4 groups; the largest that divides a model's sizes is taken."""

_PACKAGES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "awq": ("gptqmodel",),
        "bitsandbytes": ("bitsandbytes",),
        "compressed-tensors": ("compressed-tensors",),
        "gptq": ("optimum", "gptqmodel"),
        "torchao": ("torchao",),
    }
)
"""Packages that transformers needs for a method."""

# modules that round their inputs
_ROUNDING = frozenset({"Linear8bitLt", "Linear4bit"})


def quantization_method(config: Any) -> str | None:
    """The method of a config's quantised weights: ``gptq``, ``torchao``, …

    None for plain weights, also from GGUF files, which transformers dequantises.
    """
    entries = _entries(config)
    if entries is None:
        return None
    method = entries.get("quant_method")
    if method is None and (entries.get("load_in_8bit") or entries.get("load_in_4bit")):
        return "bitsandbytes"  # an old form
    name = str(getattr(method, "value", method))
    return None if name == "gguf" else name


def quantization_key(config: Any) -> str | None:
    """The quantisation config as JSON; None for plain weights.

    Classes of modules don't show it: torchao's weights are in ordinary linear layers, and GPTQ has
    one class for any number of bits.
    """
    if quantization_method(config) is None:
        return None
    return json.dumps(_entries(config), sort_keys=True, default=str)


def quantization_kwargs(
    config: PreTrainedConfig,
    source: str,
    bits: str | None,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> dict[str, Any] | None:
    """Arguments of ``from_pretrained`` for quantised weights; None: they are plain.

    Such a model must be loaded to its device, as kernels have their own layouts for weights.
    ``bits``, one of `BITS`, is for a plain checkpoint.

    Raises:
        InputError: a package is missing, or ``bits`` does not fit the model, device or dtype.
    """
    method = quantization_method(config)
    if bits is None:
        if method is None:
            return None
        packages = _PACKAGES.get(method, ())
        missing = [name for name in packages if find_spec(name.replace("-", "_")) is None]
        if missing:
            raise InputError(
                f"{source} is quantised with {method}, which needs {' and '.join(missing)}: "
                f"pip install {' '.join(missing)}"
            )
        if method == "bitsandbytes":
            # it logs at every product of an int8 layer that it rounds the inputs
            logging.getLogger(method).setLevel(logging.ERROR)
        return {}
    if method is not None:
        raise InputError(
            f"{source} is quantised with {method} already: leave quantize out",
            names=("quantize out",),
        )
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), trust_remote_code=trust_remote_code
        )
    inputs = [m.in_features for m in empty.modules() if isinstance(m, nn.Linear)]
    return {"quantization_config": torchao_config(bits, device, dtype, inputs)}


def describe_quantization(config: Any, bits: str | None) -> str | None:
    """A loaded model's quantisation in words, ``bits`` if asked for; None for plain weights."""
    method = quantization_method(config)
    if method is None:
        return None
    if method == METHOD:
        bits = (_entries(config) or {}).get("bits")
        words = "in the bits of the GGUF file" if bits == "GGUF" else f"rounded to {bits}"
        return f"weights {words}, for native kernels"
    return f"weights quantised with {method}{f' ({bits})' if bits else ''}"


def check_quantize(bits: str | None) -> None:
    """Raise InputError unless ``bits`` is None or one of `BITS`."""
    if bits is not None and bits not in BITS:
        raise InputError(
            f"unknown quantize {bits!r}: {' or '.join(BITS)}", names=(f"quantize {bits!r}",)
        )


def torchao_config(
    bits: str, device: torch.device, dtype: torch.dtype, inputs: Iterable[int]
) -> Any:
    """The ``TorchAoConfig`` to quantise a plain checkpoint with while it is loaded.

    int8: a scale per row of a weight. Without compilation PyTorch converts it at every product, so
    it saves memory, not time. int4: a scale and a zero point per group of inputs, read by kernels
    for CUDA and CPU. The output embedding stays plain. ``inputs`` are the layers' input sizes.

    Raises:
        InputError: torchao is missing, or has nothing for this device, dtype or size.
    """
    if find_spec("torchao") is None:
        raise InputError("quantize needs torchao: pip install torchao", names=("quantize needs",))
    try:
        if bits == "int8":  # inductor's settings are the process's, not the model's
            quantizer = import_module("torchao.quantization")
            scheme = quantizer.Int8WeightOnlyConfig(set_inductor_config=False)
        else:
            scheme = _int4(device, dtype, inputs)
        return import_module("transformers").TorchAoConfig(scheme)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"quantize {bits} does not work with this torchao ({reason}): "
            "pip install --upgrade torchao",
            names=(f"quantize {bits} does",),
        ) from error


def rounds_inputs(model: Any) -> bool:
    """Whether layers round their inputs, to int8 or half precision, whatever their dtype."""
    config = getattr(model, "config", None)
    ours = config is not None and quantization_method(config) == METHOD
    return ours or any(type(module).__name__ in _ROUNDING for module in model.modules())


def _entries(config: Any) -> dict[str, Any] | None:
    """A config's ``quantization_config`` as a dictionary."""
    for holder in (config, config.get_text_config()):
        given = getattr(holder, "quantization_config", None)
        if given is not None:
            return dict(given if isinstance(given, Mapping) else given.to_dict())
    return None


def _int4(device: torch.device, dtype: torch.dtype, inputs: Iterable[int]) -> Any:
    sizes = sorted(set(inputs))
    group = next((g for g in GROUPS if all(size % g == 0 for size in sizes)), None)
    if group is None:
        raise InputError(
            f"quantize int4 needs layers with a multiple of {GROUPS[-1]} inputs, and this model "
            f"has some with {next(size for size in sizes if size % GROUPS[-1])}",
            names=("quantize int4",),
        )
    if device.type == "cuda":
        if dtype != torch.bfloat16:
            raise InputError(
                "quantize int4 computes in bfloat16 on a GPU: dtype bfloat16",
                names=("quantize int4", "dtype bfloat16"),
            )
        return import_module("torchao.quantization").Int4WeightOnlyConfig(
            group_size=group, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        )
    if device.type != "cpu":
        raise InputError(
            f"quantize int4 works on cpu and cuda, not on {device.type}", names=("quantize int4",)
        )
    workflow = import_module("torchao.prototype.quantization.int4.inference_workflow")
    return workflow.PrototypeInt4WeightOnlyConfig(group_size=group, set_inductor_config=False)
