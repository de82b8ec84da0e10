"""What this machine offers, what is installed, and what of it does not work.

A check that fails is what is looked for: whatever it ends with becomes a finding, with what to do.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from conflayers_cli.doctor.finding import Finding, summary
from conflayers_cli.doctor.packages import versions
from conflayers_cli.models.inventory import size_of
from conflayers_cli.models.registry import cache_folder
from conflayers_cli.utils.memory import container_limit
from conflayers_cli.utils.progress import ProgressCallback

_VARIABLES = (
    *("CONFLAYERS_CACHE", "CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTORCH_ALLOC_CONF", "TOKENIZERS_PARALLELISM"),
)
_DRIVER = Path("/proc/driver/nvidia/version")
_GIB = 1 << 30


def examine(on_progress: ProgressCallback | None = None) -> list[Finding]:
    """Look at everything, one thing after the other.

    Args:
        on_progress: called with what is looked at, and how much is done.
    """
    checks: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
        ("versions", versions),
        ("devices", _devices),
        ("memory", _memory),
        ("threads", _threads),
        ("files", _files),
        ("decoding", _decoding),
    )
    found: list[Finding] = []
    for number, (name, check) in enumerate(checks):
        if on_progress:
            on_progress(f"looking at {name}", number / len(checks))
        found += _guarded(name, check)
    return [finding.shortened() for finding in found]


def _guarded(name: str, check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """A check's findings, the last of which is what it failed with, where it did."""
    found: list[Finding] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong is told in our own words
            found.extend(check())
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what doctor is asked about
        found.append(
            Finding(name, "failed", summary(error), f"looking at {name} failed: {summary(error)}")
        )
    return found


def _devices() -> Iterator[Finding]:
    section = "devices"
    import torch
    from transformers import LlamaConfig

    from conflayers_cli.models.device import find_device
    from conflayers_cli.models.dtype import choose_dtype
    from conflayers_cli.utils.environment import processor_name

    capability = torch.backends.cpu.get_cpu_capability()
    yield Finding(section, "processor", f"{processor_name()} ({capability})")
    yield from _gpus()
    device = find_device("auto")
    _, reason = choose_dtype("auto", device, LlamaConfig(hidden_size=576, intermediate_size=1536))
    yield Finding(section, "--device auto", f"{device}, {reason}")


def _gpus() -> Iterator[Finding]:
    section, name = "devices", "CUDA"
    import torch

    driver = _DRIVER.exists()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            major, minor = torch.cuda.get_device_capability(index)
            yield Finding(
                section,
                f"cuda:{index}",
                f"{torch.cuda.get_device_name(index)}, capability {major}.{minor}, "
                f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB free",
            )
    elif not driver:
        yield Finding(section, name, "there is no NVIDIA GPU here, or no driver for it")
    elif torch.version.cuda is None:
        problem = (
            "there is an NVIDIA driver, but this PyTorch is for the CPU alone: install another"
        )
        yield Finding(section, name, "not used", problem)
    else:
        problem = (
            f"PyTorch for CUDA {torch.version.cuda} finds no GPU: see whether CUDA_VISIBLE_DEVICES "
            "hides it, or the driver is older than that CUDA needs (nvidia-smi)"
        )
        yield Finding(section, name, "not used", problem)
    if getattr(torch.backends, "mps", None) is not None and torch.backends.mps.is_available():
        yield Finding(section, "MPS", "there is (--device mps)")


def _memory() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    told = f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free"
    limit = container_limit()
    if limit is not None and limit < memory.total:
        told += f"; this container may use {limit / _GIB:.1f} GiB"
    yield Finding("memory", "RAM", told)


def _threads() -> Iterator[Finding]:
    import torch

    threads, there = torch.get_num_threads(), _processors()
    told = f"{threads}, with {there} of {os.cpu_count()} processors to run on"
    advice = None
    if threads > there:
        advice = (
            f"more threads than processors, {there}, wait for each other: "
            f"set OMP_NUM_THREADS={there}"
        )
    yield Finding("threads", "PyTorch's", told, advice=advice)
    for name in _VARIABLES:
        if (value := os.environ.get(name)) is not None:
            yield Finding("threads" if name.endswith("THREADS") else "files", name, value)


def _files() -> Iterator[Finding]:
    folder = cache_folder()
    problem = None
    try:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            free = shutil.disk_usage(there).free
        told = f"{folder}, {'new' if there != folder else f'{size_of(folder) / _GIB:.2f} GiB'}"
        told += f"; {free / _GIB:.1f} GiB free there"
    except OSError as error:
        told = f"{folder}, not usable"
        problem = (
            f"{folder} can't be written ({error.strerror}): CONFLAYERS_CACHE names another folder"
        )
    yield Finding("files", "cache folder", told, problem)


def _decoding() -> Iterator[Finding]:
    """The tiny model on the CPU in both dtypes, then on the GPU."""
    section = "decoding"
    import torch

    from conflayers_cli.doctor.self_test import Outcome, check_decoding, check_gpu

    cpu = torch.device("cpu")
    work: list[tuple[str, Callable[[], list[Outcome]]]] = [
        ("self test", lambda: [check_decoding(cpu, torch.float32)]),
        ("self test", lambda: [check_decoding(cpu, torch.bfloat16)]),
    ]
    if torch.cuda.is_available():
        gpu = torch.device("cuda", torch.cuda.current_device())
        half = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        work.append(("GPU", lambda: check_gpu(gpu, torch.float32)))
        work.append(("GPU", lambda: check_gpu(gpu, half)))
    for name, check in work:
        for outcome in check():
            yield Finding(section, name, outcome.told, outcome.problem)
    if not torch.cuda.is_available():
        yield Finding(section, "GPU", "graphs and kernels not tried: there is no CUDA device")


def _processors() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
