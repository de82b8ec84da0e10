"""Choosing a model's device, and where a loaded model is."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from conflayers_cli.errors import InputError
from conflayers_cli.utils.distributed import world

_OFFLOADED = ("cpu", "disk")


def find_device(spec: str) -> torch.device:
    """The device that ``spec`` names (see `LoadOptions`); under torchrun this process's own.

    Raises:
        InputError: there is no such device.
    """
    here = world()
    if here.size > 1 and torch.cuda.is_available():
        if spec not in ("auto", "cuda", f"cuda:{here.local_rank}"):
            raise InputError(
                f"device {spec}: under torchrun every process has a CUDA device of its own: "
                "leave device out (CUDA_VISIBLE_DEVICES= hides them)",
                names=(f"device {spec}:", "device out"),
            )
        return torch.device("cuda", here.local_rank)
    if spec == "auto":
        spec = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(spec)
    except RuntimeError as error:
        raise InputError(f"unknown device {spec!r}: auto, cpu, cuda, cuda:N or mps") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "mps":
        if here.size > 1:
            raise InputError("torchrun shares a model among CUDA devices or on the CPU, not on MPS")
        if not torch.backends.mps.is_available():
            raise InputError(
                "no MPS device here (device auto takes what there is)", names=("device auto",)
            )
        return device
    if device.type != "cuda":
        raise InputError(f"unsupported device {spec!r}: auto, cpu, cuda, cuda:N or mps")
    if not torch.cuda.is_available():
        raise InputError(
            "no CUDA device here (device auto takes what there is)", names=("device auto",)
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise InputError(f"no device {spec!r}: there are {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", index)


def check_device_map(spec: str | None, device: str) -> None:
    """Raise InputError for an unknown device map, or one beside a device or torchrun."""
    if spec is None:
        return
    if spec != "auto":
        raise InputError(f"device_map {spec}: the only map is auto", names=("device_map",))
    if device != "auto":
        raise InputError(
            f"device_map auto and device {device}: both say where the model goes; give one",
            names=("device_map", f"device {device}:"),
        )
    if world().size > 1:
        raise InputError(
            "device_map auto gives whole layers to devices, torchrun a part of every layer: "
            "use one of the two",
            names=("device_map",),
        )


def input_device(model: Any) -> torch.device:
    """Where a model takes its tokens and gives its logits: where its first layers compute."""
    locations = list((getattr(model, "hf_device_map", None) or {}).values())
    if not locations:
        device: torch.device = model.device
        return device
    first = next((location for location in locations if location not in _OFFLOADED), "cpu")
    return torch.device("cuda", first) if isinstance(first, int) else torch.device(first)


def describe_spread(model: Any) -> str | None:
    """How a model is spread over several devices, in words; None: it is on one."""
    if (size := world().size) > 1:
        return f"a part of every layer on each of {size} processes"
    locations = Counter(map(str, (getattr(model, "hf_device_map", None) or {}).values()))
    if len(locations) < 2 and not locations.keys() & {"disk"}:
        return None
    named = ((f"cuda:{name}" if name.isdigit() else name, n) for name, n in locations.items())
    return "whole layers on " + ", ".join(f"{name} ({n})" for name, n in named)
