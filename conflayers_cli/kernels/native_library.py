"""The native library for decoding on a processor: where it is, and what it runs with here.

It is built when the package is (see ``setup.py``), if there is a C++ compiler, from ``csrc/``, and
knows nothing of Python or PyTorch: it is given addresses. One file serves many processors; which of
its units runs is chosen here. While it runs, the interpreter's lock is free.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from ctypes import POINTER, c_char_p, c_double, c_int64, c_uint8, c_void_p
from pathlib import Path

import torch

LIBRARY_VARIABLE = "CONFLAYERS_LIBRARY"
"""Environment variable: another file of the library, such as one built with sanitizers."""
LIBRARY = Path(os.environ.get(LIBRARY_VARIABLE) or Path(__file__).parent / "libconflayers.so")
UNIT_VARIABLE = "CONFLAYERS_NATIVE"
"""Environment variable: the unit to use, or ``off``."""
KINDS = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
INT4, INT8 = 4, 5
_VERSION = 3


class CWeight(ctypes.Structure):
    """``cl_weight`` of ``csrc/interface.h``."""

    _fields_ = (
        ("data", c_void_p),
        ("bias", c_void_p),
        ("rows", c_int64),
        ("cols", c_int64),
        ("kind", c_int64),
        ("plain", c_int64),
    )


class CLayer(ctypes.Structure):
    """``cl_layer``."""

    _fields_ = (
        ("qkv", CWeight),
        ("output", CWeight),
        ("gate_up", CWeight),
        ("down", CWeight),
        ("norms", c_void_p * 6),
        ("scaling", c_double),
        ("window", c_int64),
    )


class CModel(ctypes.Structure):
    """``cl_model``."""

    _fields_ = (
        *((name, c_int64) for name in ("kind", "hidden", "intermediate", "heads", "kv_heads")),
        *((name, c_int64) for name in ("head_dim", "rotary_dim", "vocabulary", "depth")),
        *((name, c_int64) for name in ("activation", "norm_per_head", "norm_rounds_last")),
        ("epsilon", c_double),
        ("layers", POINTER(CLayer)),
        ("norm", c_void_p),
        ("embedding", CWeight),
        ("head", CWeight),
        ("rescore", CWeight),
    )


class CPass(ctypes.Structure):
    """``cl_pass``."""

    _fields_ = (
        ("tokens", c_int64),
        *((name, c_void_p) for name in ("ids", "positions", "slots", "sequences", "rotary_rows")),
        *((name, c_void_p) for name in ("cosine", "sine")),
        ("keys", POINTER(c_void_p)),
        ("values", POINTER(c_void_p)),
        *((name, c_int64) for name in ("sequence_stride", "head_stride", "slot_stride")),
        ("runs", POINTER(c_uint8)),
        ("entry", c_void_p),
        ("states", POINTER(c_void_p)),
        ("kept", c_int64),
        ("keep", c_void_p),
        ("logits", c_void_p),
        ("top", c_int64),
        *((name, c_void_p) for name in ("greedy", "highest", "log_sum")),
        *((name, c_void_p) for name in ("top_tokens", "top_logits")),
        ("threads", c_int64),
    )


@functools.cache
def load_library(path: Path = LIBRARY) -> ctypes.CDLL:
    """The library with its functions' types.

    Raises:
        OSError: there is none, or another version's.
    """
    library = ctypes.CDLL(str(path))
    library.cl_unit_name.restype = c_char_p
    numbers = ("version", "unit_runs", "forward", "linear", "round", "read")
    for name in (f"cl_{each}" for each in numbers):
        getattr(library, name).restype = c_int64
    library.cl_advise.restype = None
    library.cl_unit_name.argtypes = library.cl_unit_runs.argtypes = (c_int64,)
    library.cl_forward.argtypes = (c_int64, POINTER(CModel), POINTER(CPass))
    library.cl_linear.argtypes = (
        *(c_int64, POINTER(CWeight), c_int64),
        *(c_void_p, c_int64, c_void_p, c_int64),
    )
    library.cl_round.argtypes = (c_int64, POINTER(CWeight), c_void_p, c_int64)
    library.cl_read.argtypes = (c_int64, c_void_p, c_int64, c_int64)
    library.cl_advise.argtypes = (c_void_p, c_int64)
    if library.cl_version() != _VERSION:
        raise OSError(f"{path.name} was built from other sources: install the package again")
    return library


@functools.cache
def _numbers() -> dict[str, int]:
    """The library's numbers of the units that run on this processor, best first."""
    library, found, number = load_library(), {}, 0
    while (name := library.cl_unit_name(number)) is not None:
        if library.cl_unit_runs(number):
            found[name.decode()] = number
        number += 1
    return found


def available_units() -> tuple[str, ...]:
    """The units that run on this processor, best first.

    Raises:
        OSError: there is no library.
    """
    return tuple(_numbers())


def unit_name(name: str | None = None) -> str:
    """A unit that runs here: ``name``, by default the one of `UNIT_VARIABLE`, or else the best.

    Raises:
        OSError: there is no library.
        ValueError: the unit does not run here.
    """
    units = available_units()
    name = name or os.environ.get(UNIT_VARIABLE) or (units[0] if units else "none")
    if name not in units:
        raise ValueError(f"unit {name} does not run here: there are {', '.join(units) or 'none'}")
    return name


@functools.cache
def unit_number(name: str | None = None) -> int:
    """The library's number of `unit_name`; raises as that does."""
    return _numbers()[unit_name(name)]


@functools.cache
def unavailable_reason() -> str | None:
    """Why the library can't be used here, one phrase; None: it can."""
    if os.environ.get(UNIT_VARIABLE) == "off":
        return f"{UNIT_VARIABLE} is off"
    if not LIBRARY.exists():
        return "the native library was not built: install the package where there is a C++ compiler"
    try:
        unit_number()
    except (OSError, ValueError) as error:
        return f"the native library does not run on this {platform.machine()} processor: {error}"
    return None


def usable_threads() -> int:
    """Threads that can run at once: PyTorch's, but no more than the processors that this process
    may use, nor than a container's quota of them."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = _container_quota()
    if quota is not None:
        usable = min(usable or 1, max(1, int(quota + 0.5)))
    return max(1, min(torch.get_num_threads(), usable or 1))


@functools.cache
def _container_quota() -> float | None:
    """Processors' worth of time that the control group of this process gets; None: unlimited."""
    try:
        allowed, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        return None if allowed == "max" else int(allowed) / int(period)
    except (OSError, ValueError):
        return None


def read_memory(memory: torch.Tensor, threads: int) -> int:
    """Read a tensor's memory once, as products read weights; for measuring the bandwidth."""
    return int(load_library().cl_read(unit_number(), memory.data_ptr(), memory.nbytes, threads))


def require_cpu(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor.

    Raises:
        ValueError: it isn't in the processor's memory, or isn't contiguous.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous and on the CPU")
    return tensor


# A norm or a bias is read in whole vectors.
def padded_float32(numbers: torch.Tensor, multiple: int = 16) -> torch.Tensor:
    """A copy ``[n rounded up]`` in float32, with zeros behind the end."""
    flat = numbers.detach().float().reshape(-1)
    padded = flat.new_zeros(-(-flat.numel() // multiple) * multiple)
    padded[: flat.numel()] = flat
    return padded
