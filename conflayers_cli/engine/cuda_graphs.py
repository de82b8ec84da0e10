"""Recording what a pass does on the device: CUDA graphs, or anything with their interface."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch

DeviceWork = Callable[[], torch.Tensor]
PendingRead = Callable[[], list[float]]


class Recorder(Protocol):
    """Records what a function does on the device, to replay it."""

    def record(self, work: DeviceWork) -> tuple[torch.Tensor, Callable[[], None]]:
        """(the function's output, which every replay overwrites; what replays); RuntimeError where
        it does something that can't be replayed."""

    def send(self, values: torch.Tensor) -> PendingRead:
        """Begin to copy values to the host, after all work so far; returns what waits for them."""


class CudaRecorder:
    """Records CUDA graphs of a device, all of them in one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None  # PyTorch's handle
        self._anchor: torch.cuda.CUDAGraph | None = None

    def record(self, work: DeviceWork) -> tuple[torch.Tensor, Callable[[], None]]:
        with torch.cuda.device(self._device):
            if self._anchor is None:
                # A pool is released with its last graph, and can't be used again: this one stays.
                self._pool = torch.cuda.graph_pool_handle()
                self._anchor, _ = self._capture(lambda: torch.zeros(1, device=self._device))
            graph, output = self._capture(work)
        return output, graph.replay

    def _capture(self, work: DeviceWork) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        # What PyTorch itself sets up at a capture has to be usable outside of inference mode, too.
        # Other threads may allocate meanwhile: only this one's work is captured.
        try:
            with (
                torch.inference_mode(False),
                torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
                torch.inference_mode(),
            ):
                output = work()
        except BaseException:
            # PyTorch leaves both as they were in the capture where that can't be ended.
            torch.cuda.set_stream(stream)
            end = getattr(torch._C, "_cuda_endAllocateToPool", None)
            if end is not None:
                with suppress(RuntimeError):
                    end(torch.cuda.current_device(), self._pool)
            raise
        return graph, output

    def send(self, values: torch.Tensor) -> PendingRead:
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))

        def read() -> list[float]:
            event.synchronize()
            return host.tolist()

        return read
