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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.drafter_replay import (
    DRAFT,
    INT4,
    SIZES,
    VERIFY,
    Alone,
    Counts,
    Joined,
    Text,
    costs_of,
    drafter_maker,
    lookup_rule,
    read_texts,
    stores,
)
from benchmarks.offline_drafters import Recycling, SuffixDrafter
from conflayers_cli.engine.cost_model import CostTable
from conflayers_cli.utils.environment import describe_environment
from conflayers_cli.utils.files import write_json

BUDGETS = (4, 8, 16)


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
