"""What a native pass may begin with, and what it says of the next tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

MAX_TOP = 32
"""Most likely tokens that a pass can return."""


@dataclass(frozen=True)
class NativeChoice:
    """What a pass says of the next tokens, of the kept tokens of each sequence.

    Attributes:
        tokens: ``[B, keep]`` int64: the first of the highest logit; -1 where logits aren't finite.
        logits: ``[B, keep]`` float32: the highest.
        log_sum: ``[B, keep]`` float32: the logarithm of the sum of all logits' exponentials.
        top_tokens, top_logits: ``[B, keep, top]``: the most likely tokens, best first; equal ones
            by number.
    """

    tokens: torch.Tensor
    logits: torch.Tensor
    log_sum: torch.Tensor
    top_tokens: torch.Tensor
    top_logits: torch.Tensor

    @property
    def probs(self) -> torch.Tensor:
        """``[B, keep]`` float32: the probability of the first token; NaN where it is invalid."""
        return torch.exp(self.logits - self.log_sum)


@dataclass(frozen=True)
class Resume:
    """A pass that begins behind some sub-layers, and keeps hidden states for others to begin with.

    Sub-layers are counted attention, MLP by layer. States are ``[B, T, d]`` in the model's dtype.

    Attributes:
        states: for each sub-layer where to write the states that it begins with, if it runs; None:
            they aren't kept.
        begin: the first sub-layer that may run.
        entry: the states that it begins with; None at the first one of all.
    """

    states: Sequence[torch.Tensor | None]
    begin: int = 0
    entry: torch.Tensor | None = None
