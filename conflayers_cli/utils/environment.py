"""Versions, threads and devices that a measurement ran on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
import transformers

from conflayers_cli.version import __version__


def versions() -> dict[str, str]:
    """The versions that results depend on."""
    return {
        "conflayers": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def describe_environment(device: torch.device) -> dict[str, str | int | None]:
    """Versions, threads and processors, as results record them."""
    return {
        **versions(),
        "threads": torch.get_num_threads(),
        "processor": processor_name(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "platform": platform.platform(),
    }


def device_name(device: torch.device) -> str:
    """A device with its maker's name for it."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({processor_name()})"


def processor_name() -> str:
    """The processor's name as its maker gives it, else its architecture."""
    try:
        information = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    for line in information.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.machine()
