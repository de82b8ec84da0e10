"""What a bench measured → its results document (:mod:`.schema`). Reads results, never measures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from conflayers_cli.bench.runner import BenchResult, SystemResult
from conflayers_cli.bench.schema import (
    OWN_SYSTEMS,
    SKIP_ONLY,
    SPECULATIVE,
    VANILLA,
    BenchContext,
    BenchDocument,
    CategoryFigures,
    DecodingTotals,
    DrafterCounts,
    MedianSpeed,
    PositionCounts,
    PromptFigures,
    QueueFigures,
    SkipOnlyFigures,
    SystemFigures,
)
from conflayers_cli.bench.systems import PromptRuns, Run


def build_document(
    result: BenchResult, context: BenchContext, prompt_hashes: Sequence[str]
) -> BenchDocument:
    """The results document of a bench.

    Args:
        result: what was measured.
        context: what it ran with.
        prompt_hashes: SHA-256 of each prompt's content, in the order of the prompts.

    Raises:
        ValidationError: a figure that can't be, such as a speed of 0.
    """
    own_peaks = [peak for name, peak in result.peak_memory.items() if name in OWN_SYSTEMS]
    return BenchDocument(
        **dict(context),
        arms={name: _system_figures(result, name) for name in result.systems},
        speedup=result.speedup(),
        categories={name: _category_figures(result, name) for name in result.categories},
        prompts=[
            _prompt_figures(prompt, sha256, alone=not result.queues)
            for prompt, sha256 in zip(result.prompts, prompt_hashes, strict=True)
        ],
        peak_memory_bytes=max(own_peaks, default=None),
        kv_cache_bytes=result.cache_bytes,
        **_optional_fields(result),
    )


def _optional_fields(result: BenchResult) -> dict[str, Any]:
    """Fields about the systems beside vanilla, and about batches; most only where there are any."""
    matches = result.matches
    baselines = [name for name in result.systems if name not in OWN_SYSTEMS]
    fields: dict[str, Any] = {
        "speedup_over": {name: result.speedup(name) for name in baselines},
        "identical_outputs": matches.get(SPECULATIVE),
    }
    if "transformers" in result.systems:
        fields["identical_to_transformers"] = matches.get("transformers")
    if baselines:
        fields["identical_to"] = {name: matches.get(name) for name in baselines}
    if SKIP_ONLY in result.systems:
        fields["skip_only"] = SkipOnlyFigures(
            lossless=False,
            speedup=result.speedup(system=SKIP_ONLY),
            agreement=result.agreement,
        )
    if result.queues:
        fields["batch_size"] = result.batch_size
        fields["queues"] = [
            QueueFigures(prompts=queue.prompt.id, tokens_per_second=_speeds(queue))
            for queue in result.queues
        ]
    return fields


def _system_figures(result: BenchResult, name: str) -> SystemFigures:
    system = result.systems[name]
    stats = system.stats
    more: dict[str, Any] = {}
    if name in OWN_SYSTEMS:
        timed = result.queues or result.prompts
        more["decoding"] = _decoding_totals(run for prompt in timed for run in prompt.runs[name])
    if name == SPECULATIVE:
        more |= {
            "acceptance_rate": stats.acceptance_rate,
            "drafted": stats.drafted,
            "accepted": stats.accepted,
            "by_drafter": {
                proposer: DrafterCounts(**asdict(count))
                for proposer, count in stats.by_drafter.items()
            },
            "by_position": {
                proposer: PositionCounts(drafted=list(at.drafted), accepted=list(at.accepted))
                for proposer, at in stats.by_position.items()
            },
        }
    return SystemFigures(
        tokens_per_second=system.tokens_per_second,
        time_to_first_token_s=system.time_to_first_token,
        tokens=stats.tokens,
        tokens_per_step=stats.tokens_per_step,
        peak_memory_bytes=result.peak_memory.get(name),
        **more,
    )


def _decoding_totals(runs: Iterable[Run]) -> DecodingTotals:
    """All runs together, without their prefills."""
    stats = [run.stats for run in runs]
    drafting = sum(each.draft_seconds for each in stats)
    seconds = sum(each.decode_seconds for each in stats)
    return DecodingTotals(
        tokens=sum(each.decode_tokens for each in stats),
        steps=sum(each.steps for each in stats),
        draft_seconds=drafting,
        verify_seconds=max(0.0, seconds - drafting),  # nothing else takes time in a step
    )


def _category_figures(result: BenchResult, category: str) -> CategoryFigures:
    prompts = result.of_category(category)
    vanilla, speculative = (SystemResult.of(prompts, name) for name in (VANILLA, SPECULATIVE))
    return CategoryFigures(
        prompts=len(prompts),
        vanilla=MedianSpeed(tokens_per_second=vanilla.tokens_per_second.median),
        speculative=MedianSpeed(tokens_per_second=speculative.tokens_per_second.median),
        speedup=result.speedup(category=category).median,
        acceptance_rate=speculative.stats.acceptance_rate,
        tokens_per_step=speculative.stats.tokens_per_step,
    )


def _prompt_figures(prompt: PromptRuns, sha256: str, *, alone: bool) -> PromptFigures:
    stats = prompt.first_stats(SPECULATIVE)
    return PromptFigures(
        id=prompt.prompt.id,
        category=prompt.prompt.category,
        sha256=sha256,
        prompt_tokens=len(prompt.prompt.tokens),
        tokens=stats.tokens,
        steps=stats.steps,
        drafted=stats.drafted,
        accepted=stats.accepted,
        tokens_per_second=_speeds(prompt) if alone else {},
    )


def _speeds(prompt: PromptRuns) -> dict[str, list[float | None]]:
    """Of every run, by system, in order; None where nothing was decoded behind the first token."""
    return {
        system: [run.stats.tokens_per_second or None for run in runs]
        for system, runs in prompt.runs.items()
    }
