"""The cache against a naive model of it: lists of what each row holds, and what attention reads.

A machine writes, moves, copies, puts back and gives away at random, and looks at what an attention
call makes of it. Texts, drafts and leaves of a real model: `test_cache_passes.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from conflayers_cli.engine.cache_pool import CachePool
from conflayers_cli.engine.model_lock import ModelLock
from conflayers_cli.kernels import attention
from conflayers_cli.kernels.kv_cache import KV_BLOCK, KVCache, KVLayout, round_up_kv_len

HEADS, DIM, LAYERS = 2, 4, 2
# On both sides of the end of the first extent.
SLOTS = st.integers(0, 6) | st.integers(KV_BLOCK - 3, KV_BLOCK + 3)
CAPACITY = KV_BLOCK + 8
Row = dict[int, int]
"""What a row holds by slot: the number of the write that put it there, of which all follows."""


def vector(number: int, layer: int, kind: int) -> torch.Tensor:
    """The key (kind 0), value (1) or query (2) of a write: ``[H, D]``, other for every one."""
    generator = torch.Generator().manual_seed(1000 * number + 10 * layer + kind)
    return torch.randn(HEADS, DIM, generator=generator)


class Slots(RuleBasedStateMachine):
    """Writes and reads of the cache, without a model."""

    @initialize(batch=st.integers(1, 3), pooled=st.booleans())
    def begin(self, batch: int, pooled: bool) -> None:
        self.batch, self.writes = batch, 0
        sizes = (((HEADS, DIM), (HEADS, DIM)),) * LAYERS
        layout = KVLayout(sizes, torch.float32, torch.device("cpu"))
        pool = CachePool(layout, lambda number: None, ModelLock())
        self.pool = pool if pooled else None
        self.take()

    def take(self) -> None:
        """A cache nobody has written to."""
        if self.pool is not None:
            self.cache = self.pool.take(CAPACITY, self.batch)
        else:
            self.cache = KVCache(LAYERS, self.batch, CAPACITY)
        self.held: list[list[Row]] = [[{} for _ in range(self.batch)] for _ in range(LAYERS)]

    def write(self, rows: range, slots: Sequence[int], layers: Sequence[int]) -> None:
        """One pass: the same number of tokens in each row, each row's one slot further on."""
        view = self.cache.view(rows.start, rows.stop)
        at = [[slot + i for slot in slots] for i in range(len(rows))]
        first = self.writes
        numbers = [[first + i * len(slots) + j for j in range(len(slots))] for i in range(len(at))]
        self.writes += len(rows) * len(slots)
        view.set_slots(torch.tensor(at), round_up_kv_len(max(map(max, at)) + 1))
        for layer in layers:
            states = [
                torch.stack(
                    [torch.stack([vector(n, layer, kind) for n in own], 1) for own in numbers]
                )
                for kind in (0, 1)
            ]
            view.update(states[0], states[1], layer)
            for row, own, places in zip(rows, numbers, at, strict=True):
                self.held[layer][row].update(zip(places, own, strict=True))

    @rule(
        ends=st.tuples(st.integers(0, 2), st.integers(1, 3)),
        slots=st.lists(SLOTS, min_size=1, max_size=4, unique=True),
        skipped=st.sampled_from([(), (0,), (1,)]),
    )
    def a_pass_writes(
        self, ends: tuple[int, int], slots: list[int], skipped: tuple[int, ...]
    ) -> None:
        self.write(self.rows(ends), slots, [i for i in range(LAYERS) if i not in skipped])

    def rows(self, ends: tuple[int, int]) -> range:
        begin = ends[0] % self.batch
        return range(begin, min(begin + ends[1], self.batch))

    @rule(ends=st.tuples(st.integers(0, 2), st.integers(1, 3)), source=SLOTS, goal=SLOTS)
    def a_slot_moves(self, ends: tuple[int, int], source: int, goal: int) -> None:
        rows = self.rows(ends)
        self.cache.view(rows.start, rows.stop).move(source, goal)
        for held in self.held:
            for row in rows:
                self.copy(held[row], held[row], source, goal)

    def copy(self, source_row: Row, target_row: Row, source: int, target: int) -> None:
        """What nobody has written is nobody's to read: it need not be told apart from zeros."""
        if source in source_row:
            target_row[target] = source_row[source]
        else:
            target_row.pop(target, None)

    @rule(source=st.integers(0, 2), goal=st.integers(0, 2), length=SLOTS)
    def a_row_takes_anothers_place(self, source: int, goal: int, length: int) -> None:
        source, goal = source % self.batch, goal % self.batch
        self.cache.copy_sequence(source, goal, length)
        for held in self.held:
            for slot in range(length):
                self.copy(held[source], held[goal], slot, slot)

    @rule(
        ends=st.tuples(st.integers(0, 2), st.integers(1, 3)),
        begin=SLOTS,
        count=st.integers(1, 4),
    )
    def what_is_written_for_a_while_is_put_back(
        self, ends: tuple[int, int], begin: int, count: int
    ) -> None:
        before = [[dict(row) for row in held] for held in self.held]
        rows = self.rows(ends)
        known = [
            i for i, layer in enumerate(self.cache.layers) if layer.is_initialized
        ]  # others have nothing to put back
        with self.cache.unchanged(begin, begin + count + len(rows) - 1):
            self.write(rows, range(begin, begin + count), known)
        self.held = before

    @precondition(lambda self: self.pool is not None)
    @rule(keep=st.booleans())
    def the_next_text_has_a_fresh_cache(self, keep: bool) -> None:
        """In the same memory, or in other memory as long as somebody holds a part of the old."""
        view = self.cache.view(0, 1) if keep else None
        before = [layer.values.clone() for layer in view.layers] if view else []
        del self.cache  # in its memory nothing is anybody's from here on, but for the view
        self.take()
        assert all(not layer.values.any() for layer in self.cache.layers)
        self.write(range(self.batch), range(4), range(LAYERS))
        if view:
            for layer, values in zip(view.layers, before, strict=True):
                assert torch.equal(layer.values, values)

    @rule(slot=SLOTS, below=SLOTS, window=st.none() | st.integers(1, 5))
    def attention_reads(self, slot: int, below: int, window: int | None) -> None:
        """Queries in their own slots see those below a position, as far as their window goes."""
        self.write(range(self.batch), [slot], range(LAYERS))
        first = 0 if window is None else max(0, below - window)
        for layer, held in enumerate(self.held):
            for row, own in enumerate(held):
                seen = {slot + row, *(at for at in own if first <= at < below)}
                self.check_read(row, layer, slot + row, sorted(seen))

    def check_read(self, row: int, layer: int, slot: int, seen: list[int]) -> None:
        """Attention of one query against the softmax over a list of what it sees."""
        held, view = self.held[layer][row], self.cache.view(row, row + 1)
        extent = round_up_kv_len(max(seen) + 1)
        view.set_slots(torch.tensor([[slot]]), extent)
        key, value, query = (vector(held[slot], layer, kind)[None, :, None] for kind in range(3))
        keys, values = view.update(key, value, layer)
        mask = torch.zeros(1, 1, 1, extent, dtype=torch.bool)
        mask[..., seen] = True
        got, _ = attention.attention_forward(torch.nn.Module(), query, keys, values, mask)
        many = [torch.stack([vector(held[at], layer, kind) for at in seen], 1) for kind in (0, 1)]
        weights = torch.softmax(query[0].double() @ many[0].double().mT / DIM**0.5, dim=-1)
        expected = (weights @ many[1].double())[:, 0]
        torch.testing.assert_close(got[0, 0].double(), expected, rtol=1e-5, atol=1e-5)

    def teardown(self) -> None:
        """All there is is read once more."""
        if hasattr(self, "held"):
            self.attention_reads(CAPACITY - self.batch, CAPACITY, None)


Slots.TestCase.settings = settings(max_examples=60, stateful_step_count=25)
TestSlots = Slots.TestCase
