"""Weights in fewer bits: what a checkpoint has of them, and how they are loaded.

A quantised checkpoint is run by what transformers puts in place of its linear layers; a plain one
is quantised while it is loaded (``--quantize``), by torchao: one package for CPU and CUDA, which
computes with the layers' own inputs. bitsandbytes' int8 does not: it rounds them, too, and which of
their columns it leaves out depends on all rows of a pass (LLM.int8(), arXiv 2208.07339 §3).

Such kernels are chosen by how many rows there are, some are made for one. What wider passes cost is
measured like any other cost; whether rows keep their bits is tried when the model is opened (see
`conflayers_cli.engine.batch_invariance`).
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

BITS = ("int8", "int4")
"""What a plain checkpoint's weights can be loaded as."""
GROUPS = (128, 64, 32)
"""Inputs that share one int4 scale; the largest that divides a model's sizes is taken."""

_PACKAGES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "awq": ("gptqmodel",),
        "bitsandbytes": ("bitsandbytes",),
        "compressed-tensors": ("compressed-tensors",),
        "gptq": ("optimum", "gptqmodel"),
        "torchao": ("torchao",),
    }
)
"""What transformers needs beside itself, by a checkpoint's method."""

# Modules that round what they are given: even float32 inputs that differ in the last bit can then
# give products that differ by a step.
_ROUNDING = frozenset({"Linear8bitLt", "Linear4bit"})


def method_of(config: Any) -> str | None:
    """What a model's weights are quantised with, by its config: ``gptq``, ``torchao``, …

    None for plain weights, and for GGUF files, which transformers turns into plain ones.
    """
    entries = _entries(config)
    if entries is None:
        return None
    method = entries.get("quant_method")
    if method is None and (entries.get("load_in_8bit") or entries.get("load_in_4bit")):
        return "bitsandbytes"  # as it was written before there was a name for it
    name = str(getattr(method, "value", method))
    return None if name == "gguf" else name


def signature(config: Any) -> str | None:
    """Tells ways of quantising apart, as JSON; None for plain weights.

    The modules of a model don't: torchao's weights are in ordinary linear layers, and those of GPTQ
    have one class for any number of bits.
    """
    if method_of(config) is None:
        return None
    return json.dumps(_entries(config), sort_keys=True, default=str)


def check_packages(method: str, source: str) -> None:
    """See that what checkpoints of a method need is there.

    Raises:
        InputError: it is not; the packages are named.
    """
    needed = _PACKAGES.get(method, ())
    missing = [name for name in needed if find_spec(name.replace("-", "_")) is None]
    if missing:
        raise InputError(
            f"{source} is quantised with {method}, which needs {' and '.join(missing)}: "
            f"pip install {' '.join(missing)}"
        )


def quantization_kwargs(
    config: PreTrainedConfig,
    source: str,
    bits: str | None,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> dict[str, Any] | None:
    """What ``from_pretrained`` takes for a model's quantised weights; None: they are plain.

    Such a model must be loaded to where it stays: kernels have an order of their own for weights.

    Args:
        config: the checkpoint's.
        source: its name.
        bits: one of `BITS`, what a plain checkpoint is to be quantised to; None: nothing.
        device: where the model will run.
        dtype: what its other weights will be in.
        trust_remote_code: whether code that comes with it may be run.

    Raises:
        InputError: a package is missing, or ``bits`` goes with no such model, device or dtype.
    """
    method = method_of(config)
    if bits is None:
        if method is None:
            return None
        check_packages(method, source)
        if method == "bitsandbytes":
            # It says at every product of an int8 layer that it rounds the inputs.
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
    return {"quantization_config": weight_only(bits, device, dtype, inputs)}


def describe(config: Any, bits: str | None) -> str | None:
    """What is said of a model's weights; None: nothing, they are plain.

    Args:
        config: the model's, once it is loaded.
        bits: what was asked for, one of `BITS`; None: the checkpoint is quantised as it is.
    """
    method = method_of(config)
    if method is None:
        return None
    return f"weights quantised with {method}{f' ({bits})' if bits else ''}"


def check_bits(bits: str | None) -> None:
    """Raise InputError unless ``bits`` is None or one of `BITS`."""
    if bits is not None and bits not in BITS:
        raise InputError(
            f"unknown quantize {bits!r}: {' or '.join(BITS)}", names=(f"quantize {bits!r}",)
        )


def weight_only(bits: str, device: torch.device, dtype: torch.dtype, inputs: Iterable[int]) -> Any:
    """What transformers is to quantise a plain checkpoint with while it loads it.

    int8: a scale per row of a weight, on any device. PyTorch turns such a weight into the inputs'
    dtype at every product, unless it is compiled: it saves memory, not time. int4: a scale and a
    zero point per group of inputs, read as they are by kernels for CUDA and CPU. The output
    embedding stays as it is.

    Args:
        bits: one of `BITS`.
        device: where the model will run; it is quantised there.
        dtype: the inputs'.
        inputs: the sizes of the linear layers' inputs.

    Returns:
        A ``TorchAoConfig``.

    Raises:
        InputError: torchao is not there, or has nothing for this device, dtype or size.
    """
    check_bits(bits)
    if find_spec("torchao") is None:
        raise InputError("quantize needs torchao: pip install torchao", names=("quantize needs",))
    try:
        scheme = _int8() if bits == "int8" else _int4(device, dtype, inputs)
        return import_module("transformers").TorchAoConfig(scheme)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"quantize {bits} does not work with this torchao ({reason}): "
            "pip install --upgrade torchao",
            names=(f"quantize {bits} does",),
        ) from error


def rounds_inputs(model: nn.Module) -> bool:
    """Whether layers round what they are given, to int8 or half precision, whatever its dtype."""
    return any(type(module).__name__ in _ROUNDING for module in model.modules())


def _entries(config: Any) -> dict[str, Any] | None:
    """A config's ``quantization_config`` as its file has it."""
    for holder in (config, config.get_text_config()):
        given = getattr(holder, "quantization_config", None)
        if given is not None:
            return dict(given if isinstance(given, Mapping) else given.to_dict())
    return None


def _int8() -> Any:
    # Inductor's settings are the process's, not the model's: they stay as they are.
    return import_module("torchao.quantization").Int8WeightOnlyConfig(set_inductor_config=False)


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
