"""Peak memory: what counts, what does not, and where nothing tells."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from conflayers_cli.utils import memory
from conflayers_cli.utils.memory import PeakMemory

CPU = torch.device("cpu")
MIB = 2**20
linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="only Linux has /proc/self/clear_refs"
)


def _held(mebibytes: int) -> torch.Tensor:
    return torch.ones(mebibytes * MIB, dtype=torch.uint8)


@linux
def test_the_peak_is_over_what_was_held_before() -> None:
    before = _held(100)
    watch = PeakMemory(CPU)
    watch.begin()
    kept = _held(50)
    _held(30)  # freed at once
    peak = watch.peak()
    assert peak is not None and 75 * MIB < peak < 95 * MIB
    watch.begin()  # only what is kept counts any more
    peak = watch.peak()
    assert peak is not None and 45 * MIB < peak < 65 * MIB
    del kept
    watch.begin()
    peak = watch.peak()
    assert peak is not None and peak < 15 * MIB
    assert before.numel() == 100 * MIB


@linux
def test_less_than_at_the_start_is_no_negative_peak() -> None:
    before = _held(100)
    watch = PeakMemory(CPU)
    del before
    watch.begin()
    assert watch.peak() == 0


@linux
def test_what_was_freed_long_ago_does_not_hide_a_peak() -> None:
    """Small blocks stay with the C library's allocator, and fill the next request."""
    gc.collect()  # what other tests left would be freed while this one fills memory
    for _ in range(2):
        blocks = [torch.ones(60_000, dtype=torch.uint8) for _ in range(1000)]
        del blocks
        watch = PeakMemory(CPU)
        watch.begin()
        blocks = [torch.ones(60_000, dtype=torch.uint8) for _ in range(1000)]
        peak = watch.peak()
        # hidden, it would be next to nothing; what the process gives back meanwhile is not much
        assert peak is not None and peak > 20 * MIB
        del blocks


def test_a_system_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
    watch = PeakMemory(CPU)
    watch.begin()
    assert watch.peak() is None


def test_a_peak_that_cannot_be_reset_is_no_peak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path)  # a folder: can't be written
    watch = PeakMemory(CPU)
    watch.begin()
    assert watch.peak() is None


def test_an_allocator_that_cannot_trim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    PeakMemory(CPU).begin()


def test_other_devices_tell_nothing() -> None:
    watch = PeakMemory(torch.device("mps"))
    watch.begin()
    assert watch.peak() is None


def test_cuda_has_its_own_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    resets: list[torch.device] = []
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1700)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    watch = PeakMemory(device)
    watch.begin()
    assert watch.peak() == 700
    assert resets == [device]
