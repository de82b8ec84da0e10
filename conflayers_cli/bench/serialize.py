"""Results of a bench → its JSON document. Reads results, never measures.

Tables, exports, pictures and comparisons are made from the document (:mod:`conflayers_cli.bench.runner.schema`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from conflayers_cli.bench.output_match import Identity
from conflayers_cli.bench.runner import ArmResult, BenchResult, CaseRuns
from conflayers_cli.bench.schema import OWN, SCHEMA_VERSION
from conflayers_cli.bench.systems import SKIP_ONLY, Run


@dataclass(frozen=True)
class BenchContext:
    """What a bench ran with, for its report.

    Attributes:
        model, model_hash: the model's name, and the hash of its configuration.
        device, dtype: where and how it ran.
        environment: versions, processors, threads.
        settings: what was measured, so that it can be measured again.
        engine: how passes were run.
        prompts: SHA-256 of what each prompt says, in the order of the cases.
    """

    model: str
    model_hash: str
    device: str
    dtype: str
    environment: Mapping[str, str | int | None]
    settings: Mapping[str, Any]
    engine: Mapping[str, Any]
    prompts: Sequence[str]


def bench_json(result: BenchResult, context: BenchContext) -> dict[str, Any]:
    """A bench as one JSON document."""
    identical = result.identical or {}
    others = [name for name in result.arms if name not in OWN]
    document: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "model": context.model,
        "model_hash": context.model_hash,
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
    document["prompts"] = [
        _prompt_json(case, sha256, alone=not result.queues)
        for case, sha256 in zip(result.cases, context.prompts, strict=True)
    ]
    document["peak_memory_bytes"] = _own_peak(result)
    document["kv_cache_bytes"] = result.cache_bytes
    if result.queues:
        document["batch_size"] = result.batch_size
        document["queues"] = [
            {"prompts": queue.case.id, "tokens_per_second": _speeds(queue)}
            for queue in result.queues
        ]
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
        "tokens_per_step": arm.stats.tokens_per_step,
        "peak_memory_bytes": result.peak_memory.get(name),
    }
    if name in OWN:
        figures["decoding"] = _decoding_json(
            run for case in result.queues or result.cases for run in case.runs[name]
        )
    if name == "speculative":
        figures |= {
            "acceptance_rate": arm.stats.acceptance_rate,
            "drafted": arm.stats.drafted,
            "accepted": arm.stats.accepted,
            "by_drafter": arm.stats.as_json()["by_drafter"],
            "by_position": {
                drafter: {"drafted": list(at.drafted), "accepted": list(at.accepted)}
                for drafter, at in arm.stats.by_position.items()
            },
        }
    return figures


def _decoding_json(runs: Iterable[Run]) -> dict[str, Any]:
    """All runs together, behind their prompts' passes."""
    stats = [run.stats for run in runs]
    drafting = sum(each.draft_seconds for each in stats)
    seconds = sum(each.decode_seconds for each in stats)
    return {
        "tokens": sum(each.decode_tokens for each in stats),
        "steps": sum(each.steps for each in stats),
        "draft_seconds": drafting,
        "verify_seconds": max(0.0, seconds - drafting),  # nothing else takes time in a step
    }


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


def _prompt_json(case: CaseRuns, sha256: str, *, alone: bool) -> dict[str, Any]:
    stats = case.stats("speculative")
    return {
        "id": case.case.id,
        "category": case.case.category,
        "sha256": sha256,
        "prompt_tokens": len(case.case.tokens),
        "tokens": stats.tokens,
        "steps": stats.steps,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "tokens_per_second": _speeds(case) if alone else {},
    }


def _speeds(case: CaseRuns) -> dict[str, list[float | None]]:
    """Of every run, by arm, in order; None where nothing was decoded behind the first token."""
    return {
        arm: [run.stats.tokens_per_second or None for run in runs]
        for arm, runs in case.runs.items()
    }
