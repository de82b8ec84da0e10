"""Several prompts at once: tokens per second of vanilla and drafted decoding by batch size.

The same prompts, of all categories in turns, are decoded at every size; one that ends makes room
for the next. The calibrated profile drafts, with n-grams; n-grams alone for a model without one.

    python -m benchmarks.batch --data spec_bench.jsonl --output batch.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from benchmarks import common
from conflayers_cli.bench.systems import BenchPrompt


def measure(
    subject: common.Subject, rows: int, prompts: Sequence[BenchPrompt], options: argparse.Namespace
) -> dict[str, Any]:
    """The figures at one batch size."""
    proposer = common.make_proposer(subject, subject.profile, rows=rows)
    result = common.compare(
        subject,
        proposer,
        prompts,
        batch_size=rows,
        runs=options.runs,
        warmup=0 if options.quick else 1,
    )
    return {
        "model": subject.name,
        "dtype": subject.dtype,
        "rows": rows,
        "arms": {name: common.figures(result, name) for name in result.systems},
        "identical": common.matches(result)["speculative"],
    }


def line(row: dict[str, Any]) -> list[str]:
    """A batch size for people."""
    arms = row["arms"]
    speeds = [arms[name]["tokens_per_second"]["median"] for name in ("vanilla", "speculative")]
    over = arms["speculative"]["over_vanilla"]
    per_step = arms["speculative"]["tokens_per_step"]
    return [
        row["model"],
        str(row["rows"]),
        *("–" if speed is None else f"{speed:.1f}" for speed in speeds),
        common.spread(over),
        "–" if per_step is None else f"{per_step:.2f}",
        f"{row['identical']['matching']}/{row['identical']['total']}",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = common.make_parser(__doc__, max_new_tokens=64, runs=3)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--prompts", type=int, default=32, help="how many are decoded at each size")
    options = common.parse_options(parser, arguments, batches=[1, 2], prompts=3)
    rows: list[dict[str, Any]] = []
    for name in options.models:
        subject = common.open_subject(name, options)
        chosen = common.interleave(common.prompts_by_category(options, options.prompts))
        prompts = common.to_bench_prompts(
            subject, chosen[: options.prompts], options.max_new_tokens
        )
        for size in options.batches:
            rows.append(measure(subject, size, prompts, options))
            common.say("  ".join(line(rows[-1])))
            common.save(options, "batch", subject, {"rows": rows})
    head = ["model", "batch", "vanilla/s", "drafted/s", "ratio", "tokens/step", "identical"]
    common.print_table(head, map(line, rows))


if __name__ == "__main__":
    main()
