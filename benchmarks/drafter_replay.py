"""Recorded texts, and drafters replayed on them, for `drafter_study`; no model is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.offline_drafters import Occurrences, Recycling, SuffixDrafter, accepted
from conflayers_cli.engine.cost_model import CostTable, PassCosts
from conflayers_cli.engine.sampler import Sampler
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.mixed import MixedProposer
from conflayers_cli.spec_decode.proposer import Context

VERIFY = {1: 1.0, 2: 1.05, 4: 1.06, 8: 1.27, 16: 1.69}
"""A full pass by width, in plain steps: smollm2, bfloat16, AMD EPYC with avx512_bf16."""
DRAFT = 0.36
"""A pass in four bits."""
SIZES = (16, 8, 4, 2, 1)
INT4 = SkipPlan(weights="int4")
VOCABULARY = 49152


@dataclass(frozen=True)
class Text:
    """A recorded text; arrays have a row for each output token, of the pass that chose it."""

    id: str
    category: str
    prompt: list[int]
    output: list[int]
    top: list[list[int]]
    draft: list[list[int]]
    confidence: list[float]

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt, *self.output]


def read_texts(file: Path) -> list[Text]:
    """The recorded texts, in the order in which they were recorded."""
    with np.load(file) as found:
        keys = [key.removesuffix("/output") for key in found if key.endswith("/output")]
        names = ("prompt", "output", "top", "draft", "confidence")
        return [
            Text(
                key.split("/", 1)[1],
                key.split("/", 1)[0],
                *(found[f"{key}/{name}"].tolist() for name in names),
            )
            for key in keys
        ]


def costs_of(verify: Mapping[int, float], draft: float) -> CostTable:
    """The costs as the engine has them."""
    one = PassCosts(dict(verify), floor=draft, attention=0.0, mlp=0.0, context=64)
    return CostTable({1: one}, depth=3)


# Alone: fixed budgets.

Replay = Callable[[Text, list[int], int], int]
"""(text, tokens known, budget) → tokens accepted."""


@dataclass
class Counts:
    """Tokens, steps and seconds (in plain steps) of one text."""

    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0


@dataclass
class Alone:
    """One drafter that needs no model, and what it has seen.

    Attributes:
        drafter: a new one for each text; None: tokens are only recycled.
        recycling: what it knows of the model's best tokens; None: nothing.
        tree: several continuations.
        enough: tokens that must agree for a match to go before recycled tokens.
    """

    drafter: Callable[[], SuffixDrafter] | None
    recycling: Recycling | None = None
    tree: bool = False
    enough: int = 2

    def replay(self, text: Text, budget: int, table: CostTable) -> Counts:
        counts, costs = Counts(), table.at(1, 64)
        drafter = self.drafter() if self.drafter else None
        known, end = [*text.prompt, text.output[0]], len(text.prompt) + len(text.output)
        self._note(text, 0, 1)
        while len(known) < end:
            if drafter:
                drafter.update(known)
            coming = text.output[len(known) - len(text.prompt) :]
            width, kept = self._step(drafter, known, min(budget, len(coming) - 1), coming)
            before = len(known) - len(text.prompt)
            known += coming[: kept + 1]
            self._note(text, before, before + kept + 1)
            counts.tokens += min(kept + 1, len(coming))
            counts.steps += 1
            counts.seconds += costs.verify_cost(1 + width)
        return counts

    def _step(
        self, drafter: SuffixDrafter | None, known: list[int], budget: int, coming: Sequence[int]
    ) -> tuple[int, int]:
        """(tokens verified, tokens accepted)"""
        if budget < 1:
            return 0, 0
        match = drafter.lookup(known, (), budget) if drafter else None
        if not self.tree:
            chain = list(match.tokens) if match else []
            if self.recycling and not (match and match.length >= self.enough):
                chain = self.recycling.chain(known[-1], budget)
            return len(chain), accepted([tuple(chain[: i + 1]) for i in range(len(chain))], coming)
        nodes: dict[tuple[int, ...], None] = {}
        if drafter and match and (match.length >= self.enough or not self.recycling):
            nodes = drafter.tree(known, budget)
        if self.recycling:
            nodes = self.recycling.tree(known[-1], budget, nodes)
        return len(nodes), accepted(nodes, coming)

    def _note(self, text: Text, begin: int, end: int) -> None:
        if self.recycling is None:
            return
        before = [text.prompt[-1], *text.output]
        for at in range(begin, min(end, len(text.output))):
            self.recycling.note(before[at], text.top[at])


# Joined: the engine's own proposer with drafts in four bits.


@dataclass
class Recorded:
    """Stands for the decoder: what drafts in four bits choose, as it was recorded.

    Behind a wrong token, what it chooses does not matter; it is as sure there as one token on.
    """

    text: Text
    widths: list[int] = field(default_factory=list)
    depth: int = 3

    def decode_ahead(self, *_: Any) -> None:
        """Passes are run one by one here."""

    def greedy_with_confidence(
        self, tokens: torch.Tensor, positions: torch.Tensor, *_: Any
    ) -> torch.Tensor:
        self.widths.append(tokens.shape[1])
        begin, last = len(self.text.prompt) - 1, len(self.text.output) - 1
        rows = [min(place - begin, last) for place in positions[0].tolist()]
        chosen = [float(self.text.draft[row][0]) for row in rows]
        sure = [self.text.confidence[row] for row in rows]
        return torch.tensor([[chosen], [sure]], dtype=torch.float64)


def lookup_rule() -> SuffixDrafter:
    """What n-grams drafted by so far: 8 occurrences of 4, 2 or 1 tokens."""
    return SuffixDrafter(Occurrences((4, 2, 1), 8))


@dataclass
class Joined:
    """The mixed proposer, its n-grams from anywhere.

    Attributes:
        index: a new one for each text.
        plan: None: drafts in four bits are left out.
    """

    index: Callable[[], SuffixDrafter]
    table: CostTable
    plan: SkipPlan | None = INT4
    ngram: bool = True
    proposer: MixedProposer = field(init=False)

    def __post_init__(self) -> None:
        self.proposer = MixedProposer(
            None,  # type: ignore[arg-type]
            self.plan,
            self.table,
            ngram=self.ngram,
            rows_apart=False,
        )

    def replay(
        self, text: Text, trace: list[tuple[int, int, tuple[str, ...]]] | None = None
    ) -> Counts:
        counts, costs = Counts(), self.table.at(1, 64)
        sampler = Sampler(SamplingParams(), VOCABULARY, torch.device("cpu"))
        known, end = [*text.prompt, text.output[0]], len(text.prompt) + len(text.output)
        model = Recorded(text)
        self.proposer._decoder = model  # type: ignore[assignment]
        (history,) = self.proposer._histories.get([(known, None)])
        matcher = self.index()
        matcher.update(known)
        history.matcher = matcher  # type: ignore[assignment]
        while len(known) < end:
            coming = text.output[len(known) - len(text.prompt) :]
            model.widths.clear()
            limit = len(coming) - 1
            tokens: tuple[int, ...] = ()
            if limit > 0:
                draft = self.proposer.propose(Context(known, None, sampler), limit)  # type: ignore[arg-type]
                tokens = draft.tokens
            kept = 0
            while kept < len(tokens) and tokens[kept] == coming[kept]:
                kept += 1
            if trace is not None:
                trace.append((len(tokens), kept, draft.sources if limit > 0 else ()))
            known += coming[: kept + 1]
            counts.tokens += min(kept + 1, len(coming))
            counts.steps += 1
            counts.seconds += costs.verify_cost(1 + len(tokens))
            counts.seconds += sum(DRAFT * costs.verify_cost(width) for width in model.widths)
        return counts


def stores(
    texts: Sequence[Text], state: str, limit: int, sizes: tuple[int, ...]
) -> Iterator[Occurrences | None]:
    """The store that each text finds, in order."""
    if state == "text":
        yield from [None] * len(texts)
    elif state == "cold":
        store = Occurrences(sizes, limit)
        for text in texts:
            yield store
            store.add(text.tokens)
    else:
        for text in texts:
            store = Occurrences(sizes, limit)
            for other in texts:
                if other.category == text.category and (other is not text or state == "again"):
                    store.add(other.tokens)
            yield store


def drafter_maker(
    by_counts: bool, store: Occurrences | None, limit: int, sizes: tuple[int, ...] = SIZES
) -> Callable[[], SuffixDrafter]:
    """Makes a drafter with a new index of its text's own."""
    return lambda: SuffixDrafter(Occurrences(sizes, limit), store, by_counts)
