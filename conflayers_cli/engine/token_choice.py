"""What a draft pass chooses, for several rows at once and with one read from the device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from conflayers_cli.engine.argmax import best_with_probability
from conflayers_cli.engine.sampler import Sampler


@dataclass(frozen=True)
class Choice:
    """A token, its draft probability, and the probabilities ``[V]`` where they are asked for.

    The draft probability is NaN where the logits are not numbers: then the token means nothing.
    """

    token: int
    confidence: float
    row: torch.Tensor | None = None

    @property
    def known(self) -> bool:
        """Whether the logits are numbers."""
        return not math.isnan(self.confidence)


@dataclass(frozen=True)
class Asked:
    """Choices wanted of one row.

    Attributes:
        row: its number in the pass.
        sampler: how its tokens are chosen.
        drafted: the tokens assumed behind its text.
        count: choices wanted: behind the last ``count − 1`` of these tokens and before them.
    """

    row: int
    sampler: Sampler
    drafted: Sequence[int]
    count: int


def choices(
    logits: torch.Tensor, asked: Sequence[Asked], *, rows: bool = False
) -> list[Iterator[Choice]]:
    """The choices of each row asked for, one after another: tokens are only sampled when taken.

    Args:
        logits: ``[B, W, V]``; a row's choices are made from its first columns.
        asked: what is wanted.
        rows: probabilities are wanted of greedy choices, too.
    """
    plain = [each for each in asked if each.sampler.settings.greedy and not each.sampler.penalises]
    if len(plain) == len(asked) and not rows:
        read = best_with_probability(logits).tolist()
        return [
            iter(
                [
                    Choice(int(token), confidence)
                    for token, confidence in zip(
                        read[0][each.row][: each.count], read[1][each.row], strict=False
                    )
                ]
            )
            for each in asked
        ]
    return [_one_row(logits[each.row, : each.count], each, rows) for each in asked]


def _one_row(logits: torch.Tensor, asked: Asked, rows: bool) -> Iterator[Choice]:
    """From the logits ``[count, V]``."""
    sampler, drafted = asked.sampler, asked.drafted
    if sampler.penalises:  # each row has seen the tokens before it; those before the first are
        first = logits[:1].expand(len(drafted) + 1 - asked.count, -1)  # only counted
        logits = torch.cat([first, logits])
    else:
        drafted = ()
    if not sampler.settings.greedy:
        for q in sampler.distribution(logits, drafted)[-asked.count :]:
            token = sampler.draw(q)
            yield Choice(token, float(q[token]), q)
        return
    probabilities = torch.softmax(sampler.scores(logits, drafted)[-asked.count :].float(), dim=-1)
    best, tokens = probabilities.max(dim=-1)
    for i, (token, confidence) in enumerate(zip(tokens.tolist(), best.tolist(), strict=True)):
        yield Choice(token, confidence, probabilities[i] if rows else None)
