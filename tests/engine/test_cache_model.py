"""The cache against a naive model of it: lists of what each row's attention must see.

Two machines are driven through random operations. The first works on the cache alone: what is
written, moved, copied, put back and given away, and what an attention call then makes of it. The
second has real passes of a tiny model write texts, drafts and leaves to rows that come and go; of
every pass it is looked at what each layer's attention was given, keys, values and mask, and the
logits are compared with those of transformers for the same text, run anew and without a cache.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from transformers import DynamicCache

from conflayers_cli.engine import attention
from conflayers_cli.engine.cache import EXTENT_MULTIPLE, KVCache, extent_for
from conflayers_cli.engine.decoder import FULL, Decoder
from conflayers_cli.engine.pass_lock import PassLock
from conflayers_cli.engine.plan import SkipPlan
from conflayers_cli.engine.pool import CachePool
from tests import tiny
from tests.engine.tape import TapeRecorder

HEADS, DIM, LAYERS = 2, 4, 2
# On both sides of the end of the first extent.
SLOTS = st.integers(0, 6) | st.integers(EXTENT_MULTIPLE - 3, EXTENT_MULTIPLE + 3)
CAPACITY = EXTENT_MULTIPLE + 8
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
        sizes = [((HEADS, DIM), (HEADS, DIM))] * LAYERS
        pool = CachePool(LAYERS, sizes, torch.empty(0), lambda number: None, PassLock())
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
        view.announce(torch.tensor(at), extent_for(max(map(max, at)) + 1))
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
        self.cache.copy_row(source, goal, length)
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
        extent = extent_for(max(seen) + 1)
        view.announce(torch.tensor([[slot]]), extent)
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


# Real passes


@functools.cache
def decoder(kind: str) -> Decoder:
    """Keys are read in extents of 64, so that texts of tests grow beyond the first one."""
    family, _, recorded = kind.partition(" ")
    model = tiny.build(tiny.CONFIGS[family]())
    return Decoder(model, exact=False, recorder=TapeRecorder() if recorded else None)


@dataclass(frozen=True)
class Reference:
    """What transformers makes of a text: keys, values ``[H, T, D]`` by layer, logits ``[V]``."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    logits: torch.Tensor


@functools.lru_cache(maxsize=4096)
def reference(kind: str, text: tuple[int, ...]) -> Reference:
    cache: Any = DynamicCache()
    with decoder(kind).plain() as model, torch.inference_mode():
        logits = model(torch.tensor([text]), past_key_values=cache, use_cache=True).logits[0, -1]
    layers = cache.layers
    return Reference([each.keys[0] for each in layers], [each.values[0] for each in layers], logits)


Seen = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""What an attention call was given: keys and values ``[B, H, S, D]``, which of them each row of it
sees ``[B, 1, R, S]``."""


@contextmanager
def attention_watched() -> Iterator[list[Seen]]:
    """Within: every call of attention is noted, with what it was given at that moment."""
    calls: list[Seen] = []

    def noting(function: Any) -> Any:
        def call(query: Any, key: Any, value: Any, mask: torch.Tensor, *more: Any) -> Any:
            seen = mask if mask.dtype == torch.bool else mask == 0
            calls.append((key.clone(), value.clone(), seen))
            return function(query, key, value, mask, *more)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("folded_attention", "_explicit"):
            patch.setattr(attention, name, noting(getattr(attention, name)))
        yield calls


Paths = Sequence[Sequence[tuple[int, ...]]]
"""For each row of a pass and each of its tokens the text that this one ends."""


class Texts(RuleBasedStateMachine):
    """Rows of a cache at work, each with a text whose last token is not in the cache yet."""

    kind = "llama"
    most_rows = 3
    longest = 110

    @initialize()
    def begin(self) -> None:
        self.decoder = decoder(self.kind)
        self.cache: KVCache = self.decoder.new_cache(200, batch=self.most_rows)
        self.texts: list[list[int]] = []

    def run(
        self,
        cache: KVCache,
        tokens: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        paths: Paths,
        slots: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """A full pass, of which everything is looked at."""
        given = None if slots is None else torch.tensor(slots)
        with attention_watched() as calls:
            logits = self.decoder.forward(
                torch.tensor(tokens), torch.tensor(positions), cache, slots=given
            )
        for row, own in enumerate(paths):
            for column, path in enumerate(own):
                expected = reference(self.kind, path)
                torch.testing.assert_close(
                    logits[row, column], expected.logits, rtol=1e-4, atol=1e-4
                )
                for layer, call in enumerate(calls):
                    self.check_read(layer, call, row, column, path)
        # Passes that are replayed run no Python: of them there are the logits alone.
        assert len(calls) == self.decoder.depth or (not calls and self.decoder.runner.graphs)

    def check_read(
        self, layer: int, call: Seen, row: int, column: int, path: tuple[int, ...]
    ) -> None:
        """A token sees its path, oldest first: all of it, or what the layer's window holds."""
        config, expected = self.decoder.config, reference(self.kind, path)
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * self.decoder.depth
        first = 0 if kinds[layer] == "full_attention" else max(0, len(path) - tiny.WINDOW)
        slots = call[2][row, 0, column].nonzero()[:, 0]
        for got, want in ((call[0], expected.keys), (call[1], expected.values)):
            read, wanted = got[row, :, slots], want[layer][:, first:]
            torch.testing.assert_close(read, wanted, rtol=1e-4, atol=1e-4)

    def some(self, count: int, seed: int) -> list[int]:
        return tiny.prompt(count, seed) if count else []

    @precondition(lambda self: len(self.texts) < self.most_rows)
    @rule(length=st.integers(1, 12) | st.integers(56, 70), seed=st.integers(0, 99))
    def a_text_begins(self, length: int, seed: int) -> None:
        """In the first free row, whatever an earlier text left there."""
        place, prompt = len(self.texts), self.some(length, seed)
        view = self.cache.view(place, place + 1)
        logits = self.decoder.prefill(torch.tensor([prompt]), view)[0, -1]
        expected = reference(self.kind, tuple(prompt)).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        self.texts.append([*prompt, seed % tiny.VOCABULARY])

    @precondition(lambda self: self.texts)
    @rule(
        layers=st.sets(st.integers(1, 3), min_size=1),
        count=st.integers(1, 4),
        seed=st.integers(0, 9),
    )
    def all_rows_draft(self, layers: set[int], count: int, seed: int) -> None:
        """With layers left out, behind the texts; nothing of it is verified for now."""
        plan = SkipPlan.of(layers, layers - {2})
        cache = self.cache.view(0, len(self.texts))
        chains = [self.some(count, seed + i) for i in range(len(self.texts))]
        for at in range(count + 1):
            tokens = [[(text[-1:] + own)[at]] for text, own in zip(self.texts, chains, strict=True)]
            positions = [[len(text) - 1 + at] for text in self.texts]
            logits = self.decoder.forward(
                torch.tensor(tokens), torch.tensor(positions), cache, plan
            )
        for row, (text, own) in enumerate(zip(self.texts, chains, strict=True)):
            expected = self.drafted_anew(text, own, plan)
            torch.testing.assert_close(logits[row, -1], expected, rtol=1e-4, atol=1e-4)

    def drafted_anew(self, text: list[int], chain: list[int], plan: SkipPlan) -> torch.Tensor:
        """Logits behind a chain by the skipped model, in one pass over a fresh cache."""
        fresh, begin = self.decoder.new_cache(200), len(text) - 1
        if begin:
            self.decoder.prefill(torch.tensor([text[:-1]]), fresh, plan=FULL)
        tail = torch.tensor([[text[-1], *chain]])
        return self.decoder.prefill(tail, fresh, start=begin, plan=plan)[0, -1]

    @precondition(lambda self: self.texts)
    @rule(
        drafts=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=3),
        seed=st.integers(0, 99),
    )
    def all_rows_verify(self, drafts: list[tuple[int, int]], seed: int) -> None:
        """Chains of other lengths; of each some tokens stand. Shorter rows repeat their last."""
        rows = len(self.texts)
        chains = [self.some(length, seed + i) for i, (length, _) in enumerate(drafts[:rows])]
        width = 1 + max(map(len, chains))
        tokens, positions, paths = [], [], []
        for text, chain in zip(self.texts, chains, strict=True):
            columns = [min(column, len(chain)) for column in range(width)]
            own = [text[-1], *chain]
            tokens.append([own[column] for column in columns])
            positions.append([len(text) - 1 + column for column in columns])
            paths.append([tuple(text + chain[:column]) for column in columns])
        self.run(self.cache.view(0, rows), tokens, positions, paths)
        for i, (text, chain) in enumerate(zip(self.texts, chains, strict=True)):
            stands = min(drafts[i][1], len(chain))
            text += [*chain[:stands], (seed + 7 * i) % tiny.VOCABULARY]

    @precondition(lambda self: self.texts)
    @rule(
        row=st.integers(0, 2),
        leaves=st.lists(st.integers(0, 3), min_size=1, max_size=4),
        kept=st.integers(0, 20),
        seed=st.integers(0, 99),
    )
    def a_row_verifies_a_tree(self, row: int, leaves: list[int], kept: int, seed: int) -> None:
        """A chain with leaves beside it; the chain's start stands, or a leaf behind it."""
        row %= len(self.texts)
        text, chain = self.texts[row], self.some(len(leaves), seed)
        filled = len(text) - 1
        beside = [place for place, count in enumerate(leaves) for _ in range(count)]
        nodes = [*chain, *self.some(len(beside), seed + 1)]
        paths = [tuple(text + chain[:i]) for i in range(len(chain) + 1)]
        paths += [
            (*text, *chain[:place], leaf)
            for place, leaf in zip(beside, nodes[len(chain) :], strict=True)
        ]
        positions = [len(path) - 1 for path in paths]
        slots = [filled + i for i in range(len(paths))]
        view = self.cache.view(row, row + 1)
        self.run(view, [[text[-1], *nodes]], [positions], [paths], [slots])
        stands = kept % len(paths)
        if stands > len(chain):
            view.move(slots[stands], positions[stands])
        text[:] = [*paths[stands], seed % tiny.VOCABULARY]

    @precondition(lambda self: self.texts)
    @rule(row=st.integers(0, 2))
    def a_text_ends(self, row: int) -> None:
        """The last row takes its place."""
        row %= len(self.texts)
        last = self.texts.pop()
        if row < len(self.texts):
            self.cache.copy_row(len(self.texts), row, len(last) - 1)
            self.texts[row] = last

    @precondition(lambda self: any(len(text) > self.longest for text in self.texts))
    @rule()
    def long_texts_end(self) -> None:
        for row in reversed(range(len(self.texts))):
            if len(self.texts[row]) > self.longest:
                self.a_text_ends(row)

    def teardown(self) -> None:
        if getattr(self, "texts", None):
            self.all_rows_verify([(2, 1)] * 3, 5)


def machine(kind: str, examples: int) -> Any:
    case = type("Texts", (Texts,), {"kind": kind}).TestCase  # type: ignore[attr-defined]
    case.settings = settings(max_examples=examples, stateful_step_count=14)
    return case


TestFusedWithWindows = machine("qwen2-mixed", 20)
TestModulesWithWindows = machine("gemma2", 12)
TestRecorded = machine("qwen2-mixed recorded", 8)
