"""Checks of the hardware, the installation and the files of this machine.

Whatever a check raises becomes a result with a problem.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from conflayers_cli.doctor.check_result import CheckResult, summary
from conflayers_cli.doctor.packages import versions
from conflayers_cli.models.inventory import folder_bytes
from conflayers_cli.models.registry import cache_folder
from conflayers_cli.utils.memory import container_limit
from conflayers_cli.utils.progress import ProgressCallback

_VARIABLES = (
    *("CONFLAYERS_CACHE", "CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTORCH_ALLOC_CONF", "TOKENIZERS_PARALLELISM"),
)
_DRIVER = Path("/proc/driver/nvidia/version")
_GIB = 1 << 30


def run_checks(on_progress: ProgressCallback) -> list[CheckResult]:
    """Run all checks, one after the other."""
    checks: dict[str, Callable[[], Iterator[CheckResult]]] = {
        "versions": versions,
        "devices": _devices,
        "memory": _memory,
        "threads": _threads,
        "files": _files,
        "decoding": _decoding,
    }
    results: list[CheckResult] = []
    for number, (name, check) in enumerate(checks.items()):
        on_progress(f"looking at {name}", number / len(checks))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the results say what is wrong
                results.extend(check())
        except Exception as error:  # noqa: BLE001 - any failure is a result
            problem = f"looking at {name} failed: {summary(error)}"
            results.append(CheckResult(name, "failed", summary(error), problem))
    return [result.shortened() for result in results]


def _devices() -> Iterator[CheckResult]:
    section = "devices"
    import torch
    from transformers import LlamaConfig

    from conflayers_cli.kernels.native_library import (
        unavailable_reason,
        unit_name,
        usable_threads,
    )
    from conflayers_cli.kernels.native_speed import native_bfloat16_ratio
    from conflayers_cli.models.device import find_device
    from conflayers_cli.models.dtype import choose_dtype
    from conflayers_cli.utils.environment import processor_name

    capability = torch.backends.cpu.get_cpu_capability()
    yield CheckResult(section, "processor", f"{processor_name()} ({capability})")
    missing = unavailable_reason()
    message = "not used" if missing else f"{unit_name()}, {usable_threads()} threads"
    advice = f"{missing}: with them models of usual families decode faster" if missing else None
    yield CheckResult(section, "native kernels", message, advice=advice)
    yield from _gpus()
    device = find_device("auto")
    config = LlamaConfig(hidden_size=576, intermediate_size=1536)
    _, reason = choose_dtype("auto", device, config, native=native_bfloat16_ratio)
    yield CheckResult(section, "--device auto", f"{device}, {reason}")


def _gpus() -> Iterator[CheckResult]:
    section, name = "devices", "CUDA"
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            major, minor = torch.cuda.get_device_capability(index)
            yield CheckResult(
                section,
                f"cuda:{index}",
                f"{torch.cuda.get_device_name(index)}, capability {major}.{minor}, "
                f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB free",
            )
    elif not _DRIVER.exists():
        yield CheckResult(section, name, "there is no NVIDIA GPU here, or no driver for it")
    else:
        problem = (
            f"PyTorch for CUDA {torch.version.cuda} finds no GPU: see whether CUDA_VISIBLE_DEVICES "
            "hides it, or the driver is older than that CUDA needs (nvidia-smi)"
        )
        if torch.version.cuda is None:
            problem = (
                "there is an NVIDIA driver, but this PyTorch is for the CPU alone: install another"
            )
        yield CheckResult(section, name, "not used", problem)
    if torch.backends.mps.is_available():
        yield CheckResult(section, "MPS", "there is (--device mps)")


def _memory() -> Iterator[CheckResult]:
    memory = psutil.virtual_memory()
    message = f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free"
    limit = container_limit()
    if limit is not None and limit < memory.total:
        message += f"; this container may use {limit / _GIB:.1f} GiB"
    yield CheckResult("memory", "RAM", message)


def _threads() -> Iterator[CheckResult]:
    import torch

    threads, usable = torch.get_num_threads(), _processors()
    message = f"{threads}, with {usable} of {os.cpu_count()} processors to run on"
    advice = None
    if threads > usable:
        advice = (
            f"more threads than processors, {usable}, wait for each other: "
            f"set OMP_NUM_THREADS={usable}"
        )
    yield CheckResult("threads", "PyTorch's", message, advice=advice)
    for name in _VARIABLES:
        if (value := os.environ.get(name)) is not None:
            yield CheckResult("threads" if name.endswith("THREADS") else "files", name, value)


def _files() -> Iterator[CheckResult]:
    folder = cache_folder()
    problem = None
    try:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing):
            free = shutil.disk_usage(existing).free
        size = "new" if existing != folder else f"{folder_bytes(folder) / _GIB:.2f} GiB"
        message = f"{folder}, {size}; {free / _GIB:.1f} GiB free there"
    except OSError as error:
        message = f"{folder}, not usable"
        problem = (
            f"{folder} can't be written ({error.strerror}): CONFLAYERS_CACHE names another folder"
        )
    yield CheckResult("files", "cache folder", message, problem)


def _decoding() -> Iterator[CheckResult]:
    """The tiny model on the CPU in both dtypes, then on the GPU."""
    import torch

    from conflayers_cli.doctor.self_test import check_decoding, check_gpu

    cpu = torch.device("cpu")
    yield check_decoding(cpu, torch.float32)
    yield check_decoding(cpu, torch.bfloat16)
    if not torch.cuda.is_available():
        message = "graphs and kernels not tried: there is no CUDA device"
        yield CheckResult("decoding", "GPU", message)
        return
    gpu = torch.device("cuda", torch.cuda.current_device())
    half = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    for dtype in (torch.float32, half):
        yield from check_gpu(gpu, dtype)


def _processors() -> int:
    """How many processors this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1
