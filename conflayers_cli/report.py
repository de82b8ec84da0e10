"""Results → JSON and tables. Reads results, never measures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from conflayers_cli.agreement import Agreement
from conflayers_cli.arms import SKIP_ONLY
from conflayers_cli.bench import ArmResult, BenchResult, Interval
from conflayers_cli.identity import Identity

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

SCHEMA_VERSION = 2
"""2: peak memory is over the model's weights and by arm; in 1 it was the whole process's."""


OWN = ("vanilla", "speculative", SKIP_ONLY)
"""The arms of this package's engine; the others are transformers'."""
PEERS = {
    "transformers": "transformers' generate",
    "transformers-static": "transformers' generate with a static cache",
    "prompt-lookup": "transformers' prompt lookup",
    "early-exit": "transformers' early exit",
}


@dataclass(frozen=True)
class BenchContext:
    """What a bench ran with, for its report."""

    model: str
    device: str
    dtype: str
    environment: Mapping[str, str | int | None]
    settings: Mapping[str, Any]
    engine: Mapping[str, Any]


def bench_json(result: BenchResult, context: BenchContext) -> dict[str, Any]:
    """A bench as one JSON document."""
    identical = result.identical or {}
    others = [name for name in result.arms if name not in OWN]
    document: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "model": context.model,
        "device": context.device,
        "dtype": context.dtype,
        "environment": dict(context.environment),
        "settings": dict(context.settings),
        "engine": dict(context.engine),
        "arms": {name: _arm_json(result, name) for name in result.arms},
        "speedup": asdict(result.speedup()),
        "speedup_over": {name: asdict(result.speedup(name)) for name in others},
        "identical_outputs": _identity_json(identical.get("speculative")),
    }
    if "transformers" in result.arms:
        document["identical_to_transformers"] = _identity_json(identical.get("transformers"))
    if others:
        document["identical_to"] = {name: _identity_json(identical.get(name)) for name in others}
    if SKIP_ONLY in result.arms:
        agreement = result.agreement
        document["skip_only"] = {
            "lossless": False,
            "speedup": asdict(result.speedup(arm=SKIP_ONLY)),
            "agreement": asdict(agreement) if agreement else None,
        }
    document["categories"] = {name: _category_json(result, name) for name in result.categories}
    document["peak_memory_bytes"] = _own_peak(result)
    document["kv_cache_bytes"] = result.cache_bytes
    if result.queues:
        document["batch_size"] = result.batch_size
        document["queues"] = len(result.queues)
    return document


def _own_peak(result: BenchResult) -> int | None:
    """The most memory over the model's weights that an arm of this package's engine took."""
    peaks = result.peak_memory
    return max((peak for name, peak in peaks.items() if name in OWN), default=None)


def _arm_json(result: BenchResult, name: str) -> dict[str, Any]:
    arm = result.arms[name]
    figures: dict[str, Any] = {
        "tokens_per_second": asdict(arm.tokens_per_second),
        "time_to_first_token_s": arm.time_to_first_token,
        "tokens": arm.stats.tokens,
        "peak_memory_bytes": result.peak_memory.get(name),
    }
    if name == "speculative":
        figures |= {
            "acceptance_rate": arm.stats.acceptance_rate,
            "tokens_per_step": arm.stats.tokens_per_step,
            "drafted": arm.stats.drafted,
            "accepted": arm.stats.accepted,
            "by_drafter": arm.stats.as_json()["by_drafter"],
        }
    return figures


def _identity_json(identity: Identity | None) -> dict[str, Any] | None:
    if identity is None:
        return None
    return {
        "matching": identity.matching,
        "total": identity.total,
        "divergences": [asdict(divergence) for divergence in identity.divergences],
    }


def _category_json(result: BenchResult, category: str) -> dict[str, Any]:
    cases = result.of_category(category)
    arms = {name: ArmResult.of(cases, name) for name in ("vanilla", "speculative")}
    stats = arms["speculative"].stats
    return {
        "prompts": len(cases),
        **{name: {"tokens_per_second": arm.tokens_per_second.median} for name, arm in arms.items()},
        "speedup": result.speedup(category=category).median,
        "acceptance_rate": stats.acceptance_rate,
        "tokens_per_step": stats.tokens_per_step,
    }


def bench_tables(result: BenchResult, context: BenchContext) -> list[RenderableType]:
    """A bench for people: who was how fast, where, and whether the outputs are the same."""
    parts: list[RenderableType] = [_headline(result, context), _arm_table(result)]
    if len(result.categories) > 1:
        parts.append(_category_table(result))
    parts += [_plain(line) for line in _closing(result)]
    return parts


def _headline(result: BenchResult, context: BenchContext) -> RenderableType:
    count, queues = len(result.cases), len(result.queues)
    together = f", {result.batch_size} at once" if queues else ""
    if queues > 1:
        together += f" in {queues} queues"
    return _plain(
        f"{_label(context.model)} on {context.device}, {context.dtype}: {count} "
        f"prompt{'s' if count > 1 else ''}{together}, up to "
        f"{context.settings.get('max_new_tokens')} new tokens, {context.settings.get('runs')} runs"
    )


def _arm_table(result: BenchResult) -> Table:
    table = _table(
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
    for name, arm in result.arms.items():
        speed = arm.tokens_per_second
        ours = name in ("speculative", SKIP_ONLY)
        speedup = result.speedup(arm=name) if ours else Interval(None, None, None)
        table.add_row(
            _plain(_label(name)),
            _number(speed.median, ".1f"),
            _range(speed.min, speed.max, ".1f"),
            f"{arm.time_to_first_token * 1000:.0f} ms",
            str(arm.stats.tokens),
            _number(arm.stats.acceptance_rate, ".1%"),
            _number(arm.stats.tokens_per_step, ".2f"),
            _number(speedup.median, ".2f", "×"),
            _range(speedup.low, speedup.high, ".2f"),
        )
    return table


def _category_table(result: BenchResult) -> Table:
    table = _table(
        "category", "prompts", "vanilla", "speculative", "accepted", "tokens/step", "speed-up"
    )
    for name in result.categories:
        row = _category_json(result, name)
        table.add_row(
            _plain(_label(name)),
            str(row["prompts"]),
            _number(row["vanilla"]["tokens_per_second"], ".1f"),
            _number(row["speculative"]["tokens_per_second"], ".1f"),
            _number(row["acceptance_rate"], ".1%"),
            _number(row["tokens_per_step"], ".2f"),
            _number(row["speedup"], ".2f", "×"),
        )
    return table


def _closing(result: BenchResult) -> Iterable[str]:
    if told := result.arms["speculative"].stats.drafted_by:
        yield told
    for name in (name for name in result.arms if name not in OWN):
        yield f"speed-up over {PEERS.get(name, name)}: {_interval(result.speedup(name))}"
    for name, identity in (result.identical or {}).items():
        yield f"{name}: {identity.matching} of {identity.total} outputs identical to vanilla's"
        for parted in identity.divergences:
            yield (
                f"  {_label(parted.id)}: from token {parted.position} on ({parted.vanilla} and "
                f"{parted.other}; the two best logits differ by {parted.gap:.2g})"
            )
    if SKIP_ONLY in result.arms:
        yield from _lossy(result.agreement)
    if result.identical is None:
        yield "outputs are sampled, so they are not compared"
    memory = _own_peak(result)
    if memory is not None:
        theirs = result.peak_memory.get("transformers")
        compared = "" if theirs is None else f" (transformers: {theirs / 2**20:,.0f} MiB)"
        yield (
            f"peak memory over the model's weights: {memory / 2**20:,.0f} MiB{compared}; "
            f"keys and values: {result.cache_bytes / 2**20:.0f} MiB"
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


def _table(first: str, *others: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _plain(text: str) -> RenderableType:
    from rich.text import Text

    return Text(text)


def _label(text: str) -> str:
    """A name out of a file, harmless to a terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"


def _range(low: float | None, high: float | None, form: str) -> str:
    return "–" if low is None or high is None else f"{low:{form}}–{high:{form}}"


def _interval(interval: Interval) -> str:
    between = _range(interval.low, interval.high, ".2f")
    return f"{_number(interval.median, '.2f', '×')} ({between})"
