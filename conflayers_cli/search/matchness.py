"""Matchness: share of tokens that a draft would choose as the model did (SWIFT, §4.1)."""

from __future__ import annotations

from typing import Protocol

import torch

from conflayers_cli.engine.argmax import INVALID_TOKEN, greedy_tokens
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.skip_plan import SkipPlan

MIN_WINDOW = 16  # matchness over fewer tokens is mostly luck


class SequenceView(Protocol):
    """A sequence being decoded, as searches read it.

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


def window_size(sequence: SequenceView, max_size: int) -> int:
    """Number of last generated tokens that matchness can be taken over; 0: too few.

    The pass writes its keys behind the sequence, so the cache needs as many free slots there.
    """
    free_slots = sequence.cache.capacity - (len(sequence.tokens) - 1)
    window = min(max_size, len(sequence.output) - 1, free_slots)
    return window if window >= MIN_WINDOW else 0


def matchness(decoder: Decoder, plan: SkipPlan, sequence: SequenceView, window: int) -> float:
    """Share of the last ``window`` tokens (see `window_size`) that the draft would choose.

    One parallel pass under the plan. Every token sees the full model's keys of what precedes it
    and its own draft key, as the first token of a real draft would; the cache is left as it was.
    """
    tokens, device = sequence.tokens, decoder.device
    filled = len(tokens) - 1
    start = filled - window
    input_ids = torch.tensor([tokens[start:filled]], device=device)
    following = torch.tensor(tokens[start + 1 :], device=device)
    positions = torch.arange(start, filled, device=device)[None]
    slots = positions + window
    chosen = greedy_tokens(
        decoder.forward(input_ids, positions, sequence.cache, plan, slots=slots)[0]
    )
    share, invalid = torch.stack(
        [(chosen == following).double().mean(), (chosen == INVALID_TOKEN).any().double()]
    ).tolist()
    if invalid:  # NaN must not stay behind the sequence: masks hide only finite numbers
        sequence.cache.clear(filled, filled + window)
    return float(share)
