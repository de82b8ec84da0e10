"""Prompts longer than a model's context, shortened until they fit.

A plain text loses its beginning: it is continued, so its end is what matters. In a chat the
template has to stay whole, and a question may stand before a document or behind it; so messages
lose their middle (as LongBench has it, arXiv 2308.14508 §4.1), the longest ones first, down to one
length that all keep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from conflayers_cli.errors import InputError
from conflayers_cli.generation.prompts import Prompt
from conflayers_cli.models.tokenization import TooLongError

GAP = " … "
"""What stands for the middle of a message that was left out."""


@dataclass(frozen=True)
class Fitted:
    """A prompt that fits: its tokens, and the texts that they are of."""

    tokens: list[int]
    prompt: Prompt


def fit(prompt: Prompt, encode: Callable[[Prompt], list[int]], most: int) -> Fitted:
    """Keep as much of a prompt as ``most`` tokens have room for.

    Args:
        prompt: a text loses its beginning, messages their middle.
        encode: gives a prompt's tokens, or raises a `TooLongError`.
        most: tokens, at least one.

    Raises:
        InputError: not even a character of each message has room, or as ``encode``.
    """

    def kept(characters: int) -> Fitted | None:
        shorter = cut(prompt, characters)
        try:
            tokens = encode(shorter)
        except TooLongError:
            return None
        return Fitted(tokens, shorter) if len(tokens) <= most else None

    longest = max(map(len, texts_of(prompt)))
    if found := kept(longest):
        return found
    found = kept(1)
    if found is None:
        raise InputError(f"is too long: even without its text it has over {most:,} tokens")
    low, high = 1, longest  # characters that fit, and that don't
    step = 4 * most
    while low + step < high:  # near the answer first: the text may be of any length
        if (more := kept(low + step)) is None:
            high = low + step
            break
        low, found, step = low + step, more, 2 * step
    while high - low > 1 and most - len(found.tokens) > most // 256:
        middle = (low + high) // 2
        if more := kept(middle):
            low, found = middle, more
        else:
            high = middle
    return found


def cut(prompt: Prompt, characters: int) -> Prompt:
    """The prompt with so many characters of every text at the most."""
    if prompt.text is not None:
        return replace(prompt, text=prompt.text[-characters:])
    messages = tuple(
        replace(message, content=_without_middle(message.content, characters))
        for message in prompt.messages or ()
    )
    return replace(prompt, messages=messages)


def texts_of(prompt: Prompt) -> Sequence[str]:
    """All that a prompt says."""
    if prompt.text is not None:
        return (prompt.text,)
    return [message.content for message in prompt.messages or ()]


def _without_middle(text: str, characters: int) -> str:
    if len(text) <= characters:
        return text
    tail = characters // 2
    return text[: characters - tail] + GAP + (text[-tail:] if tail else "")
