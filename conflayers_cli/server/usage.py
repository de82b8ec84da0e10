"""What an answer took and who drafted it, in OpenAI's fields and in one of our own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from conflayers_cli.generation.response import GenerationResult
from conflayers_cli.generation.stats import GenerationStats


def usage(results: Sequence[GenerationResult], num_prompts: int = 1) -> dict[str, Any]:
    """OpenAI's ``usage`` of the texts of one request.

    ``accepted_prediction_tokens`` are the drafted tokens that were kept, whoever drafted them;
    ``rejected_prediction_tokens`` the others. A prompt counts once, however many answers it has.
    """
    per_prompt = max(len(results) // num_prompts, 1)
    prompt = sum(result.prompt_tokens for result in results[::per_prompt])
    cached = sum(result.cached_prompt_tokens for result in results[::per_prompt])
    completion = sum(len(result.token_ids) for result in results)
    stats = GenerationStats.total(result.stats for result in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {
            "accepted_prediction_tokens": stats.accepted,
            "rejected_prediction_tokens": stats.drafted - stats.accepted,
        },
    }


def drafting(results: Sequence[GenerationResult]) -> dict[str, Any]:
    """The extension field ``conflayers``: who drafted how much, by position in the draft, too."""
    stats = GenerationStats.total(result.stats for result in results)
    return {
        "steps": stats.steps,
        "tokens_per_step": stats.tokens_per_step,
        "acceptance_rate": stats.acceptance_rate,
        "prefill_seconds": round(stats.prefill_seconds, 6),
        "decode_seconds": round(stats.decode_seconds, 6),
        "by_drafter": {
            name: {
                "steps": count.steps,
                "drafted": count.drafted,
                "accepted": count.accepted,
                "by_position": {
                    "drafted": list(stats.by_position[name].drafted),
                    "accepted": list(stats.by_position[name].accepted),
                },
            }
            for name, count in stats.by_drafter.items()
        },
    }
