"""Memory of this process: what it uses, its peak, and what its container allows."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

# psutil has no peak that can be reset and does not know containers
_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_RESET_PEAK = "5"  # proc(5): resets the peak resident set size (VmHWM) to the current one
_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


class PeakMemory:
    """The most memory in use since `begin`, over what was in use when this object was made.

    Made when the model is loaded, it gives peaks over the model's weights. On CUDA it reads
    PyTorch's allocator, on a CPU with Linux the process's resident memory, which includes what
    libraries set up at their first use and what the C library's allocator keeps. Elsewhere there
    are no figures.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._base = self._now()

    def begin(self) -> None:
        """Forget earlier peaks, and give freed memory back, which would count for the next."""
        if self._device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self._device)
        elif self._base is not None:
            _trim()
            try:
                _CLEAR_REFS.write_text(_RESET_PEAK)
            except OSError:  # a kernel without it, or a sandbox
                self._base = None

    def peak(self) -> int | None:
        """Bytes; None where it is not known."""
        if self._base is None:
            return None
        if self._device.type == "cuda":
            import torch

            peak: int | None = torch.cuda.max_memory_allocated(self._device)
        else:
            peak = _peak_resident()
        return None if peak is None else max(peak - self._base, 0)

    def _now(self) -> int | None:
        if self._device.type == "cuda":
            import torch

            return torch.cuda.memory_allocated(self._device)
        return resident() if self._device.type == "cpu" else None


def resident() -> int:
    """This process's memory in bytes, freed blocks given back first."""
    _trim()
    return int(psutil.Process().memory_info().rss)


def container_limit() -> int | None:
    """Bytes that this process's container may use; None: no container, or no limit."""
    try:
        return int(_CONTAINER_LIMIT.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _peak_resident() -> int | None:
    """The most memory of this process since its peak was last reset, in bytes; Linux only."""
    try:
        found = re.search(r"^VmHWM:\s*(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    except OSError:  # not Linux
        return None
    return int(found[1]) * 1024 if found else None


def _trim() -> None:
    """Give freed memory back to the system, or a later peak would hide in it. glibc only."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return
    trim(0)
