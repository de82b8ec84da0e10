"""A bench as files for other tools: Markdown, CSV, and what github-action-benchmark reads."""

from __future__ import annotations

import csv
import html
import io
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from conflayers_cli.bench.comparison import Comparison
from conflayers_cli.bench.schema import OWN_SYSTEMS, SPECULATIVE, VANILLA, BenchDocument
from conflayers_cli.bench.tables import (
    category_rows,
    closing,
    comparison_rows,
    headline,
    label,
    system_rows,
)
from conflayers_cli.errors import ConfLayersError, InputError
from conflayers_cli.utils.distributed import is_rank0
from conflayers_cli.utils.files import check_target, write_json

BIGGER, SMALLER = "customBiggerIsBetter.json", "customSmallerIsBetter.json"
"""Named after the action's ``tool`` that reads each."""
_MARKDOWN = re.compile(r"^[-+]|[\\`*_\[\]#|~]")
CSV_COLUMNS = (
    "prompt",
    "category",
    "arm",
    "run",
    "tokens_per_second",
    "prompt_tokens",
    "tokens",
    "drafted",
    "accepted",
)


def markdown(bench: BenchDocument, comparison: Comparison | None = None) -> str:
    """The terminal's tables as GitHub's Markdown, and what the bench ran with below them."""
    parts = [f"### {_escaped(headline(bench))}", _table(system_rows(bench))]
    if len(bench.categories) > 1:
        parts.append(_table(category_rows(bench)))
    parts.append("\n".join(f"- {_escaped(line.strip())}" for line in closing(bench)))
    if comparison:
        parts += [f"#### {_escaped(comparison.headline)}", _table(comparison_rows(comparison))]
        parts.append("\n".join(f"- {_escaped(line)}" for line in comparison.remarks))
    ran = {**bench.environment, "device": bench.device, "dtype": bench.dtype}
    listed = "\n".join(
        f"- {_escaped(key)}: {_escaped(str(value))}"
        for key, value in ran.items()
        if value is not None
    )
    parts.append(f"<details><summary>Measured with</summary>\n\n{listed}\n\n</details>")
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    heading, *body = rows
    rule = ("---", *["---:"] * (len(heading) - 1))
    lines = [tuple(map(_escaped, heading)), rule, *(tuple(map(_escaped, row)) for row in body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return html.escape(_MARKDOWN.sub(r"\\\g<0>", label(text)), quote=False)


def csv_text(bench: BenchDocument) -> str:
    """A line for every prompt (or queue of prompts decoded together), system and run.

    Counts are those of the speculative system's first run; a queue has none.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for prompt in bench.prompts:
        counts = (prompt.prompt_tokens, prompt.tokens, prompt.drafted, prompt.accepted)
        for system, run, speed in _runs(prompt.tokens_per_second):
            drafts = counts if system == SPECULATIVE else (*counts[:1], "", "", "")
            writer.writerow((prompt.id, prompt.category or "", system, run, speed, *drafts))
    for queue in bench.queues:
        for system, run, speed in _runs(queue.tokens_per_second):
            writer.writerow((queue.prompts, "", system, run, speed, "", "", "", ""))
    return out.getvalue()


def _runs(speeds: dict[str, list[float | None]]) -> Iterable[tuple[str, int, float | str]]:
    for system, of_system in speeds.items():
        for number, speed in enumerate(of_system, 1):
            yield system, number, "" if speed is None else speed


def github(bench: BenchDocument) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Entries of github-action-benchmark: those where more is better, those where less is.

    Source: its README, "Run this action with a custom benchmark": an array of objects with name,
    unit, value and, where known, range and extra.
    """
    up, speculative = bench.speedup, bench.speculative
    bigger = [_entry("speed-up over vanilla", "×", up.median, 1, up.low, up.high)]
    for name, system in bench.arms.items():
        speed = system.tokens_per_second
        title = f"decoding, {label(name)}"
        bigger.append(_entry(title, "tokens/s", speed.median, 1, speed.min, speed.max))
    bigger += [
        _entry("accepted drafts", "%", speculative.acceptance_rate, 100),
        _entry("tokens per step", "tokens", speculative.tokens_per_step),
    ]
    smaller = [
        _entry(f"first token, {name}", "ms", bench.arms[name].time_to_first_token_s, 1000)
        for name in (VANILLA, SPECULATIVE)
    ]
    smaller += [
        _entry(f"peak memory over the weights, {name}", "MiB", system.peak_memory_bytes, 2**-20)
        for name, system in bench.arms.items()
        if name in OWN_SYSTEMS
    ]
    extra = {"extra": headline(bench)}
    # an entry without a value is left out: the action takes only numbers
    return [each | extra for each in bigger if each], [each | extra for each in smaller if each]


def _entry(
    name: str,
    unit: str,
    value: float | None,
    scale: float = 1,
    low: float | None = None,
    high: float | None = None,
) -> dict[str, Any]:
    """One figure; empty where it is not known."""
    if value is None:
        return {}
    entry: dict[str, Any] = {"name": name, "unit": unit, "value": round(value * scale, 4)}
    if low is not None and high is not None:
        entry["range"] = f"{low:.4g}–{high:.4g}"
    return entry


def check_folder(path: Path) -> None:
    """Refuse a folder that neither is there nor can be made in one that is.

    Raises:
        InputError: its parent does not exist, or it is no folder.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file, a folder is needed")
    if not path.resolve().parent.is_dir():
        raise InputError(f"{path}: the folder {path.resolve().parent} does not exist")
    for name in (BIGGER, SMALLER) if path.is_dir() else ():
        check_target(path / name)


def write_github(folder: Path, bench: BenchDocument) -> None:
    """Write both arrays into a folder, which is made if need be.

    Raises:
        InputError, ConfLayersError: as `check_folder` and `write_json`.
    """
    check_folder(folder)
    if not is_rank0():
        return
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ConfLayersError(f"{folder}: can't be made: {error.strerror or error}") from error
    for name, entries in zip((BIGGER, SMALLER), github(bench), strict=True):
        write_json(folder / name, entries)


def append_step_summary(text: str) -> None:
    """Add Markdown to the page of a GitHub job's step, where there is one: all of it or nothing.

    Raises:
        ConfLayersError: it can't be written.
    """
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if not path or not is_rank0():
        return
    try:
        with Path(path).open("ab", buffering=0) as file:  # an append is then one write
            before = os.fstat(file.fileno()).st_size
            data = f"{text}\n".encode()
            if file.write(data) != len(data):
                file.truncate(before)
                raise OSError("the disk is full")
    except OSError as error:
        raise ConfLayersError(
            f"GITHUB_STEP_SUMMARY: {path}: can't be written: {error.strerror or error}"
        ) from error
