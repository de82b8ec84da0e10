"""The KV cache: one slot per position and row, allocated once, never cloned.

A forward says at which slots its tokens are written and how far the attention may look; what a
query sees is the mask's business. Rejected drafts need no clean-up: their slots are simply not seen
again until they are overwritten. So rolling back is a matter of counting, and costs nothing.
Alternatives to a drafted token share its position, but not its slot: they borrow one behind the
draft, and the one that is kept moves.

A view shows some of a cache's rows as a cache of their own, in the same memory: so a pass can run
over the rows that are still at work, or over one whose prompt is only now being read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

EXTENT_MULTIPLE = 512
"""Keys are read in extents of a multiple of this, the block that PyTorch's CPU kernel works through
at once: a last block of another size may round otherwise (see :mod:`conflayers_cli.kernels.attention`)."""


def extent_for(length: int, multiple: int = EXTENT_MULTIPLE) -> int:
    """The extent, in slots, that holds ``length`` of them."""
    return max(1, -(-length // multiple)) * multiple


HeadSizes = tuple[int, int]
"""Heads, and the size of each."""
LayerSizes = tuple[HeadSizes, HeadSizes]
"""Those of a layer's keys and of its values."""


class Place(NamedTuple):
    """Which memory a cache has: its number, and the rows of it that the cache shows.

    The memory of most caches is their own, and nobody's else later on: number 0.
    """

    number: int
    begin: int
    end: int


class _Writes:
    """Where the tokens of the forward at hand go, shared by all layers of one cache."""

    slots: torch.Tensor
    rows: torch.Tensor
    extent: int


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer: ``[B, H, capacity, D]`` each, in the model's dtype.

    Args:
        batch, capacity: rows, and slots per row.
        writes: where the forward at hand writes.
        whole: the layer whose memory this one shows a part of; None: it has its own.
        begin: the first of that layer's rows that it shows.
    """

    is_compileable = True
    keys: torch.Tensor
    values: torch.Tensor
    dtype: torch.dtype
    device: torch.device
    is_initialized: bool

    def __init__(
        self,
        batch: int,
        capacity: int,
        writes: _Writes,
        whole: SlotLayer | None = None,
        begin: int = 0,
    ) -> None:
        super().__init__()
        self.batch = batch
        self.capacity = capacity
        self.writes = writes
        self._whole = whole
        self._begin = begin
        if whole is not None and whole.is_initialized:
            self._show(whole)

    def view(self, begin: int, batch: int, writes: _Writes) -> SlotLayer:
        """``batch`` of this layer's rows from ``begin`` on, in the same memory."""
        return SlotLayer(batch, self.capacity, writes, self, begin)

    def _show(self, whole: SlotLayer) -> None:
        rows = slice(self._begin, self._begin + self.batch)
        self.adopt(whole.keys[rows], whole.values[rows])

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate. Zeros, not empty memory: a masked NaN would still poison the weighted sum."""
        if self._whole is not None:
            if not self._whole.is_initialized:
                self._whole.lazy_initialization(key_states, value_states)
            self._show(self._whole)
            return

        sizes = [(states.shape[1], states.shape[-1]) for states in (key_states, value_states)]
        self.allocate(sizes[0], sizes[1], key_states)

    def allocate(self, keys: HeadSizes, values: HeadSizes, like: torch.Tensor) -> None:
        """Allocate for so many heads of such a size, in the dtype and on the device of ``like``."""

        def buffer(sizes: HeadSizes) -> torch.Tensor:
            return like.new_zeros((self.batch, sizes[0], self.capacity, sizes[1]))

        self.adopt(buffer(keys), buffer(values))

    def adopt(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Have these as memory."""
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    @property
    def sizes(self) -> LayerSizes:
        """What :meth:`allocate` would be told."""
        keys, values = self.keys.shape, self.values.shape
        return (keys[1], keys[3]), (values[1], values[3])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write ``[B, H, T, D]`` at the announced slots; return the extent to attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        # Layers may be on other devices than what the model is given.
        slots, extent = self.writes.slots.to(self.device), self.writes.extent
        if self.batch == 1:
            self.keys.index_copy_(2, slots[0], key_states)
            self.values.index_copy_(2, slots[0], value_states)
        else:
            rows = self.writes.rows.to(self.device)
            self.keys[rows, :, slots] = key_states.transpose(1, 2)
            self.values[rows, :, slots] = value_states.transpose(1, 2)
        return self.keys[:, :, :extent], self.values[:, :, :extent]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.writes.extent, 0

    def get_seq_length(self) -> int:
        return 0  # positions are always given to the model, never derived from the cache

    def get_max_length(self) -> int:
        return self.capacity


class KVCache(Cache):
    """The cache of a batch of sequences, each row with its own length.

    Args:
        depth: number of decoder layers.
        batch: rows.
        capacity: positions per row; rounded up to a full extent.

    Attributes:
        place: which memory it has.
    """

    def __init__(self, depth: int, batch: int, capacity: int) -> None:
        self.capacity = extent_for(capacity)
        self.batch = batch
        self.place = Place(0, 0, batch)
        self._whole: KVCache | None = None  # held, so that nobody else gets its memory
        self._writes = _Writes()
        super().__init__(
            layers=[SlotLayer(batch, self.capacity, self._writes) for _ in range(depth)]
        )

    def view(self, begin: int, end: int) -> KVCache:
        """Rows ``begin`` to ``end``, the latter not included, as a cache in the same memory.

        Raises:
            ValueError: there are no such rows.
        """
        if not 0 <= begin < end <= self.batch:
            raise ValueError(f"rows {begin} to {end} of a cache of {self.batch}")
        part = KVCache(0, end - begin, self.capacity)
        part.layers = [layer.view(begin, end - begin, part._writes) for layer in self.layers]
        number, first, _ = self.place
        part.place = Place(number, first + begin, first + end)
        part._whole = self
        return part

    def announce(self, slots: torch.Tensor, extent: int) -> None:
        """Say where the next forward writes: slots ``[B, T]`` int64, all under ``extent``.

        Raises:
            ValueError: the extent is beyond the capacity.
        """
        if extent > self.capacity:
            raise ValueError(f"extent {extent} is beyond the cache's capacity {self.capacity}")
        self._writes.slots, self._writes.extent = slots, extent
        if self.batch > 1:
            self._writes.rows = torch.arange(self.batch, device=slots.device)[:, None]

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Copy what one slot holds to another, in every row and layer.

        Keys carry the rotation of their token's position, not of their slot: a token written in
        another slot than its position's is moved there once it is part of the text.
        """
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys[:, :, target] = layer.keys[:, :, source]
                layer.values[:, :, target] = layer.values[:, :, source]

    @torch.inference_mode()
    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` slots of one row to another, in every layer."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys[target, :, :length] = layer.keys[source, :, :length]
                layer.values[target, :, :length] = layer.values[source, :, :length]

    @torch.inference_mode()
    def clear(self, begin: int, end: int) -> None:
        """Zero slots from ``begin`` up to ``end`` in every row and layer.

        For slots that hold no numbers: nobody is to see them, but masks hide numbers alone.
        """
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys[:, :, begin:end] = 0
                layer.values[:, :, begin:end] = 0

    @torch.inference_mode()
    def copy_from(self, other: KVCache, length: int) -> None:
        """Take over the first ``length`` slots of a cache with as many layers, and no more rows."""
        for layer, source in zip(self.layers, other.layers, strict=True):
            if not source.is_initialized:
                continue
            if not layer.is_initialized:
                layer.allocate(*source.sizes, source.keys)
            layer.keys[: other.batch, :, :length] = source.keys[:, :, :length]
            layer.values[: other.batch, :, :length] = source.values[:, :, :length]

    def allocate(self, sizes: Sequence[LayerSizes], like: torch.Tensor) -> None:
        """Allocate all layers now, rather than one by one as the first pass comes to them.

        Buffers that last would otherwise lie among that pass's passing ones, whose memory then
        can't be given back.
        """
        for layer, (keys, values) in zip(self.layers, sizes, strict=True):
            layer.allocate(keys, values, like)

    def adopt(self, number: int, layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Take memory that is there already: keys and values ``[B, H, capacity, D]`` by layer."""
        for layer, (keys, values) in zip(self.layers, layers, strict=True):
            layer.adopt(keys, values)
        self.place = Place(number, 0, self.batch)

    @contextmanager
    def unchanged(self, begin: int, end: int) -> Iterator[None]:
        """Within: slots from ``begin`` up to ``end`` may be written; they are restored behind it.

        What a pass writes anew of the same tokens may be rounded otherwise.
        """
        kept = [
            (layer, layer.keys[:, :, begin:end].clone(), layer.values[:, :, begin:end].clone())
            for layer in self.layers
            if layer.is_initialized
        ]
        try:
            yield
        finally:
            for layer, keys, values in kept:
                layer.keys[:, :, begin:end] = keys
                layer.values[:, :, begin:end] = values

    @property
    def sizes(self) -> list[LayerSizes] | None:
        """The sizes of all layers' keys and values; None before they are known."""
        if not all(layer.is_initialized for layer in self.layers):
            return None
        return [layer.sizes for layer in self.layers]

    @property
    def bytes(self) -> int:
        """Memory held, in bytes; a view's is that of its rows."""
        layers = [layer for layer in self.layers if layer.is_initialized]
        return sum(t.nbytes for layer in layers for t in (layer.keys, layer.values))
