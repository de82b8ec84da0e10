"""A bench for people on a terminal: tables, bars, and sentences."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from conflayers_cli.bench.comparison import Comparison
from conflayers_cli.bench.metrics import RegressionMetric
from conflayers_cli.bench.schema import (
    SKIP_ONLY,
    SPECULATIVE,
    Agreement,
    BenchDocument,
)
from conflayers_cli.utils.bars import horizontal_bar, vertical_bars
from conflayers_cli.utils.statistics import Interval

BASELINE_LABELS = {
    "transformers": "transformers' generate",
    "transformers-static": "transformers' generate with a static cache",
    "prompt-lookup": "transformers' prompt lookup",
    "early-exit": "transformers' early exit",
}
BAR = 16
"""Characters of the longest bar."""


def bench_tables(
    bench: BenchDocument, comparison: Comparison | None = None
) -> list[RenderableType]:
    """Speeds by system and category, output matches, bars, and the comparison."""
    parts: list[RenderableType] = [Text(headline(bench)), _table(system_rows(bench))]
    if len(bench.categories) > 1:
        parts.append(_category_table(bench))
    parts += [Text(line) for line in (*closing(bench), *charts(bench))]
    if comparison:
        parts += ["", Text(label(comparison.headline)), _table(comparison_rows(comparison))]
        parts += [Text(label(line)) for line in comparison.remarks]
    return parts


def headline(bench: BenchDocument) -> str:
    """What was measured, in one line."""
    count, queues = len(bench.prompts), len(bench.queues)
    together = f", {bench.batch_size} at once" if queues else ""
    if queues > 1:
        together += f" in {queues} queues"
    return label(
        f"{bench.model} on {bench.device}, {bench.dtype}: {count} "
        f"prompt{'s' if count > 1 else ''}{together}, up to "
        f"{bench.settings.get('max_new_tokens')} new tokens, {bench.settings.get('runs')} runs"
    )


def system_rows(bench: BenchDocument) -> Iterable[tuple[str, ...]]:
    """A heading, and a row for every system."""
    yield (
        "arm",
        "tokens/s",
        "min–max",
        "first token",
        "tokens",
        "accepted",
        "tokens/step",
        "speed-up",
        "95 % interval",
    )
    for name, system in bench.arms.items():
        speed = system.tokens_per_second
        speedup = bench.speedup_of(name) or Interval.of([])
        yield (
            label(name),
            number(speed.median, ".1f"),
            between(speed.min, speed.max, ".1f"),
            f"{system.time_to_first_token_s * 1000:.0f} ms",
            str(system.tokens),
            number(system.acceptance_rate, ".1%"),
            number(system.tokens_per_step, ".2f"),
            number(speedup.median, ".2f", "×"),
            between(speedup.low, speedup.high, ".2f"),
        )


def category_rows(bench: BenchDocument) -> Iterable[tuple[str, ...]]:
    """A heading, and a row for every category."""
    yield "category", "prompts", "vanilla", "speculative", "accepted", "tokens/step", "speed-up"
    for name, row in bench.categories.items():
        yield (
            label(name),
            str(row.prompts),
            number(row.vanilla.tokens_per_second, ".1f"),
            number(row.speculative.tokens_per_second, ".1f"),
            number(row.acceptance_rate, ".1%"),
            number(row.tokens_per_step, ".2f"),
            number(row.speedup, ".2f", "×"),
        )


def comparison_rows(comparison: Comparison) -> Iterable[tuple[str, ...]]:
    """A heading, and a row for every metric compared."""
    yield "figure", "old", "new", "new/old", "95 % interval", "verdict"
    for row in comparison.metrics:
        form, unit = _FORMS[row.metric]
        yield (
            row.metric.label,
            number(row.change.old, form, unit),
            number(row.change.new, form, unit),
            number(row.change.ratio, ".3f"),
            between(row.change.low, row.change.high, ".3f"),
            row.verdict if row.judged else f"({row.verdict}, not judged)",
        )


_FORMS = {
    RegressionMetric.SPEEDUP: (".2f", "×"),
    RegressionMetric.ACCEPTANCE: (".1%", ""),
    RegressionMetric.SPEED: (".1f", ""),
}


def closing(bench: BenchDocument) -> Iterable[str]:
    """Sentences below the tables."""
    drafters = bench.speculative.by_drafter
    if len(drafters) > 1:
        parts = (
            f"{label(name)} {did.drafted} ({did.accepted / max(1, did.drafted):.1%} accepted)"
            for name, did in drafters.items()
        )
        yield f"drafted by: {', '.join(parts)}"
    for name, speedup in bench.speedup_over.items():
        yield f"speed-up over {BASELINE_LABELS.get(name, label(name))}: {_interval(speedup)}"
    identical = {SPECULATIVE: bench.identical_outputs, **bench.identical_to}
    for name, match in ((name, match) for name, match in identical.items() if match):
        yield f"{label(name)}: {match.matching} of {match.total} outputs identical to vanilla's"
        for parted in match.divergences:
            yield (
                f"  {label(parted.id)}: from token {parted.position} on ({parted.vanilla} and "
                f"{parted.other}; the two best logits differ by {parted.gap:.2g})"
            )
    if bench.skip_only:
        yield from _lossy(bench.skip_only.agreement)
    if bench.peak_memory_bytes is not None:
        theirs = bench.arms.get("transformers")
        peak = theirs.peak_memory_bytes if theirs else None
        compared = "" if peak is None else f" (transformers: {peak / 2**20:,.0f} MiB)"
        yield (
            f"peak memory over the model's weights: {bench.peak_memory_bytes / 2**20:,.0f} MiB"
            f"{compared}; keys and values: {bench.kv_cache_bytes / 2**20:.0f} MiB"
        )


def charts(bench: BenchDocument) -> Iterable[str]:
    """Time per token, and acceptance rates by position in the draft, as bars."""
    times = bench.token_times
    longest = max(map(sum, times.values()), default=0.0)
    if longest > 0:
        yield "time of a token:"
        for name, (drafting, verifying) in times.items():
            split = f" (drafting {drafting:.1f}, verifying {verifying:.1f})" if drafting else ""
            drawn = horizontal_bar((drafting + verifying) / longest, BAR)
            yield f"  {name:<11} {drawn:<{BAR}} {drafting + verifying:.1f} ms{split}"
    parts = {
        name: each for name, each in bench.speculative.by_position.items() if any(each.drafted)
    }
    if parts:
        yield "accepted by place in the draft, from the first on:"
    for name, part in parts.items():
        known = [(k, rate) for k, rate in enumerate(part.rates) if rate is not None]
        (first, begin), (last, end) = known[0], known[-1]
        yield (
            f"  {label(name):<11} {vertical_bars(part.rates)} {begin:.0%} of {part.drafted[first]} "
            f"… {end:.0%} of {part.drafted[last]}"
        )


def _lossy(agreement: Agreement | None) -> Iterable[str]:
    yield f"{SKIP_ONLY} is lossy: its output is not the model's own"
    if agreement:
        parted = agreement.first_divergence
        others = "" if parted is None else f"; the others part at token {parted:.0f} in the median"
        yield (
            f"  of its tokens {agreement.equal:.1%} equal vanilla's, ROUGE-2 "
            f"{agreement.rouge_2:.2f}, {agreement.identical} of {agreement.prompts} outputs the "
            f"same{others}"
        )


def _category_table(bench: BenchDocument) -> Table:
    heading, *rows = category_rows(bench)
    speedups = [category.speedup or 0.0 for category in bench.categories.values()]
    longest = max(speedups) or 1.0
    drawn = [horizontal_bar(speedup / longest, BAR) for speedup in speedups]
    return _table([(*heading, ""), *((*row, b) for row, b in zip(rows, drawn, strict=True))])


def _table(rows: Iterable[tuple[str, ...]]) -> Table:
    (first, *others), *body = rows
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right" if name else "left")
    for row in body:
        table.add_row(*map(Text, row))
    return table


def label(text: str) -> str:
    """A name out of a file, harmless to a terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def number(value: float | None, form: str, unit: str = "") -> str:
    """A figure, or a dash where there is none."""
    return "–" if value is None else f"{value:{form}}{unit}"


def between(low: float | None, high: float | None, form: str) -> str:
    """Two ends, or a dash where there are none."""
    return "–" if low is None or high is None else f"{low:{form}}–{high:{form}}"


def _interval(interval: Interval) -> str:
    ends = between(interval.low, interval.high, ".2f")
    return f"{number(interval.median, '.2f', '×')} ({ends})"
