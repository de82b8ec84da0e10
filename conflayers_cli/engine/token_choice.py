"""The tokens that a draft pass chooses, of several sequences with one read from the device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from conflayers_cli.engine.argmax import greedy_with_prob
from conflayers_cli.engine.sampler import Sampler


@dataclass(frozen=True)
class TokenChoice:
    """A token, its draft probability, and the probabilities ``[V]`` where they are asked for.

    The draft probability is NaN where the logits are not finite: then the token means nothing.
    """

    token: int
    confidence: float
    probs: torch.Tensor | None = None

    @property
    def is_valid(self) -> bool:
        """Whether the logits are finite."""
        return not math.isnan(self.confidence)


@dataclass(frozen=True)
class TokenRequest:
    """The tokens to choose for one sequence.

    Attributes:
        index: the sequence's index in the pass.
        sampler: how its tokens are chosen.
        drafted: the tokens assumed after its text.
        count: tokens to choose: after the last ``count - 1`` of the drafted ones and before them.
    """

    index: int
    sampler: Sampler
    drafted: Sequence[int]
    count: int


def choose_tokens(
    logits: torch.Tensor, requests: Sequence[TokenRequest], *, with_probs: bool = False
) -> list[Iterator[TokenChoice]]:
    """Choices of each request from logits ``[B, W, V]``, of which it uses the first ``count``.

    Tokens are only sampled when taken. ``with_probs``: greedy choices have probabilities, too.
    """
    samplers = [request.sampler for request in requests]
    if not with_probs and all(s.settings.greedy and not s.has_penalty for s in samplers):
        tokens, confidences = greedy_with_prob(logits).tolist()
        return [
            (
                TokenChoice(int(token), confidence)
                for token, confidence in zip(
                    tokens[request.index][: request.count], confidences[request.index], strict=False
                )
            )
            for request in requests
        ]
    return [_choose(logits[each.index, : each.count], each, with_probs) for each in requests]


def _choose(logits: torch.Tensor, request: TokenRequest, with_probs: bool) -> Iterator[TokenChoice]:
    """From the logits ``[count, V]``."""
    sampler, drafted = request.sampler, request.drafted
    if sampler.has_penalty:  # the penalty needs a row per drafted token; those before are dropped
        before = logits[:1].expand(len(drafted) + 1 - request.count, -1)
        logits = torch.cat([before, logits])
    else:
        drafted = ()
    if not sampler.settings.greedy:
        for probs in sampler.distribution(logits, drafted)[-request.count :]:
            token = sampler.draw(probs)
            yield TokenChoice(token, float(probs[token]), probs)
        return
    all_probs = torch.softmax(sampler.scores(logits, drafted)[-request.count :].float(), dim=-1)
    best, tokens = all_probs.max(dim=-1)
    for i, (token, confidence) in enumerate(zip(tokens.tolist(), best.tolist(), strict=True)):
        yield TokenChoice(token, confidence, all_probs[i] if with_probs else None)
