"""The tokens that a draft pass chooses, of several sequences with one read from the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from conflayers_cli.engine.argmax import INVALID_TOKEN, read_greedy
from conflayers_cli.engine.sampler import Sampler


@dataclass(frozen=True)
class TokenChoice:
    """A token, how sure the choice is, and the tokens that came next.

    Attributes:
        token: the draft's choice; means nothing where the logits are not finite.
        confidence: ``1 / (1 + exp(-margin))`` of the margin by which the token is ahead of the
            second one: of its logit, or of what the race compares where tokens are sampled. So from
            0.5 to 1; NaN where the logits are not finite. It tells more about a draft's fate than
            the token's probability does.
        share: of the token among those named; 1 where no others are asked for.
        others: further tokens and their shares, best first, if asked for (`Sampler.candidates`).
    """

    token: int
    confidence: float
    share: float = 1.0
    others: tuple[tuple[int, float], ...] = ()

    @property
    def is_valid(self) -> bool:
        """Whether the logits are finite."""
        return not math.isnan(self.confidence)

    @classmethod
    def of(cls, candidates: Sequence[tuple[int, float]]) -> TokenChoice:
        """From `Sampler.candidates` of a row."""
        if not candidates:
            return cls(INVALID_TOKEN, math.nan)
        (token, share), *others = candidates
        second = others[0][1] if others else 0.0
        return cls(token, share / (share + second), share, tuple(others))


@dataclass(frozen=True)
class TokenRequest:
    """The tokens to choose for one sequence.

    Attributes:
        index: the sequence's index in the pass.
        sampler: how its tokens are chosen.
        length: of its text.
        drafted: the tokens assumed after the text.
        count: tokens to choose: after the last ``count - 1`` of the drafted ones and before them.
    """

    index: int
    sampler: Sampler
    length: int
    drafted: Sequence[int]
    count: int


def choose_tokens(
    logits: torch.Tensor, requests: Sequence[TokenRequest], *, others: int = 0
) -> list[list[TokenChoice]]:
    """Choices of each request from logits ``[B, W, V]``, of which it uses the first ``count``.

    ``others``: how many further tokens are named beside each.
    """
    if not others and all(request.sampler.takes_best for request in requests):
        return greedy_choices(read_greedy(logits), requests)
    return [_choose(logits[each.index, : each.count], each, max(others, 1)) for each in requests]


def greedy_choices(
    found: torch.Tensor, requests: Sequence[TokenRequest]
) -> list[list[TokenChoice]]:
    """Choices of each request from what `argmax.read_greedy` gives, ``[2, B, W]``."""
    tokens, confidences = found.tolist()
    return [
        [
            TokenChoice(int(token), confidence)
            for token, confidence in zip(
                tokens[request.index][: request.count], confidences[request.index], strict=False
            )
        ]
        for request in requests
    ]


def _choose(logits: torch.Tensor, request: TokenRequest, others: int) -> list[TokenChoice]:
    """From the logits ``[count, V]``."""
    sampler, drafted = request.sampler, request.drafted
    if sampler.has_penalty:  # the penalty needs a row per drafted token; those before are dropped
        before = logits[:1].expand(len(drafted) + 1 - request.count, -1)
        logits = sampler.scores(torch.cat([before, logits]), drafted)[-request.count :]
    begin = request.length + len(drafted) + 1 - request.count
    positions = range(begin, begin + request.count)
    return [TokenChoice.of(each) for each in sampler.candidates(logits, positions, others + 1)]
