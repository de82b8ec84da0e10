"""Drafts from earlier texts, on the model: plain, mixed as it is, and with a store by turns.

Arms, by turns at each prompt: *plain*; *mixed* without a store; *cold*: the store holds the texts
before this one; *warm*: the other texts of the category; *again*: the very text, as well.

    python -m benchmarks.draft_store --data spec_bench.jsonl --per-category 3 --output store.json
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import common
from benchmarks.drafter_record import REPETITIVE, all_categories
from conflayers_cli.bench.systems import BenchPrompt, EngineSystem, Run
from conflayers_cli.profile.build_proposer import build_proposer
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.spec_decode.draft_store import DraftStore
from conflayers_cli.spec_decode.options import DraftOptions

ARMS = ("plain", "mixed", "cold", "warm", "again")


class Arms:
    """A proposer for each arm, which goes on learning from prompt to prompt, and its store."""

    def __init__(self, subject: common.Subject) -> None:
        self._ends, self._decoder = subject.loaded.end_tokens, subject.decoder
        self.stores = {name: DraftStore(subject.decoder.vocabulary, 2**17) for name in ARMS[2:]}
        self._proposers = {
            name: build_proposer(
                subject.loaded,
                subject.decoder,
                subject.profile,
                None,
                False,
                DraftOptions(),
            )
            for name in ARMS[1:]
        }

    def run(self, name: str, prompt: BenchPrompt) -> Run:
        proposer = self._proposers.get(name)
        system = EngineSystem(
            name,
            self._decoder,
            proposer,
            SamplingParams(),
            self._ends,
            store=self.stores.get(name),
        )
        return system.run([prompt])[0]


def measure(subject: common.Subject, prompts: Sequence[BenchPrompt]) -> list[dict[str, Any]]:
    """Tokens per second and per step of every arm at every prompt."""
    arms, rows = Arms(subject), []
    texts = {prompt.id: [*prompt.tokens, *arms.run("plain", prompt).tokens] for prompt in prompts}
    for number, prompt in enumerate(prompts):
        common.show_progress(prompt.id, number / len(prompts))
        for name in ("warm", "again"):
            arms.stores[name].clear()
            for other in prompts:
                if other.category == prompt.category and (name == "again" or other is not prompt):
                    arms.stores[name].add(texts[other.id])
        order = [*ARMS[number % len(ARMS) :], *ARMS[: number % len(ARMS)]]
        found = {name: arms.run(name, prompt) for name in order}
        same = all(run.tokens == found["plain"].tokens for run in found.values())
        if len(found["plain"].tokens) <= common.MIN_TOKENS:
            continue
        rows.append(
            {
                "id": prompt.id,
                "category": prompt.category,
                "same_text": same,
                **{name: _figures(run) for name, run in found.items()},
            }
        )
    return rows


def _figures(run: Run) -> dict[str, float | None]:
    stats = run.stats
    return {
        "tokens_per_second": stats.tokens_per_second,
        "tokens_per_step": stats.decode_tokens / stats.steps,
    }


def report(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians of ratios by category; printed."""
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["category"]].append(row)
        groups["all"].append(row)
    found: dict[str, dict[str, Any]] = {}
    for name, own in groups.items():

        def over(arm: str, base: str, own: Sequence[Mapping[str, Any]] = own) -> float:
            return statistics.median(
                row[arm]["tokens_per_second"] / row[base]["tokens_per_second"] for row in own
            )

        found[name] = {
            "texts": len(own),
            "over_plain": {arm: over(arm, "plain") for arm in ARMS[1:]},
            "over_mixed": {arm: over(arm, "mixed") for arm in ARMS[2:]},
            "tokens_per_step": {
                arm: statistics.mean(row[arm]["tokens_per_step"] for row in own) for arm in ARMS
            },
        }
    common.print_table(
        ["category", "texts", "mixed / plain", *(f"{arm} / mixed" for arm in ARMS[2:])],
        [
            [
                name,
                own["texts"],
                common.times(own["over_plain"]["mixed"]),
                *(common.times(own["over_mixed"][arm]) for arm in ARMS[2:]),
            ]
            for name, own in found.items()
        ],
    )
    print(f"all arms gave the same text: {sum(row['same_text'] for row in rows)} of {len(rows)}")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = common.make_parser(
        __doc__, models=["smollm2"], dtype="bfloat16", per_category=2, max_new_tokens=128
    )
    options = common.parse_options(parser, arguments)
    results: dict[str, Any] = {}
    for name in options.models:
        subject = common.open_subject(name, options)
        chosen = common.choose_prompts(options.data, all_categories(options), options.per_category)
        if not options.quick:
            chosen |= common.choose_prompts(REPETITIVE, None, 2 * options.per_category)
        prompts = common.interleave(chosen)
        rows = measure(subject, common.to_bench_prompts(subject, prompts, options.max_new_tokens))
        results[name] = {"categories": report(rows), "texts": rows}
        common.save(options, "draft-store", subject, {"models": results})


if __name__ == "__main__":
    main()
