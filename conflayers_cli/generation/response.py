"""Responses to a request: its text piece by piece, and the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from conflayers_cli.generation.sequence import FinishReason, Step
from conflayers_cli.generation.stats import GenerationStats


@dataclass(frozen=True)
class GenerationResult:
    """A finished text, why it ended, and its statistics.

    Attributes:
        text: without end tokens and stop strings; empty where there is no tokenizer.
        token_ids: the tokens generated, an end token included.
        finish_reason: "stop": an end token or stop string; "length": the token budget;
            "interrupted": it was cancelled.
        prompt_tokens: the prompt's length.
        stats: of decoding.
        cached_prompt_tokens: prompt tokens that were in the cache already.
        cache_bytes: memory of the keys and values; of a batch all of it.
        seed: that its tokens were sampled with; None: greedy.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | Literal["interrupted"]
    prompt_tokens: int
    stats: GenerationStats
    cached_prompt_tokens: int = 0
    cache_bytes: int = 0
    seed: int | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "seed": self.seed,
            "stats": self.stats.as_json(),
        }


Answer = GenerationResult
"""Its old name in the Python API."""


@dataclass(frozen=True)
class GenerationResponse:
    """The outcome of one step for one request.

    Attributes:
        number: the request's index in `TextGenerator.stream`, or what `TextGenerator.add` returned.
        text: the newly certain text, possibly empty; the pieces add up to the whole text.
        step: tokens, drafts, seconds; None: the request was cancelled.
        result: with a request's last response; None before.
        pieces: the parts of the text that the step's tokens made certain, one for each; the last
            response's last one has what was held back, too.
    """

    number: int
    text: str
    step: Step | None
    result: GenerationResult | None = None
    pieces: tuple[str, ...] = ()
