"""The KV cache: one slot per position and row, allocated once, never cloned.

A forward says at which slots its tokens are written and how far the attention may look; what a
query sees is the mask's business. Rejected drafts need no clean-up: their slots are simply not seen
again until they are overwritten. So rolling back is a matter of counting, and costs nothing.
Alternatives to a drafted token share its position, but not its slot: they borrow one behind the
draft, and the one that is kept moves.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

EXTENT_MULTIPLE = 512
"""Keys are read in extents of a multiple of this, the block that PyTorch's CPU kernel works through
at once: a last block of another size may round otherwise (see :mod:`.attention`)."""


def extent_for(length: int) -> int:
    """The extent, in slots, that holds ``length`` of them."""
    return max(1, -(-length // EXTENT_MULTIPLE)) * EXTENT_MULTIPLE


class _Writes:
    """Where the tokens of the forward at hand go, shared by all layers of one cache."""

    slots: torch.Tensor
    extent: int


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer: ``[B, H, capacity, D]`` each, in the model's dtype."""

    is_compileable = True

    def __init__(self, batch: int, capacity: int, writes: _Writes) -> None:
        super().__init__()
        self.batch = batch
        self.capacity = capacity
        self.writes = writes

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate. Zeros, not empty memory: a masked NaN would still poison the weighted sum."""

        def buffer(states: torch.Tensor) -> torch.Tensor:
            return states.new_zeros((self.batch, states.shape[1], self.capacity, states.shape[-1]))

        self.keys, self.values = buffer(key_states), buffer(value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write ``[B, H, T, D]`` at the announced slots; return the extent to attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        slots, extent = self.writes.slots, self.writes.extent
        if self.batch == 1:
            self.keys.index_copy_(2, slots[0], key_states)
            self.values.index_copy_(2, slots[0], value_states)
        else:
            rows = torch.arange(self.batch, device=slots.device)[:, None]
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
    """

    def __init__(self, depth: int, batch: int, capacity: int) -> None:
        self.capacity = extent_for(capacity)
        self.batch = batch
        self._writes = _Writes()
        super().__init__(
            layers=[SlotLayer(batch, self.capacity, self._writes) for _ in range(depth)]
        )

    def announce(self, slots: torch.Tensor, extent: int) -> None:
        """Say where the next forward writes: slots ``[B, T]`` int64, all under ``extent``.

        Raises:
            ValueError: the extent is beyond the capacity.
        """
        if extent > self.capacity:
            raise ValueError(f"extent {extent} is beyond the cache's capacity {self.capacity}")
        self._writes.slots, self._writes.extent = slots, extent

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

    @property
    def bytes(self) -> int:
        """Memory held, in bytes."""
        layers = [layer for layer in self.layers if layer.is_initialized]
        return sum(t.nbytes for layer in layers for t in (layer.keys, layer.values))
