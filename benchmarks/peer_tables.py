"""The results of :mod:`.peers` as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MIB = 2**20
QUANTISED = ("q8", "q4", "int8", "int4")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column to the left, the others to the right."""
    rule = ["---", *("--:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))


def is_quantised(arm: str) -> bool:
    """Whether an arm's weights are rounded: another model's."""
    return any(part in QUANTISED for part in arm.split("-"))


def figure(found: Mapping[str, float | None] | None, scale: float = 1, digits: int = 0) -> str:
    """A median."""
    value = None if found is None else found["median"]
    return "–" if value is None else f"{value * scale:,.{digits}f}"


def with_range(found: Mapping[str, float | None] | None) -> str:
    """A median and the range around it."""
    if found is None or found["median"] is None:
        return "–"
    return f"{found['median']:.1f} ({found['min']:.1f}–{found['max']:.1f})"


def speed_rows(name: str, entry: Mapping[str, Any], labels: Mapping[str, str]) -> list[list[str]]:
    """A model's rows of the first table, in the order of ``labels``."""
    speed = entry.get("speed", {"arms": {}, "memory_bytes": {}})
    # 8,000 tokens and 8,192 are both 8k: some models have no room for more behind them
    lengths = {
        2 ** round(math.log2(row["context"])): row["arms"]
        for row in entry.get("contexts", {}).get("rows", [])
    }
    rows = []
    for arm, label in labels.items():
        if arm not in speed["arms"] and not any(arm in arms for arms in lengths.values()):
            continue
        own = speed["arms"].get(arm, {})
        over = own.get("over_llama")
        at = {length: arms[arm] for length, arms in lengths.items() if arm in arms}
        first = [figure(at.get(n, {}).get("first_seconds"), 1000) for n in (64, 512, 2048)]
        token = [figure(at.get(n, {}).get("token_seconds"), 1000, 1) for n in (512, 2048, 8192)]
        memory = speed["memory_bytes"].get(arm)
        rows.append(
            [
                name,
                f"*{label}*" if is_quantised(arm) else label,
                with_range(own.get("tokens_per_second")),
                "1" if arm == "llama" else figure(over, digits=2),
                *(" / ".join(part) if at else "–" for part in (first, token)),
                "–" if memory is None else f"{memory / MIB:,.0f}",
            ]
        )
    return rows


def pass_rows(name: str, entry: Mapping[str, Any]) -> list[list[str]]:
    """A model's rows of the second table."""
    found = entry.get("passes", {"seconds": {}})
    seconds, rows = found["seconds"], []
    arms = dict.fromkeys(case.split()[0] for case in seconds)
    for arm in arms:
        one = seconds[f"{arm} 1"]["median"]
        cells = [
            f"{each['median'] * 1000:.1f} ({each['median'] / one:.2f})"
            for width in ("1", "2", "4", "8", "16", "int4", "profile")
            if (each := seconds.get(f"{arm} {width}"))
        ]
        share = found.get("share_of_memory", {}).get(f"{arm} 1")
        cells += ["–"] * (7 - len(cells)) + ["–" if share is None else f"{share:.0%}"]
        rows.append([name, arm, *cells])
    return rows


def notes(name: str, entry: Mapping[str, Any], labels: Mapping[str, str]) -> list[str]:
    """What drafts did, whose texts are alike, and what did not run, a line each."""
    lines, speed = [], entry.get("speed", {"arms": {}, "failed": {}})
    for arm, own in speed["arms"].items():
        if "acceptance" in own:
            steps = f"{own['tokens_per_step']:.1f} tokens a step"
            lines.append(f"{name}, {labels[arm]}: {own['acceptance']:.1%} accepted, {steps}")
        if same := own.get("identical"):
            first = own["first_difference"]["median"]
            where = "" if first is None else f", else alike for {first - 1:.0f} tokens (median)"
            count = f"{same['matching']} of {same['total']}"
            lines.append(f"{name}, {labels[arm]}: {count} texts are {same['to']}'s{where}")
    lines += [f"{name}, {arm}: did not run: {why[:200]}" for arm, why in speed["failed"].items()]
    if speed_of := entry.get("passes", {}).get("memory_gigabytes_per_second"):
        lines.append(f"{name}: memory is read at {speed_of['median']:.1f} GB/s")
    return lines


def show(document: Mapping[str, Any], labels: Mapping[str, str]) -> None:
    """Both tables and the notes, on standard output."""
    machine, subjects = document["environment"], document["subjects"]
    unit = machine["native_unit"] or "no native library"
    print(f"{machine['processor']}, {unit}, {document['threads']} threads; ", end="")
    print("bfloat16, *quantised weights are another model*\n")
    head = ["model", "engine", "tokens/s", "× llama.cpp", "first token at 64 / 512 / 2k, ms"]
    head += ["a token at 512 / 2k / 8k, ms", "memory, MiB"]
    rows = [row for name, entry in subjects.items() for row in speed_rows(name, entry, labels)]
    print(markdown(head, rows), end="\n\n")
    rows = [row for name, entry in subjects.items() for row in pass_rows(name, entry)]
    if rows:
        widths = [f"{width} wide" for width in (1, 2, 4, 8, 16)]
        head = ["ms a pass (of one token's)", "engine", *widths, "int4", "profile's", "of memory"]
        print(markdown(head, rows), end="\n\n")
    for name, entry in subjects.items():
        for line in notes(name, entry, labels):
            print(f"- {line}")
