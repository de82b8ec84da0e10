"""What a measurement ran on: versions, threads, processor."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
import transformers

from conflayers_cli import __version__


def describe() -> dict[str, str | int | None]:
    """Versions, threads and processor, as results record them."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "conflayers": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "processor": processor_name(),
        "gpu": gpu,
        "platform": platform.platform(),
    }


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
