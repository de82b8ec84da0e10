"""Prompts longer than a model's context, shortened until they fit.

A plain text loses its beginning: it is continued, so its end matters. Messages lose their middle
(as LongBench does, arXiv 2308.14508 §4.1), since a question may come before a document or after it;
the longest first, down to one length that all keep. The chat template stays whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from conflayers_cli.errors import InputError
from conflayers_cli.generation.prompts import Prompt
from conflayers_cli.models.tokenization import TooLongError

GAP = " … "
"""In place of the middle of a message."""


@dataclass(frozen=True)
class TruncatedPrompt:
    """A prompt that fits, and its tokens."""

    tokens: list[int]
    prompt: Prompt


def truncate_prompt(
    prompt: Prompt, encode: Callable[[Prompt], list[int]], limit: int
) -> TruncatedPrompt:
    """Keep as much of a prompt as fits into ``limit`` ≥ 1 tokens.

    ``encode`` gives a prompt's tokens, or raises a `TooLongError`. Raises InputError where not even
    a character of each message fits.
    """

    def attempt(characters: int) -> TruncatedPrompt | None:
        shorter = shorten(prompt, characters)
        try:
            tokens = encode(shorter)
        except TooLongError:
            return None
        return TruncatedPrompt(tokens, shorter) if len(tokens) <= limit else None

    longest = max(map(len, prompt_texts(prompt)))
    if best := attempt(longest):
        return best
    best = attempt(1)
    if best is None:
        raise InputError(f"is too long: even without its text it has over {limit:,} tokens")
    low, high = 1, longest  # characters that fit, and that don't
    step = 4 * limit
    while low + step < high:  # near the answer first: the text may be of any length
        if (more := attempt(low + step)) is None:
            high = low + step
            break
        low, best, step = low + step, more, 2 * step
    while high - low > 1 and limit - len(best.tokens) > limit // 256:
        middle = (low + high) // 2
        if more := attempt(middle):
            low, best = middle, more
        else:
            high = middle
    return best


def shorten(prompt: Prompt, characters: int) -> Prompt:
    """The prompt with at most so many characters of every text."""
    if prompt.text is not None:
        return replace(prompt, text=prompt.text[-characters:])
    tail = characters // 2

    def without_middle(text: str) -> str:
        if len(text) <= characters:
            return text
        return text[: characters - tail] + GAP + text[len(text) - tail :]

    messages = (
        replace(each, content=without_middle(each.content)) for each in prompt.messages or ()
    )
    return replace(prompt, messages=tuple(messages))


def prompt_texts(prompt: Prompt) -> list[str]:
    """All texts of a prompt."""
    if prompt.text is not None:
        return [prompt.text]
    return [message.content for message in prompt.messages or ()]
