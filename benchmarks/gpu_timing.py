"""Timing on the device: events and graphs on a GPU, the host's clock elsewhere; busy intervals."""

from __future__ import annotations

import json
import signal
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from conflayers_cli.engine.graph_runner import clock

Call = Callable[[], object]

ROTATED = 256 << 20
"""Bytes that repeated calls go through at the least: more than any card's L2 cache holds."""
MAX_COPIES = 64
MIN_SECONDS = 1e-3
"""What one measurement takes at the least."""
AGAIN = 5.0
"""Seconds after which the end of the time is called out again, should nobody have heard it."""

_DEVICE_WORK = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
_HOST_WORK = frozenset({"cpu_op"})


class OutOfTimeError(BaseException):
    """A part has used up its time. Not an Exception: nobody on the way is to take it for theirs."""


class Budget:
    """The time that a run may take."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    @contextmanager
    def enforced(self) -> Iterator[None]:
        """Within: OutOfTimeError is raised once the time is up, between two operations of Python.

        Only in the main thread, where signals arrive; elsewhere parts run to their ends.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ring(number: int, frame: FrameType | None) -> None:
            raise OutOfTimeError("the time is used up (--seconds)")

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, max(self.left, 0.1), AGAIN)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)


def count_copies(size: int) -> int:
    """How many pieces of memory of so many bytes calls take turns at, not to meet them cached."""
    return max(1, min(MAX_COPIES, -(-ROTATED // max(size, 1))))


def median_seconds(device: torch.device, calls: Sequence[Call], rounds: int = 7) -> float:
    """Seconds of one of some calls, which take turns: the median of several rounds over all.

    On a GPU they are recorded as one graph, so that launching them takes no time.

    Args:
        calls: each does about the same, on memory of its own.
        rounds: measurements.
    """
    replay = _recorded(calls) if device.type == "cuda" else partial(_each, calls)
    once = _seconds(device, replay)
    times = max(1, min(1000, round(MIN_SECONDS / max(once, 1e-9))))

    def many() -> None:
        for _ in range(times):
            replay()

    found = [_seconds(device, many) for _ in range(rounds)]
    return statistics.median(found) / times / len(calls)


def back_to_back(device: torch.device, call: Call, count: int) -> float:
    """Seconds of one of ``count`` calls that nobody waits for in between."""
    begin = clock(device)
    for _ in range(count):
        call()
    return (clock(device) - begin) / count


def _each(calls: Iterable[Call]) -> None:
    for call in calls:
        call()


def _recorded(calls: Sequence[Call]) -> Call:
    """The calls as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries set up, kernels compiled
        _each(calls)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _each(calls)
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def _seconds(device: torch.device, call: Call) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def free(device: torch.device) -> None:
    """Give back memory that nobody holds any more."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def read_memory(device: torch.device) -> dict[str, int] | None:
    """Bytes taken at the most so far and now; None where nothing tells."""
    if device.type != "cuda":
        return None
    return {
        "peak": torch.cuda.max_memory_allocated(device),
        "now": torch.cuda.memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
    }


def profiled(device: torch.device, call: Call, shown: int = 14) -> dict[str, Any]:
    """What the device did meanwhile, by torch's profiler.

    Returns:
        ``seconds``: from the first piece of work to the end of the last; ``busy``: those in which
        the device was busy; ``idle``: share of the others; ``work``: pieces; ``by_name``: the
        kinds that took longest, their share of the busy time and how many there were.
    """
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as found:
        call()
        clock(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    return busy_in(trace.get("traceEvents", ()), _DEVICE_WORK if on_gpu else _HOST_WORK, shown)


def busy_in(
    events: Iterable[Mapping[str, Any]], kinds: frozenset[str], shown: int
) -> dict[str, Any]:
    """As :func:`profiled`, of a trace's events: ``cat``, ``name``, ``ts`` and ``dur`` in µs."""
    intervals: list[tuple[float, float]] = []
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") in kinds and "dur" in event:
            begin, length = float(event["ts"]), float(event["dur"])
            intervals.append((begin, begin + length))
            by_name[str(event["name"])].append(length)
    if not intervals:
        return {"seconds": None, "busy": None, "idle": None, "work": 0, "by_name": []}
    whole = max(end for _, end in intervals) - min(begin for begin, _ in intervals)
    busy = union(intervals)
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:shown]
    return {
        "seconds": whole / 1e6,
        "busy": busy / 1e6,
        "idle": 1 - busy / whole if whole else 0.0,
        "work": len(intervals),
        "by_name": [
            {"name": name[:120], "share": sum(own) / busy if busy else 0.0, "count": len(own)}
            for name, own in longest
        ],
    }


def union(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of what (begin, end) intervals cover together."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return total
