"""Documents of benches that never ran, with the figures that a test wants."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conflayers_cli.bench.runner import BenchResult, SystemResult
from conflayers_cli.bench.schema import BenchContext, BenchDocument, OutputMatch
from conflayers_cli.bench.serialize import build_document
from conflayers_cli.bench.systems import BenchPrompt, PromptRuns, Run
from conflayers_cli.generation.positions import AcceptedPerPosition
from conflayers_cli.generation.stats import DraftCount, GenerationStats

SETTINGS: Mapping[str, Any] = {
    "max_new_tokens": 101,
    "batch_size": 1,
    "runs": 3,
    "sampling": {"temperature": 0.0},
    "repeatable_drafts": False,
}
ENVIRONMENT: dict[str, str | int | None] = {
    "conflayers": "0.1.0",
    "torch": "2.13.0",
    "processor": "A processor",
    "threads": 2,
}


def runs(speed: float, *, accepted: int | None = None, count: int = 3) -> tuple[Run, ...]:
    """Of 100 tokens behind the first; with drafts, 80 of them in 40 steps."""
    drafts: dict[str, Any] = {}
    if accepted is not None:
        first = min(accepted, 40)
        drafts = {
            "by_drafter": {"skip": DraftCount(40, 80, accepted)},
            "draft_seconds": 40 / speed,
            "by_position": {"skip": AcceptedPerPosition((40, 40), (first, accepted - first))},
        }
    steps = 100 if accepted is None else 40
    return (Run((1,), GenerationStats(0.5, 100 / speed, 101, 100, steps, **drafts)),) * count


def bench_document(
    speedups: Sequence[float] = (2.0, 2.0, 2.0),
    *,
    vanilla: float = 10.0,
    accepted: int | Sequence[int] = 60,
    categories: Sequence[str | None] = (),
    texts: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    together: bool = False,
    **context: Any,
) -> dict[str, Any]:
    """A bench's document, as JSON gives it back.

    Args:
        speedups: of each prompt.
        vanilla: its tokens per second.
        accepted: of the 80 tokens drafted for each prompt.
        categories: of the prompts; none.
        texts: what stands for what the prompts say; by default their numbers.
        settings: changes to `SETTINGS`.
        together: the prompts were decoded as one queue.
        context: changes to the bench's context.
    """
    kept = [accepted] * len(speedups) if isinstance(accepted, int) else accepted
    prompts = tuple(
        PromptRuns(
            BenchPrompt(f"p{i}", categories[i] if categories else None, (1, 2, 3), 101),
            {"vanilla": runs(vanilla), "speculative": runs(vanilla * up, accepted=kept[i])},
        )
        for i, up in enumerate(speedups)
    )
    names = ("vanilla", "speculative")
    result = BenchResult(
        prompts,
        {name: SystemResult.of(prompts, name) for name in names},
        {"speculative": OutputMatch(matching=len(prompts), total=len(prompts), divergences=[])},
        {"vanilla": 2**20, "speculative": 2**21},
        2**20,
        queues=prompts if together else (),
        batch_size=2 if together else 1,
    )
    values: dict[str, Any] = {
        "schema_version": 3,
        "model": "tiny",
        "model_hash": "0f" * 8,
        "device": "cpu",
        "dtype": "bfloat16",
        "environment": ENVIRONMENT,
        "settings": {**SETTINGS, **(settings or {})},
        "engine": {"exact_to_the_bit": True},
        **context,
    }
    hashes = texts or [f"{i:064x}" for i in range(len(prompts))]
    document = build_document(result, BenchContext(**values), hashes).as_json()
    found: dict[str, Any] = json.loads(json.dumps(document, allow_nan=False))
    return found


def checked(*arguments: Any, **more: Any) -> BenchDocument:
    """The same, read."""
    return BenchDocument.model_validate(bench_document(*arguments, **more))


def saved(path: Path, *arguments: Any, **more: Any) -> Path:
    """The same, in a file."""
    path.write_text(json.dumps(bench_document(*arguments, **more)), encoding="utf-8")
    return path
