"""Which device a model runs on."""

from __future__ import annotations

import torch

from conflayers_cli.errors import InputError


def find_device(spec: str) -> torch.device:
    """The device that ``spec`` names: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    Raises:
        InputError: there is no such device, here or at all.
    """
    if spec == "auto":
        spec = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(spec)
    except RuntimeError as error:
        raise InputError(f"unknown device {spec!r}: auto, cpu, cuda, cuda:N or mps") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "mps":
        if not torch.backends.mps.is_available():
            raise InputError("no MPS device here (--device auto takes what there is)")
        return device
    if device.type != "cuda":
        raise InputError(f"unsupported device {spec!r}: auto, cpu, cuda, cuda:N or mps")
    if not torch.cuda.is_available():
        raise InputError("no CUDA device here (--device auto takes what there is)")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise InputError(f"no device {spec!r}: there are {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", index)
