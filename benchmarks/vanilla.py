"""This engine without drafts against transformers' `generate`, with its dynamic and static cache.

python -m benchmarks.vanilla --data spec_bench.jsonl --output vanilla.json
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks import common
from conflayers_cli.bench.hf_baselines import TransformersArm
from conflayers_cli.bench.runner import Spread, measure
from conflayers_cli.bench.systems import Arm, EngineArm
from conflayers_cli.sampling_params import SamplingParams

PEERS = ("transformers", "transformers-static")


def compare(subject: common.Subject, options: Any) -> dict[str, Any]:
    """One model's figures by category and in all; printed as a table."""
    decoder, ends, greedy = subject.decoder, subject.loaded.end_tokens, SamplingParams()
    prompts = common.mixed_up(common.prompts_of(options))
    arms: list[Arm] = [EngineArm("vanilla", decoder, None, greedy, ends)]
    arms += [TransformersArm.peer(name, decoder, greedy, ends) for name in PEERS]
    result = measure(
        arms,
        common.cases_of(subject, prompts, options.max_new_tokens),
        decoder,
        greedy,
        runs=options.runs,
        warmup=0 if options.quick else 1,
        on_progress=lambda message, done: common.say(f"{done:4.0%} {message}"),
    )
    rows, shown = {}, []
    for part in (*result.categories, None):
        speeds = {arm.name: common.figures(result, arm.name, part) for arm in arms}
        over = {name: Spread.of(common.ratios(result, "vanilla", name, part)) for name in PEERS}
        rows[part or "all"] = {
            "arms": speeds,
            "vanilla_over": {name: asdict(found) for name, found in over.items()},
        }
        medians = [figures["tokens_per_second"]["median"] for figures in speeds.values()]
        shown.append(
            [
                part or "all",
                *("–" if median is None else f"{median:.1f}" for median in medians),
                *map(common.spread, over.values()),
            ]
        )
    print(f"{subject.name}, {subject.dtype}: tokens/s, and this engine over generate")
    common.print_table(["category", *speeds, *(f"over {name}" for name in PEERS)], shown)
    same = {
        name: {"matching": found.matching, "total": found.total}
        for name, found in (result.identical or {}).items()
    }
    return {"dtype": subject.dtype, "categories": rows, "identical": same}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    options = common.parsed(common.parser_for(__doc__), arguments)
    results: dict[str, Any] = {}
    for name in options.models:
        subject = common.open_subject(name, options)
        results[name] = compare(subject, options)
        common.save(options, "vanilla", subject, {"models": results})


if __name__ == "__main__":
    main()
