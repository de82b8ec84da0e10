"""Passes of a tiny model against a naive model of the cache: the text that each token is to see.

A machine has rows come and go, draft with layers left out, verify chains and trees of which some
tokens stand, and moves what is accepted. Of every full pass it looks at what each layer's attention
was given, keys, values and mask, and compares the logits with those of transformers for the same
text, run anew. What the cache itself does with slots: `test_cache_model.py`.
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

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.kernels import attention
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.skip_plan import SkipPlan
from tests import tiny
from tests.kernels.tape import TapeRecorder

pytestmark = pytest.mark.usefixtures("without_native")


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
            self.decoder.prefill(torch.tensor([text[:-1]]), fresh)
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
            self.cache.copy_sequence(len(self.texts), row, len(last) - 1)
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
