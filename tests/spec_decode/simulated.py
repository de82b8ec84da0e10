"""Decoding simulated: texts, drafts that are right by a law written down, and costs that are known.

What the policy decides is then judged by the seconds that it really takes, with no model and no
clock. A draft's token for a place is right or wrong, and as sure, whatever it is drafted behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from conflayers_cli.engine.argmax import read_greedy
from conflayers_cli.engine.cost_model import CostTable, PassCosts
from conflayers_cli.engine.sampler import Sampler
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.mixed import MixedProposer
from conflayers_cli.spec_decode.proposer import Context

VOCABULARY = 64
PLAN = SkipPlan.of_layers([1])
CPU = torch.device("cpu")
PROMPT = 8


def costs(draft: float, slope: float, steps: Sequence[tuple[int, float]] = ()) -> CostTable:
    """A pass of one token takes a second; one of drafting ``draft``; each further token ``slope``.

    ``steps``: widths from which on a pass takes so much more.
    """
    widths = range(1, 64)
    verify = {
        width: 1.0 + slope * (width - 1) + sum(more for start, more in steps if width >= start)
        for width in widths
    }
    one = PassCosts(verify, floor=draft, attention=0.0, mlp=0.0, context=64)
    return CostTable({1: one}, depth=3)


@dataclass
class Text:
    """A text to come, what the skipped model would draft for each of its places, and how surely."""

    tokens: list[int]
    right: list[bool]
    confidence: list[float]

    def draft(self, place: int) -> int:
        return (self.tokens[place] + (not self.right[place])) % VOCABULARY


def random_text(
    length: int, draw: Callable[[torch.Generator], Iterable[tuple[bool, float]]], seed: int = 0
) -> Text:
    """Tokens that repeat themselves only by chance, drafted as ``draw`` says, place by place."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (length,), generator=generator).tolist()
    drawn = [each for each, _ in zip(draw(generator), range(length), strict=False)]
    return Text(tokens, [right for right, _ in drawn], [sure for _, sure in drawn])


def independent(chance: float, sure: float = 0.65) -> Callable[..., Iterable[tuple[bool, float]]]:
    """Right with one chance everywhere; ``sure``, over a half, is the draft's confidence."""

    def draw(generator: torch.Generator) -> Iterable[tuple[bool, float]]:
        while True:
            yield float(torch.rand((), generator=generator)) < chance, sure

    return draw


@dataclass
class Model:
    """Stands for the decoder: gives the draft's logits, counts the passes' widths."""

    texts: list[Text]
    device: torch.device = CPU
    widths: list[int] = field(default_factory=list)

    def decode_ahead(self, token: int, position: int, cache: object, plan: SkipPlan) -> None:
        """Passes are run one by one here."""

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, cache: object, plan: SkipPlan
    ) -> torch.Tensor:
        assert plan == PLAN
        self.widths.append(tokens.shape[1])
        logits = torch.empty(*tokens.shape, VOCABULARY)
        for row, (text, places) in enumerate(zip(self.texts, positions.tolist(), strict=True)):
            for column, place in enumerate(places):
                coming = min(place + 1, len(text.tokens) - 1)  # rows at their end run along
                sure = text.confidence[coming]
                drafted = text.draft(coming)
                logits[row, column] = -50.0
                logits[row, column, drafted - 1] = torch.tensor(1 - sure).log()
                logits[row, column, drafted] = torch.tensor(sure).log()
        return logits

    def greedy_with_confidence(
        self, tokens: torch.Tensor, positions: torch.Tensor, cache: object, plan: SkipPlan
    ) -> torch.Tensor:
        return read_greedy(self.forward(tokens, positions, cache, plan))


@dataclass
class Run:
    """Seconds, by the tokens decided so far: ``at[i]`` when i tokens per row were."""

    at: list[float]

    def rate(self, begin: int = 0, end: int = -1) -> float:
        """Tokens per second and row between two counts of tokens."""
        end = len(self.at) - 1 if end < 0 else end
        return (end - begin) / (self.at[end] - self.at[begin])


def decode(table: CostTable, text: Text, proposer: MixedProposer, model: Model) -> Run:
    """Decode a text to its end, one row."""
    return decode_rows(table, [text], proposer, model)


def decode_rows(
    table: CostTable, texts: Sequence[Text], proposer: MixedProposer, model: Model
) -> Run:
    """Decode several at once, rows that have come to the end waiting for the others."""
    sampler = Sampler(SamplingParams(), VOCABULARY, CPU)
    known = [text.tokens[:PROMPT] for text in texts]
    cache: Any = None
    price = table.at(len(texts), 64)
    draft = price.draft_cost(PLAN, table.depth)
    seconds, at = 0.0, [0.0]
    while any(len(own) < len(text.tokens) for own, text in zip(known, texts, strict=True)):
        model.widths.clear()
        contexts = [Context(own, cache, sampler) for own in known]
        limits = [
            max(len(text.tokens) - len(own) - 1, 0) for own, text in zip(known, texts, strict=True)
        ]
        drafts = proposer.propose_batch(contexts, limits)
        width = 1 + max(len(each.tokens) for each in drafts)
        for pass_ in model.widths:
            seconds += draft * price.verify_cost(pass_) / price.verify_cost(1)
        seconds += price.verify_cost(width)
        for own, text, each in zip(known, texts, drafts, strict=True):
            kept, coming = 0, text.tokens[len(own) :]
            while kept < len(each.tokens) and each.tokens[kept] == coming[kept]:
                kept += 1
            own += coming[: kept + 1]
        least = min(map(len, known)) - PROMPT
        at += [seconds] * (least + 1 - len(at))
    return Run(at)


def fixed_rate(table: CostTable, text: Text, most: int, stop: float = 0.0) -> float:
    """Tokens per second with drafts of one length, or that stop behind the first unsure token."""
    price = table.at(1, 64)
    draft = price.draft_cost(PLAN, table.depth)
    place, seconds = PROMPT, 0.0
    while place < len(text.tokens):
        room = min(most, len(text.tokens) - place - 1)
        length = room
        for ahead in range(room):
            if text.confidence[place + ahead] < stop:
                length = ahead + 1
                break
        kept = 0
        while kept < length and text.right[place + kept]:
            kept += 1
        seconds += length * draft + price.verify_cost(1 + length)
        place += kept + 1
    return (len(text.tokens) - PROMPT) / seconds
