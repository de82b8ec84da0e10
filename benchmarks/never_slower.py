"""Never slower than vanilla: drafting as the tool does it, in every corner it may be used in.

A cell is one model, category, temperature, batch size and profile. "good" is the calibrated
profile (n-grams alone for a model without one), "bad" leaves out a random half of the layers, and
nobody has measured how that goes. Every cell begins with a new drafter, which learns over the
cell's prompts as it would in a user's run; nothing warms it up. Speculative and vanilla take turns.

    python -m benchmarks.never_slower --data spec_bench.jsonl --output never-slower.json
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import common
from conflayers_cli.bench.systems import BenchPrompt
from conflayers_cli.utils.statistics import Spread


@dataclass(frozen=True)
class Cell:
    """One corner.

    Attributes:
        rows: prompts decoded at once.
        profile: "good" or "bad".
    """

    category: str
    temperature: float
    rows: int
    profile: str


def make_cells(options: argparse.Namespace, categories: Sequence[str]) -> list[Cell]:
    """All of one model."""
    corners = itertools.product(options.batches, options.which, options.temperatures, categories)
    return [
        Cell(category, temperature, rows, profile)
        for rows, profile, temperature, category in corners
    ]


def measure(
    subject: common.Subject, cell: Cell, prompts: Sequence[BenchPrompt], options: argparse.Namespace
) -> dict[str, Any]:
    """One cell's figures. A batch is decoded from a queue half as long again, so that rows that end
    are replaced and, at its end, not replaced.
    """
    profile = (
        subject.profile if cell.profile == "good" else common.bad_profile(subject, options.seed)
    )
    proposer = common.make_proposer(subject, profile, rows=cell.rows)
    count = max(options.per_category, cell.rows + cell.rows // 2) if cell.rows > 1 else len(prompts)
    result = common.compare(
        subject,
        proposer,
        common.repeat_prompts(prompts, count),
        batch_size=cell.rows,
        temperature=cell.temperature,
        runs=options.runs,
    )
    found = common.ratios(result)
    speculative = common.figures(result, "speculative")
    return {
        "model": subject.name,
        **asdict(cell),
        "ratio": Spread.of(found).model_dump(),
        "ratios": found,
        "drafted": speculative["drafted"],
        "accepted": speculative["accepted"],
        "tokens": speculative["tokens"],
    }


def line(row: dict[str, Any]) -> list[str]:
    """A cell for people."""
    ratio = row["ratio"]
    share = f"{row['accepted']}/{row['drafted']}" if row["drafted"] else "–"
    shown = common.spread(ratio)
    where = [row["model"], str(row["rows"]), row["profile"], f"{row['temperature']:g}"]
    return [row["category"], *where, shown, share]


def least(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The cell with the least median; None where nothing was measured."""
    known = [row for row in rows if row["ratio"]["median"] is not None]
    return min(known, key=lambda row: float(row["ratio"]["median"]), default=None)


def pooled(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """All categories of a corner together: single cells are a few runs on a noisy machine."""
    corners: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        corner = row["model"], row["rows"], row["profile"], row["temperature"]
        corners.setdefault(corner, []).extend(row["ratios"])
    return [
        [model, str(count), profile, f"{temperature:g}", common.spread(Spread.of(found))]
        for (model, count, profile, temperature), found in corners.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every cell, print, write."""
    parser = common.make_parser(__doc__, max_new_tokens=96, runs=3)
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 1.0])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--which", nargs="+", choices=["good", "bad"], default=["good", "bad"])
    parser.add_argument("--seed", type=int, default=0, help="of the bad profile")
    options = common.parse_options(parser, arguments, batches=[1, 2])
    most = max(rows + rows // 2 for rows in options.batches)
    rows: list[dict[str, Any]] = []
    head = ["category", "model", "batch", "profile", "T", "over vanilla", "accepted"]
    for name in options.models:
        subject = common.open_subject(name, options)
        chosen = common.prompts_by_category(options, max(options.per_category, most))
        prompts = {
            category: common.to_bench_prompts(subject, own, options.max_new_tokens)
            for category, own in chosen.items()
        }
        first = next(iter(prompts.values()))[:1]
        common.compare(subject, None, first, runs=1)  # warms up
        for cell in make_cells(options, list(prompts)):
            own = prompts[cell.category]
            own = own[: options.per_category] if cell.rows == 1 else own
            rows.append(measure(subject, cell, own, options))
            common.say("  ".join(line(rows[-1])))
            common.save(options, "never-slower", subject, {"cells": rows})
    common.print_table(head, map(line, rows))
    common.print_table(["model", "batch", "profile", "T", "all categories"], pooled(rows))
    if worst := least(rows):
        print(f"least of the medians: {'  '.join(line(worst))}")


if __name__ == "__main__":
    main()
