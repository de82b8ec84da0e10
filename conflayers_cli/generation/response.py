"""What comes of a request: its text piece by piece, and all of it in the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from conflayers_cli.generation.sequence import FinishReason, Step
from conflayers_cli.generation.stats import GenerationStats


@dataclass(frozen=True)
class GenerationResult:
    """A finished text, why it ended, and what it took.

    Attributes:
        text: without end tokens and stop strings; empty where there is no tokenizer.
        token_ids: the tokens produced, an end token included.
        finish_reason: "stop": an end token or stop string; "length": the token budget;
            "interrupted": it was cancelled.
        prompt_tokens: the prompt's length.
        stats: what decoding took.
        cached_prompt_tokens: so many of the prompt's tokens did not have to be read.
        cache_bytes: memory of the keys and values; of a batch all of it.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | Literal["interrupted"]
    prompt_tokens: int
    stats: GenerationStats
    cached_prompt_tokens: int = 0
    cache_bytes: int = 0

    def as_json(self) -> dict[str, Any]:
        """The result as JSON takes it."""
        return {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "stats": self.stats.as_json(),
        }


Answer = GenerationResult
"""The name it has had in the Python API."""


@dataclass(frozen=True)
class GenerationResponse:
    """What one step gave for one request.

    Attributes:
        number: the request's: its index in what `TextGenerator.stream` was given, or what
            `TextGenerator.add` returned.
        text: the newly certain text, possibly empty; the pieces add up to the whole text.
        step: the tokens, how many were drafted and accepted, by whom, and seconds; None where the
            request was cancelled.
        result: the whole, with a request's last response; None before.
    """

    number: int
    text: str
    step: Step | None
    result: GenerationResult | None = None
