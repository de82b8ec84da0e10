"""Matchness: how often a draft would choose the token that the model wrote (SWIFT, §4.1)."""

from __future__ import annotations

from typing import Protocol

import torch

from conflayers_cli.engine.argmax import INVALID_TOKEN, greedy_tokens
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.skip_plan import SkipPlan

LEAST_WINDOW = 16
"""Matchness over fewer tokens is mostly luck."""


class Passage(Protocol):
    """A text being decoded: a `Generation`, or what a drafter sees of one.

    Attributes:
        tokens: prompt and output; the last one is not in the cache yet.
        output: the tokens produced so far.
        cache: filled for all tokens but the last.
    """

    @property
    def tokens(self) -> list[int]: ...

    @property
    def output(self) -> list[int]: ...

    @property
    def cache(self) -> KVCache: ...


def window_of(passage: Passage, most: int) -> int:
    """How many of the last generated tokens matchness can be taken over; 0: too few.

    The pass writes its keys behind the text, so the cache needs as much room there.
    """
    room = passage.cache.capacity - (len(passage.tokens) - 1)
    window = min(most, len(passage.output) - 1, room)
    return window if window >= LEAST_WINDOW else 0


def matchness(decoder: Decoder, plan: SkipPlan, passage: Passage, window: int) -> float:
    """Share of the last ``window`` tokens that the draft, fed the one before each, would choose.

    One parallel pass under the plan. Every token sees the full model's keys of what precedes it
    and its own draft key, as the first token of a real draft would; the cache is left as it was.

    Args:
        decoder: the model.
        plan: what is left out.
        passage: the text.
        window: as `window_of` gives it, 1 at least.
    """
    tokens, device = passage.tokens, decoder.device
    filled = len(tokens) - 1
    start = filled - window
    fed = torch.tensor([tokens[start:filled]], device=device)
    following = torch.tensor(tokens[start + 1 :], device=device)
    positions = torch.arange(start, filled, device=device)[None]
    slots = torch.arange(filled, filled + window, device=device)[None]
    logits = decoder.forward(fed, positions, passage.cache, plan, slots=slots)[0]
    best = greedy_tokens(logits)
    read = torch.stack(
        [(best == following).double().mean(), (best == INVALID_TOKEN).any().double()]
    )
    share, spoilt = read.tolist()
    if spoilt:  # what is no number must not stay behind the text: masks hide numbers alone
        passage.cache.clear(filled, filled + window)
    return float(share)
