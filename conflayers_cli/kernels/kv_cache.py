"""The KV cache: one slot per position and sequence, allocated once, never cloned.

A pass says at which slots its tokens are written and how many slots attention may read; the mask
decides what a query sees. Rejected drafts need no clean-up: nothing sees their slots until they are
overwritten. Tree alternatives share their token's position, but take slots behind the draft; the
accepted one is moved. A view shows some sequences as a cache of their own, in the same memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

KV_BLOCK = 512
"""Attention reads a multiple of this many slots, the block of PyTorch's CPU kernel: a last block of
another size may round otherwise (see :mod:`conflayers_cli.kernels.attention`)."""


def round_up_kv_len(length: int, multiple: int = KV_BLOCK) -> int:
    """The smallest multiple, at least one, that is not below ``length``."""
    return max(1, -(-length // multiple)) * multiple


class KVLayout(NamedTuple):
    """By layer, (heads, head size) of the keys and of the values; the dtype and device of all."""

    sizes: tuple[tuple[tuple[int, int], tuple[int, int]], ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def elements_per_slot(self) -> int:
        """Elements of one sequence's keys and values at one slot, of all layers."""
        return sum(heads * size for layer in self.sizes for heads, size in layer)


class BufferView(NamedTuple):
    """The memory of a cache: its number (0: not from a pool) and the sequences of it in use."""

    number: int
    begin: int
    end: int


class _PassSlots:
    """Where the current pass writes, shared by all layers of one cache."""

    slots: torch.Tensor
    sequences: torch.Tensor
    kv_len: int


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer: ``[B, H, capacity, D]`` each, in the model's dtype.

    Args:
        batch, capacity: sequences, and slots of each.
        current: where the current pass writes.
        parent: the layer whose memory this one shows a part of; None: it has its own.
        begin: the parent's first sequence that is shown.
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
        current: _PassSlots,
        parent: SlotLayer | None = None,
        begin: int = 0,
    ) -> None:
        super().__init__()
        self.batch, self.capacity, self.current = batch, capacity, current
        self._parent, self._shown = parent, slice(begin, begin + batch)
        if parent is not None and parent.is_initialized:
            self.use_buffers(parent.keys[self._shown], parent.values[self._shown])

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate for states like these, of whatever length.

        Zeros, not empty memory: a masked NaN would still poison the weighted sum.
        """
        parent = self._parent
        if parent is not None:
            if not parent.is_initialized:
                parent.lazy_initialization(key_states, value_states)
            self.use_buffers(parent.keys[self._shown], parent.values[self._shown])
            return
        keys, values = (
            zeros((self.batch, states.shape[1], self.capacity, states.shape[3]), states)
            for states in (key_states, value_states)
        )
        self.use_buffers(keys, values)

    def use_buffers(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Use this memory from now on."""
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write ``[B, H, T, D]`` at the pass's slots; return the slots that attention reads."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        # Layers may be on other devices than what the model is given.
        slots, kv_len = self.current.slots.to(self.device), self.current.kv_len
        if self.batch == 1:
            self.keys.index_copy_(2, slots[0], key_states)
            self.values.index_copy_(2, slots[0], value_states)
        else:
            sequences = self.current.sequences.to(self.device)
            self.keys[sequences, :, slots] = key_states.transpose(1, 2)
            self.values[sequences, :, slots] = value_states.transpose(1, 2)
        return self.keys[:, :, :kv_len], self.values[:, :, :kv_len]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.current.kv_len, 0

    def get_seq_length(self) -> int:
        return 0  # positions are always given to the model, never derived from the cache

    def get_max_length(self) -> int:
        return self.capacity


class KVCache(Cache):
    """The cache of a batch of sequences, each with its own length.

    Args:
        depth: number of decoder layers.
        batch: sequences.
        capacity: positions of each; rounded up to a multiple of `KV_BLOCK`.

    Attributes:
        buffer: which memory it uses.
    """

    def __init__(self, depth: int, batch: int, capacity: int) -> None:
        self.capacity = round_up_kv_len(capacity)
        self.batch = batch
        self.buffer = BufferView(0, 0, batch)
        self._parent: KVCache | None = None  # held, so that its memory isn't given to another cache
        self._current = _PassSlots()
        super().__init__(
            layers=[SlotLayer(batch, self.capacity, self._current) for _ in range(depth)]
        )

    @property
    def _allocated(self) -> list[SlotLayer]:
        return [layer for layer in self.layers if layer.is_initialized]

    def view(self, begin: int, end: int) -> KVCache:
        """Sequences ``begin`` to ``end`` (excluded) as a cache in the same memory.

        Raises:
            ValueError: there are no such sequences.
        """
        if not 0 <= begin < end <= self.batch:
            raise ValueError(f"rows {begin} to {end} of a cache of {self.batch}")
        batch = end - begin
        part = KVCache(0, batch, self.capacity)
        part.layers = [
            SlotLayer(batch, self.capacity, part._current, layer, begin) for layer in self.layers
        ]
        number, first, _ = self.buffer
        part.buffer = BufferView(number, first + begin, first + end)
        part._parent = self
        return part

    def set_slots(self, slots: torch.Tensor, kv_len: int) -> None:
        """Where the next pass writes: slots ``[B, T]`` int64, all below ``kv_len``.

        Raises:
            ValueError: the length is beyond the capacity.
        """
        if kv_len > self.capacity:
            raise ValueError(f"length {kv_len} is beyond the cache's capacity {self.capacity}")
        self._current.slots, self._current.kv_len = slots, kv_len
        if self.batch > 1:
            self._current.sequences = torch.arange(self.batch, device=slots.device)[:, None]

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Copy one slot to another, in every sequence and layer.

        Keys carry the rotation of their token's position, not of their slot.
        """
        for layer in self._allocated:
            layer.keys[:, :, target] = layer.keys[:, :, source]
            layer.values[:, :, target] = layer.values[:, :, source]

    @torch.inference_mode()
    def copy_sequence(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` slots of one sequence to another, in every layer."""
        for layer in self._allocated:
            layer.keys[target, :, :length] = layer.keys[source, :, :length]
            layer.values[target, :, :length] = layer.values[source, :, :length]

    @torch.inference_mode()
    def clear(self, begin: int, end: int) -> None:
        """Zero slots ``begin`` to ``end`` (excluded): a mask hides numbers, but not NaN."""
        for layer in self._allocated:
            layer.keys[:, :, begin:end] = 0
            layer.values[:, :, begin:end] = 0

    @torch.inference_mode()
    def copy_from(self, other: KVCache, length: int) -> None:
        """Copy the first ``length`` slots of a cache with as many layers, and no more sequences."""
        for layer, source in zip(self.layers, other.layers, strict=True):
            if not source.is_initialized:
                continue
            if not layer.is_initialized:
                layer.lazy_initialization(source.keys, source.values)
            layer.keys[: other.batch, :, :length] = source.keys[:, :, :length]
            layer.values[: other.batch, :, :length] = source.values[:, :, :length]

    def allocate(self, layout: KVLayout) -> None:
        """Allocate all layers now, not in the first pass: among its temporary buffers, lasting ones
        would keep the allocator from giving that memory back.
        """
        for layer, sizes in zip(self.layers, layout.sizes, strict=True):
            layer.lazy_initialization(
                *(
                    torch.empty((0, heads, 0, size), dtype=layout.dtype, device=layout.device)
                    for heads, size in sizes
                )
            )

    @contextmanager
    def unchanged(self, begin: int, end: int) -> Iterator[None]:
        """Within: slots ``begin`` to ``end`` (excluded) may be written; they are restored after it.

        A pass that writes the same tokens again may round otherwise.
        """
        saved = [
            (layer, layer.keys[:, :, begin:end].clone(), layer.values[:, :, begin:end].clone())
            for layer in self._allocated
        ]
        try:
            yield
        finally:
            for layer, keys, values in saved:
                layer.keys[:, :, begin:end] = keys
                layer.values[:, :, begin:end] = values

    @property
    def layout(self) -> KVLayout | None:
        """None before all layers are allocated."""
        layers = self._allocated
        if len(layers) < len(self.layers):
            return None
        sizes = tuple(
            ((keys[1], keys[3]), (values[1], values[3]))
            for keys, values in ((layer.keys.shape, layer.values.shape) for layer in layers)
        )
        return KVLayout(sizes, layers[0].dtype, layers[0].device)

    @property
    def bytes(self) -> int:
        """Memory held, in bytes; a view's is that of its sequences."""
        return sum(t.nbytes for layer in self._allocated for t in (layer.keys, layer.values))


def zeros(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Zeros on the device and in the dtype of a tensor; on a CPU memory that the system hands over
    as it is written to: a text that ends long before its budget never takes the rest."""
    if like.device.type != "cpu":
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    memory = np.zeros(math.prod(shape) * like.dtype.itemsize, np.uint8)
    return torch.from_numpy(memory).view(like.dtype).view(shape)
