"""Caches' memory, used again: recorded passes go on reading and writing where they did."""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from conflayers_cli.engine.graph_runner import bucket_for
from conflayers_cli.engine.model_lock import ModelLock
from conflayers_cli.kernels.kv_cache import KVCache, LayerSizes, SlotLayer

WASTE = 64
"""Memory up to this many times as long as a text needs is taken for it."""


@dataclass(frozen=True)
class _Memory:
    """Keys and values ``[B, H, capacity, D]`` of all layers, and their number."""

    number: int
    batch: int
    capacity: int
    layers: Sequence[tuple[torch.Tensor, torch.Tensor]]


class CachePool:
    """Gives out caches; the memory of one that nobody holds any more serves the next.

    Of what lies idle only the longest per number of rows is kept.

    Args:
        depth: number of decoder layers.
        sizes: of their keys and values.
        like: gives dtype and device.
        forget: told the numbers of memory that is given up.
        lock: held while memory is taken, and while it is forgotten.
    """

    def __init__(
        self,
        depth: int,
        sizes: Sequence[LayerSizes],
        like: torch.Tensor,
        forget: Callable[[int], None],
        lock: ModelLock,
    ) -> None:
        self._lock = lock
        self._returned: deque[_Memory] = deque()
        self._sorting = False
        self._depth = depth
        self._sizes = sizes
        self._like = like
        self._forget = forget
        self._numbers = itertools.count(1)
        self._idle: dict[int, _Memory] = {}  # by rows

    def take(self, capacity: int, batch: int) -> KVCache:
        """A cache for ``batch`` rows of ``capacity`` positions at the least, all zeros.

        The lock must be held.
        """
        self._sort()
        wanted = bucket_for(capacity)
        memory = self._idle.pop(batch, None)
        if memory is not None and wanted <= memory.capacity <= WASTE * wanted:
            for keys, values in memory.layers:
                keys.zero_()
                values.zero_()
        else:
            if memory is not None:
                self._forget(memory.number)
                del memory  # before as much again is allocated
            memory = self._allocated(wanted, batch)
        cache = KVCache(self._depth, batch, memory.capacity)
        cache.adopt(memory.number, memory.layers)
        weakref.finalize(cache, self._give_back, memory).atexit = False
        return cache

    def _allocated(self, capacity: int, batch: int) -> _Memory:
        cache = KVCache(self._depth, batch, capacity)
        with torch.inference_mode(False):  # or nobody could write to it outside of that mode
            cache.allocate(self._sizes, self._like)
        layers = [
            (layer.keys, layer.values) for layer in cache.layers if isinstance(layer, SlotLayer)
        ]
        return _Memory(next(self._numbers), batch, capacity, layers)

    def _give_back(self, memory: _Memory) -> None:
        """Called whenever a cache is collected, in whatever thread, and in the middle of anything:
        so it must neither wait nor come between.
        """
        self._returned.append(memory)
        if self._lock.acquire():
            try:
                self._sort()
            finally:
                self._lock.release()

    def _sort(self) -> None:
        """Keep what was given back, or give it up."""
        if self._sorting:
            return
        self._sorting = True
        try:
            while self._returned:
                self._keep(self._returned.popleft())
        finally:
            self._sorting = False

    def _keep(self, memory: _Memory) -> None:
        other = self._idle.get(memory.batch)
        if other is not None and other.capacity >= memory.capacity:
            self._forget(memory.number)
            return
        if other is not None:
            self._forget(other.number)
        self._idle[memory.batch] = memory
