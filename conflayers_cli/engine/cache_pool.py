"""A pool of cache memory: recorded passes keep reading and writing the same buffers."""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Callable

import torch

from conflayers_cli.engine.graph_runner import bucket_kv_len
from conflayers_cli.engine.model_lock import ModelLock
from conflayers_cli.kernels.kv_cache import BufferView, KVCache, KVLayout

MAX_WASTE = 64
"""Memory up to this many times as long as needed is reused."""


class CachePool:
    """Gives out caches, each a view of one in the pool, whose memory serves the next when the view
    is garbage-collected. Of idle ones only the longest per batch size is kept.

    Args:
        layout: the caches' layers.
        forget: called with the number of memory that is released.
        lock: held while memory is taken, and while it is released.
    """

    def __init__(self, layout: KVLayout, forget: Callable[[int], None], lock: ModelLock) -> None:
        self._lock = lock
        self._returned: deque[KVCache] = deque()
        self._sorting = False
        self._layout = layout
        self._forget = forget
        self._numbers = itertools.count(1)
        self._idle: dict[int, KVCache] = {}  # by batch size

    def take(self, capacity: int, batch: int) -> KVCache:
        """A cache for ``batch`` sequences of at least ``capacity`` positions, all zeros.

        The lock must be held.
        """
        self._sort()
        wanted = bucket_kv_len(capacity)
        memory = self._idle.pop(batch, None)
        if memory is not None and wanted <= memory.capacity <= MAX_WASTE * wanted:
            memory.clear(0, memory.capacity)
        else:
            if memory is not None:
                self._forget(memory.buffer.number)
                del memory  # before as much again is allocated
            memory = KVCache(len(self._layout.sizes), batch, wanted)
            memory.buffer = BufferView(next(self._numbers), 0, batch)
            with torch.inference_mode(False):  # or it could not be written outside of that mode
                memory.allocate(self._layout)
        cache = memory.view(0, batch)
        weakref.finalize(cache, self._give_back, memory).atexit = False
        return cache

    def _give_back(self, memory: KVCache) -> None:
        """Called when a view is collected, in any thread and at any moment, so it must not wait."""
        self._returned.append(memory)
        if self._lock.acquire(blocking=False):
            try:
                self._sort()
            finally:
                self._lock.release()

    def _sort(self) -> None:
        """Keep what was given back, or release it."""
        if self._sorting:  # a collection within this very loop
            return
        self._sorting = True
        try:
            while self._returned:
                memory = self._returned.popleft()
                idle = self._idle.setdefault(memory.batch, memory)
                if idle is not memory:
                    longer, shorter = sorted((idle, memory), key=lambda each: -each.capacity)
                    self._idle[memory.batch] = longer
                    self._forget(shorter.buffer.number)
        finally:
            self._sorting = False
