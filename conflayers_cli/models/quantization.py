"""Weights in fewer bits: loading them, and what can be promised of a model that has them.

A quantised checkpoint is run by what transformers puts in place of its linear layers; a plain one
is quantised while it is loaded (``--quantize``), by torchao: one package for CPU and CUDA, which
computes with the layers' own inputs. bitsandbytes' int8 does not: it rounds them, too, and which of
their columns it leaves out depends on all rows of a pass (LLM.int8(), arXiv 2208.07339 §3).

Such kernels are chosen by how many rows there are, some are made for one. What wider passes cost is
measured like any other cost; whether rows keep their bits is tried when the model is opened.
"""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from conflayers_cli.engine.batch_invariance import (
    NOT_INVARIANT,
    PROBED_TOKENS,
    BatchInvariance,
    Logits,
    probe_min_rows,
)
from conflayers_cli.errors import InputError

BITS = ("int8", "int4")
"""What a plain checkpoint's weights can be loaded as."""
GROUPS = (128, 64, 32)
"""Inputs that share one int4 scale; the largest that divides a model's sizes is taken."""
DEAREST = 1.25
"""A pass of one token may take this many times its time for its bits to be those of wider ones."""
_ROUNDS = 7

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


@dataclass(frozen=True)
class Promise:
    """What holds of a quantised model's greedy text.

    Attributes:
        rows: how many rows its passes run at the least.
        caveat: why drafts may change the text where two tokens are nearly as good; None: they
            don't.
    """

    rows: BatchInvariance
    caveat: str | None = None


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


def loading(
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
        raise InputError(f"{source} is quantised with {method} already: leave --quantize out")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), trust_remote_code=trust_remote_code
        )
    inputs = [m.in_features for m in empty.modules() if isinstance(m, nn.Linear)]
    return {"quantization_config": weight_only(bits, device, dtype, inputs)}


def told(config: Any, bits: str | None) -> str | None:
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
        raise InputError(f"unknown --quantize {bits!r}: {' or '.join(BITS)}")


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
        raise InputError("--quantize needs torchao: pip install torchao")
    try:
        scheme = _int8() if bits == "int8" else _int4(device, dtype, inputs)
        return import_module("transformers").TorchAoConfig(scheme)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"--quantize {bits} does not work with this torchao ({reason}): "
            "pip install --upgrade torchao"
        ) from error


def promise(
    model: Any,
    logits: Logits,
    clock: Callable[[], float] | None = None,
    kernels: str = "quantised kernels",
) -> Promise:
    """Find out whether a quantised model's rows keep their bits from pass to pass, at what price.

    Or those of a model in half precision whose adapter computes in float32, where products take
    other kernels.

    Args:
        model: the model.
        logits: runs tokens, see `rows.probe_min_rows`.
        clock: seconds now, with the device's work done; None: the real one.
        kernels: what rounds otherwise, where it does.
    """
    if model.dtype == torch.float32 and not rounds_inputs(model):
        return Promise(NOT_INVARIANT)  # as with every model in float32: see `rows.BatchInvariance`
    if rows_mix(model):
        return _broken(
            "this model's int8 products of a token depend on the tokens beside it "
            "(llm_int8_threshold), so drafts may change the text"
        )
    rule = probe_min_rows(logits)
    if not rule.bitwise:
        return _broken(
            f"this model's {kernels} round otherwise for other numbers of tokens, so drafts may "
            "change the text where two tokens are as good as equal"
        )
    dearer = _ratio(logits, rule.least, clock or partial(_now, model.device))
    if dearer > DEAREST:
        return _broken(
            f"that would take {rule.least} rows a pass, {dearer:.1f} times as long as one with "
            "this model's kernels, so drafts may change the text where two tokens are as good as "
            "equal"
        )
    return Promise(rule)


def _broken(reason: str) -> Promise:
    return Promise(NOT_INVARIANT, f"not exact to the bit: {reason}")


def rows_mix(model: nn.Module) -> bool:
    """Whether a row's products depend on what is in the other rows, not only on how many there are.

    LLM.int8() computes every column in which any row has an outlier in half precision, for all
    rows. Whether there is one hangs on the text, so trying does not find it.
    """
    return any(_threshold(module) > 0 for module in model.modules())


def _threshold(module: Any) -> float:
    """From where on bitsandbytes' int8 takes an input for an outlier; 0: it has none."""
    # PEFT has adapted layers of the same name, without a state of their own.
    state = getattr(module, "state", None) if type(module).__name__ == "Linear8bitLt" else None
    return float(getattr(state, "threshold", 0.0))


def rounds_inputs(model: nn.Module) -> bool:
    """Whether layers round what they are given, to int8 or half precision, whatever its dtype."""
    return any(type(module).__name__ in _ROUNDING for module in model.modules())


def _ratio(logits: Logits, least: int, clock: Callable[[], float]) -> float:
    """The time of a token's pass of ``least`` rows in that of one row: medians, taken by turns."""
    times: dict[int, list[float]] = {1: [], least: []}
    for round_ in range(_ROUNDS + 1):
        for rows, taken in times.items():
            begin = clock()
            logits(rows, round_ % PROBED_TOKENS, 1)
            seconds = clock() - begin
            if round_:  # the first round warms up
                taken.append(seconds)
    one, many = (sorted(taken)[_ROUNDS // 2] for taken in (times[1], times[least]))
    return many / one if one else 1.0


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


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
            f"--quantize int4 needs layers with a multiple of {GROUPS[-1]} inputs, and this model "
            f"has some with {next(size for size in sizes if size % GROUPS[-1])}"
        )
    if device.type == "cuda":
        if dtype != torch.bfloat16:
            raise InputError("--quantize int4 computes in bfloat16 on a GPU: --dtype bfloat16")
        return import_module("torchao.quantization").Int4WeightOnlyConfig(
            group_size=group, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        )
    if device.type != "cpu":
        raise InputError(f"--quantize int4 works on cpu and cuda, not on {device.type}")
    workflow = import_module("torchao.prototype.quantization.int4.inference_workflow")
    return workflow.PrototypeInt4WeightOnlyConfig(group_size=group, set_inductor_config=False)
