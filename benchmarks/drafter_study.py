"""Which drafters that need no model would pay, judged on recorded texts, no model run.

`drafter_record` has recorded greedy texts, the model's best tokens at every position, and what a
draft pass in four bits would have chosen. Here drafters are replayed on them:

  alone   tokens per step and estimated speed with fixed budgets of drafted tokens, chains and trees
  joined  the engine's own `MixedProposer`, with drafts in four bits and its estimates as they are;
          only where its n-grams come from differs. What counts is the gain over today's

Seconds are counted in plain steps, by the costs of passes measured on one machine. A store of
earlier texts is *cold* (empty at first, grows with the texts, categories by turns), *warm* (it
holds all other texts of the category) or *again* (it holds the very text as well, as when a request
comes twice).

    python -m benchmarks.drafter_study recorded.npz --output drafter-study.json
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import common
from benchmarks.offline_drafters import Occurrences, Recycling, SuffixDrafter, accepted
from conflayers_cli.engine.cost_model import CostTable, PassCosts
from conflayers_cli.engine.sampler import Sampler
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.mixed import MixedProposer
from conflayers_cli.spec_decode.proposer import Context
from conflayers_cli.utils.environment import describe_environment
from conflayers_cli.utils.files import write_json

VERIFY = {1: 1.0, 2: 1.05, 4: 1.06, 8: 1.27, 16: 1.69}
"""A full pass by width, in plain steps: smollm2, bfloat16, AMD EPYC with avx512_bf16."""
DRAFT = 0.36
"""A pass in four bits."""
BUDGETS = (4, 8, 16)
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


def by_category(texts: Sequence[Text], counts: Sequence[Counts]) -> dict[str, dict[str, float]]:
    """Tokens per step and speed over plain decoding, by category and in all."""
    groups: dict[str, list[Counts]] = defaultdict(list)
    for text, own in zip(texts, counts, strict=True):
        groups[text.category].append(own)
        groups["all"].append(own)
    return {
        name: {
            "tokens_per_step": sum(c.tokens for c in own) / sum(c.steps for c in own),
            "speed": sum(c.tokens for c in own) / sum(c.seconds for c in own),
            "median": statistics.median(c.tokens / c.seconds for c in own),
        }
        for name, own in groups.items()
    }


def study_alone(texts: Sequence[Text], table: CostTable) -> dict[str, Any]:
    """Every drafter that needs no model, with each budget."""
    found: dict[str, Any] = {}
    for name, (by_counts, state, tree, recycle, limit) in ALONE.items():
        for budget in BUDGETS:
            recycling = Recycling() if recycle else None
            counts = []
            for text, store in zip(texts, stores(texts, state, limit, SIZES), strict=True):
                drafter = None
                if name != "recycling" and name != "recycling, tree":
                    drafter = drafter_maker(by_counts, store, limit)
                alone = Alone(drafter, recycling, tree)
                counts.append(alone.replay(text, budget, table))
            found[f"{name}, {budget}"] = by_category(texts, counts)
    return found


def drafter_maker(
    by_counts: bool, store: Occurrences | None, limit: int, sizes: tuple[int, ...] = SIZES
) -> Callable[[], SuffixDrafter]:
    """Makes a drafter with a new index of its text's own."""
    return lambda: SuffixDrafter(Occurrences(sizes, limit), store, by_counts)


ALONE: Mapping[str, tuple[bool, str, bool, bool, int]] = {
    # by counts, store, tree, recycled, occurrences
    "longest": (False, "text", False, False, 512),
    "counts": (True, "text", False, False, 512),
    "counts, tree": (True, "text", True, False, 512),
    "longest, cold": (False, "cold", False, False, 512),
    "counts, cold": (True, "cold", False, False, 512),
    "counts, cold, tree": (True, "cold", True, False, 512),
    "longest, warm": (False, "warm", False, False, 512),
    "counts, warm": (True, "warm", False, False, 512),
    "counts, warm, tree": (True, "warm", True, False, 512),
    "longest, again": (False, "again", False, False, 512),
    "recycling": (False, "text", False, True, 512),
    "recycling, tree": (False, "text", True, True, 512),
    "longest and recycling": (False, "text", False, True, 512),
    "longest and recycling, tree": (False, "text", True, True, 512),
    "longest, cold, and recycling, tree": (False, "cold", True, True, 512),
}

JOINED: Mapping[str, tuple[bool, str, int, tuple[int, ...]]] = {
    # by counts, store, occurrences, sizes of contexts
    "longest": (False, "text", 512, SIZES),
    "counts": (True, "text", 512, SIZES),
    "longest, cold": (False, "cold", 512, SIZES),
    "counts, cold": (True, "cold", 512, SIZES),
    "longest, warm": (False, "warm", 512, SIZES),
    "counts, warm": (True, "warm", 512, SIZES),
    "longest, again": (False, "again", 512, SIZES),
    "8 occurrences": (False, "text", 8, (8, 4, 2, 1)),
    "8 occurrences, cold": (False, "cold", 8, (8, 4, 2, 1)),
    "8 occurrences, warm": (False, "warm", 8, (8, 4, 2, 1)),
}


def study_joined(texts: Sequence[Text], table: CostTable) -> dict[str, Any]:
    """The mixed proposer with n-grams from anywhere, and what it comes to without some of it."""
    found: dict[str, Any] = {}
    plain = {
        "today": Joined(lookup_rule, table),
        "four bits alone": Joined(lookup_rule, table, ngram=False),
        "n-grams alone": Joined(lookup_rule, table, plan=None),
    }
    for name, joined in plain.items():
        found[name] = by_category(texts, [joined.replay(text) for text in texts])
    for name, (by_counts, state, limit, sizes) in JOINED.items():
        for kind, plan in (("", INT4), (", without four bits", None)):
            joined = Joined(lookup_rule, table, plan)
            counts = []
            for text, store in zip(texts, stores(texts, state, limit, sizes), strict=True):
                joined.index = drafter_maker(by_counts, store, limit, sizes)
                counts.append(joined.replay(text))
            found[name + kind] = by_category(texts, counts)
    return found


def best_possible(
    text: Text, table: CostTable, index: SuffixDrafter, plan: bool = True, most: int = 25
) -> float:
    """Speed of a text if it were known beforehand which drafted tokens are right.

    A draft is right tokens of a match, then right tokens in four bits, as many as is best.
    """
    costs, size = table.at(1, 64), len(text.output)
    right = [draft[0] == token for draft, token in zip(text.draft, text.output, strict=True)]
    matched = []
    known = [*text.prompt]
    for at, token in enumerate(text.output):
        if at:
            index.update(known)
            match = index.lookup(known, (), min(most, size - at))
            agreed = 0
            while agreed < len(match.tokens) and match.tokens[agreed] == text.output[at + agreed]:
                agreed += 1
            matched.append(agreed)
        else:
            matched.append(0)
        known.append(token)
    least = [0.0] * (size + 1)
    for at in range(size - 1, 0, -1):
        best = float("inf")
        for first in {0, matched[at]}:
            second = 0
            while True:
                width = first + second
                end = min(at + width + 1, size)
                drafts = DRAFT * (second + (costs.verify_cost(1 + first) - 1 if second else 0.0))
                best = min(best, drafts + costs.verify_cost(1 + width) + least[end])
                if not plan or width >= most or at + width >= size or not right[at + width]:
                    break
                second += 1
        least[at] = best
    return (size - 1) / least[1]


def leaves(texts: Sequence[Text], table: CostTable) -> dict[str, float]:
    """Where a token of today's proposer was wrong: which alternatives would have been right."""
    joined, recycling = Joined(lookup_rule, table), Recycling()
    found: dict[str, int] = defaultdict(int)
    for text in texts:
        trace: list[tuple[int, int, tuple[str, ...]]] = []
        joined.replay(text, trace)
        at = 1
        for drafted, kept, sources in trace:
            found["steps"] += 1
            found["drafted"] += drafted
            if kept < drafted:
                failed = at + kept
                token, source = text.output[failed], sources[kept]
                found[f"rejected {source}"] += 1
                found["four bits' second is right"] += token in text.draft[failed][1:2]
                found["four bits' second to fourth"] += token in text.draft[failed][1:4]
                before = text.output[failed - 1]
                found["recycled first four"] += token in list(recycling.table.get(before, ()))[:4]
            for each in range(at, min(at + kept + 1, len(text.output))):
                recycling.note(text.output[each - 1], text.top[each])
            at += kept + 1
    return dict(found)


def print_speeds(title: str, found: Mapping[str, Any], measure: str) -> None:
    """A table by category."""
    print(title)
    names = list(next(iter(found.values())))
    names.remove("all")
    common.print_table(
        ["", *(name[:10] for name in names), "all"],
        [
            [row, *(f"{own[name][measure]:.2f}" for name in [*names, "all"])]
            for row, own in found.items()
        ],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Replay, print, write."""
    parser = common.plain_parser(__doc__)
    parser.add_argument("recording", type=Path, help="as `drafter_record` has written it")
    parser.add_argument("--parts", nargs="+", default=["joined", "bounds", "alone"])
    common.add_output(parser)
    options: argparse.Namespace = parser.parse_args(arguments)
    texts = read_texts(options.recording)
    if options.quick:
        texts = texts[:6]
    table = costs_of(VERIFY, DRAFT)
    results: dict[str, Any] = {"texts": len(texts), "tokens": sum(len(t.output) for t in texts)}
    right = [d[0] == o for t in texts for d, o in zip(t.draft, t.output, strict=True)]
    results["four_bits_right"] = sum(right) / len(right)
    if "joined" in options.parts:
        results["joined"] = study_joined(texts, table)
        print_speeds("joined: speed over plain decoding", results["joined"], "speed")
        print_speeds("joined: tokens per step", results["joined"], "tokens_per_step")
    if "bounds" in options.parts:
        results["best_possible"] = bounds(texts, table)
        results["leaves"] = leaves(texts, table)
        print(results["best_possible"], results["leaves"])
    if "alone" in options.parts:
        results["alone"] = study_alone(texts, table)
        print_speeds("alone: tokens per step", results["alone"], "tokens_per_step")
        print_speeds("alone: estimated speed", results["alone"], "speed")
    if options.output:
        head = {"benchmark": "drafter-study", "verify": VERIFY, "draft": DRAFT}
        head["environment"] = describe_environment(torch.device("cpu"))
        write_json(options.output, {**head, **results})


def bounds(texts: Sequence[Text], table: CostTable) -> dict[str, float]:
    """Mean speeds if it were known which drafted tokens are right."""
    found = {}
    for name, state in (("today", ""), ("longest, cold", "cold"), ("longest, warm", "warm")):
        speeds = []
        for text, store in zip(texts, stores(texts, state or "text", 512, SIZES), strict=True):
            index: SuffixDrafter = drafter_maker(False, store, 512)() if state else lookup_rule()
            speeds.append(best_possible(text, table, index))
        sizes = [len(text.output) - 1 for text in texts]
        found[name] = sum(sizes) / sum(n / s for n, s in zip(sizes, speeds, strict=True))
    return found


if __name__ == "__main__":
    main()
