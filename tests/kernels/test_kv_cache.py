"""The cache: where keys and values are written, what is read back."""

from __future__ import annotations

import pytest
import torch

from conflayers_cli.kernels.kv_cache import KV_BLOCK as EXTENT
from conflayers_cli.kernels.kv_cache import KVCache, KVLayout, round_up_kv_len
from tests import tiny

HEADS, DIM = 2, 4


def states(batch: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, HEADS, tokens, DIM)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


@pytest.mark.parametrize(
    ("length", "extents"),
    [(0, 1), (1, 1), (EXTENT, 1), (EXTENT + 1, 2), (2 * EXTENT, 2), (2 * EXTENT + 1, 3)],
)
def test_extents_hold_the_length(length: int, extents: int) -> None:
    assert round_up_kv_len(length) == extents * EXTENT


@pytest.mark.parametrize("batch", [1, 3])
def test_rows_are_written_at_their_own_slots(batch: int) -> None:
    cache = KVCache(2, batch, EXTENT + 1)
    # Each row elsewhere, out of order, and over what an earlier pass wrote.
    first = torch.arange(5).expand(batch, -1) + torch.arange(batch)[:, None]
    second = torch.tensor([[3, 1]]) + torch.arange(batch)[:, None]
    wanted = torch.zeros(2, batch, HEADS, EXTENT, DIM)
    for slots, seed in ((first, 1), (second, 2)):
        cache.set_slots(slots, EXTENT)
        keys, values = states(batch, slots.shape[1], seed)
        read = cache.update(keys, values, 1)
        for row in range(batch):
            for i, slot in enumerate(slots[row].tolist()):
                wanted[0, row, :, slot], wanted[1, row, :, slot] = (
                    keys[row, :, i],
                    values[row, :, i],
                )
        assert torch.equal(read[0], wanted[0])
        assert torch.equal(read[1], wanted[1])


def test_layers_share_the_announcement_but_not_the_memory() -> None:
    cache = KVCache(2, 1, 10)
    cache.set_slots(torch.tensor([[0]]), EXTENT)
    one, other = states(1, 1, 1), states(1, 1, 2)
    cache.update(*one, 0)
    assert cache.bytes == 2 * EXTENT * HEADS * DIM * 4  # only layers in use hold memory
    read = cache.update(*other, 1)
    assert torch.equal(read[0][:, :, :1], other[0])
    assert torch.equal(cache.layers[0].keys[:, :, :1], one[0])
    assert cache.bytes == 4 * EXTENT * HEADS * DIM * 4


def test_an_extent_beyond_the_capacity_is_refused() -> None:
    cache = KVCache(1, 1, EXTENT + 1)
    assert cache.capacity == 2 * EXTENT
    cache.set_slots(torch.tensor([[2 * EXTENT - 1]]), 2 * EXTENT)
    with pytest.raises(ValueError, match=f"capacity {2 * EXTENT}"):
        cache.set_slots(torch.tensor([[2 * EXTENT]]), 3 * EXTENT)


def test_rows_of_a_batch_have_their_own_lengths() -> None:
    """Two texts of other lengths, side by side, give the logits that each gives alone."""
    decoder = tiny.decoder("llama")
    texts = [tiny.prompt(20, 1), tiny.prompt(20, 2)]
    lengths, width = [9, 14], 3
    cache = decoder.new_cache(20, batch=2)
    decoder.prefill(torch.tensor([text[:14] for text in texts]), cache)  # row 0: 5 too many, unseen
    tokens = torch.tensor([t[n : n + width] for t, n in zip(texts, lengths, strict=True)])
    positions = torch.tensor([[n, n + 1, n + 2] for n in lengths])
    together = decoder.forward(tokens, positions, cache)
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        alone = decoder.new_cache(20)
        whole = torch.tensor([text[: length + width]])
        logits = decoder.forward(whole, torch.arange(length + width)[None], alone)
        torch.testing.assert_close(together[row], logits[0, length:], rtol=1e-4, atol=1e-5)


def write(cache: KVCache, slots: list[list[int]], seed: int) -> torch.Tensor:
    """Write keys to layer 1 at these slots; returns the keys."""
    keys, values = states(len(slots), len(slots[0]), seed)
    cache.set_slots(torch.tensor(slots), EXTENT)
    cache.update(keys, values, 1)
    return keys


@pytest.mark.parametrize("first", ["whole", "view"])
def test_a_view_is_some_rows_in_the_same_memory(first: str) -> None:
    """Whoever writes first allocates for all rows."""
    cache = KVCache(2, 4, EXTENT)
    early = cache.view(1, 3)  # made before there is any memory
    if first == "whole":
        write(cache, [[0], [0], [0], [0]], 1)
    seen = write(early, [[5, 6], [7, 9]], 2)
    alone = write(cache.view(3, 4), [[2]], 3)
    deeper = write(early.view(1, 2), [[8]], 4)
    keys = cache.layers[1].keys
    assert keys.shape == (4, HEADS, EXTENT, DIM)
    assert torch.equal(keys[1][:, 5:7], seen[0])
    assert torch.equal(keys[2][:, 7], seen[1][:, 0])
    assert torch.equal(keys[2][:, 9], seen[1][:, 1])
    assert torch.equal(keys[3][:, 2], alone[0][:, 0])
    assert torch.equal(keys[2][:, 8], deeper[0][:, 0])
    used = {0: 0, 1: 2, 2: 3, 3: 1} if first == "view" else {0: 1, 1: 3, 2: 4, 3: 2}
    for row, count in used.items():
        assert int((keys[row] != 0).all(dim=-1).all(dim=0).sum()) == count
    assert torch.equal(early.layers[1].keys, keys[1:3])
    assert (cache.bytes, early.bytes) == (keys.nbytes * 2, keys.nbytes)
    assert early.capacity == cache.capacity


def test_what_is_written_within_unchanged_is_undone() -> None:
    cache = KVCache(2, 1, 10)
    cache.set_slots(torch.arange(6)[None], EXTENT)
    for layer in range(2):
        cache.update(torch.randn(1, HEADS, 6, DIM), torch.randn(1, HEADS, 6, DIM), layer)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    with pytest.raises(ZeroDivisionError), cache.unchanged(2, 6):
        cache.set_slots(torch.arange(2, 6)[None], EXTENT)
        cache.update(torch.randn(1, HEADS, 4, DIM), torch.randn(1, HEADS, 4, DIM), 1)
        assert not torch.equal(cache.layers[1].keys, before[1][0])
        raise ZeroDivisionError
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)


def test_a_view_of_rows_that_are_not_there_is_refused() -> None:
    cache = KVCache(2, 4, EXTENT)
    for begin, end in ((-1, 2), (2, 2), (3, 2), (2, 5)):
        with pytest.raises(ValueError, match=f"rows {begin} to {end} of a cache of 4"):
            cache.view(begin, end)


def test_a_row_is_copied_as_far_as_it_is_filled() -> None:
    cache = KVCache(2, 3, EXTENT)
    write(cache, [[0, 1, 2, 3]] * 3, 1)
    before = cache.layers[1].keys.clone()
    values = cache.layers[1].values.clone()
    cache.copy_sequence(2, 0, 3)  # layer 0 holds nothing yet
    for now, then in ((cache.layers[1].keys, before), (cache.layers[1].values, values)):
        assert torch.equal(now[0, :, :3], then[2, :, :3])
        assert torch.equal(now[0, :, 3:], then[0, :, 3:])
        assert torch.equal(now[1:], then[1:])


def test_a_large_cache_takes_memory_only_where_it_is_written() -> None:
    """A budget of a million tokens that ends after a few."""
    psutil = pytest.importorskip("psutil")
    layout = KVLayout((((2, 64), (2, 64)),) * 4, torch.bfloat16, torch.device("cpu"))
    process = psutil.Process()
    before = process.memory_info().rss
    cache = KVCache(4, 1, 1 << 20)
    cache.allocate(layout)
    cache.layers[0].keys[:, :, :600] = 1.0
    assert cache.bytes == 4 * 2 * 2 * 64 * 2 << 20
    assert process.memory_info().rss - before < 64 << 20
    assert not cache.layers[3].values[:, :, -1].any()
