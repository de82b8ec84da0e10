"""Proposers for several rows, small enough to be seen through."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import Context, Draft


def assert_rows_are_fresh(decoder: Decoder, contexts: Sequence[Context]) -> None:
    """Every filled slot of every row holds what a full pass over its text would have put there."""
    for row, context in enumerate(contexts):
        filled = len(context.tokens) - 1
        fresh: KVCache = decoder.new_cache(filled)
        decoder.prefill(torch.tensor([context.tokens[:-1]]), fresh)
        for layer, expected in zip(context.cache.layers, fresh.layers, strict=True):
            for got, want in ((layer.keys, expected.keys), (layer.values, expected.values)):
                torch.testing.assert_close(
                    got[row, :, :filled], want[0, :, :filled], rtol=1e-5, atol=1e-5
                )


@dataclass
class Guesses:
    """Knows what comes next, and drafts as many of it as chance says, wrong ones among them.

    Attributes:
        texts: whole texts, further than they will be decoded.
        prompts: what each begins with, all different.
        seed: of chance.
        right: the share of tokens that are drafted right.
        check: look at the rows of the cache before every draft.
        seen: for every call, the lengths of the rows' texts and their limits.
    """

    texts: Sequence[Sequence[int]]
    prompts: Sequence[Sequence[int]]
    decoder: Decoder
    seed: int = 0
    right: float = 0.8
    check: bool = False
    name: str = "guesses"
    seen: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def propose_batch(self, contexts: Sequence[Context], limits: Sequence[int]) -> list[Draft]:
        if self.check:
            assert_rows_are_fresh(self.decoder, contexts)
        lengths = tuple(len(context.tokens) for context in contexts)
        self.seen.append((lengths, tuple(limits)))
        return [self._draft(*each) for each in zip(contexts, limits, strict=True)]

    def _draft(self, context: Context, limit: int) -> Draft:
        text = next(
            text
            for text, prompt in zip(self.texts, self.prompts, strict=True)
            if context.tokens[: len(prompt)] == list(prompt)
        )
        count = min(self._random.choice([0, 0, 1, 2, 3, 6]), limit)
        ahead = text[len(context.tokens) : len(context.tokens) + count]
        wrong = (self._random.random() >= self.right for _ in ahead)
        vocabulary = self.decoder.vocabulary
        return Draft(
            tuple((t + miss) % vocabulary for t, miss in zip(ahead, wrong, strict=False)),
            leaves=tuple((7,) for _ in ahead),  # which a batch does not verify
        )


@dataclass(frozen=True)
class SkipRows:
    """Drafts with a plan, all rows in step, in the cache that they share.

    A row of which nothing more is wanted runs its last token again, where it is.
    """

    decoder: Decoder
    plan: SkipPlan
    size: int
    name: str = "skip"

    def propose_batch(self, contexts: Sequence[Context], limits: Sequence[int]) -> list[Draft]:
        chains: list[list[int]] = [[] for _ in contexts]
        # The longest drafts differ from row to row.
        wanted = [min(limit, self.size + i % 2) for i, limit in enumerate(limits)]
        for _ in range(max(wanted)):
            own = [[*c.tokens, *chain] for c, chain in zip(contexts, chains, strict=True)]
            tokens = torch.tensor([text[-1:] for text in own])
            positions = torch.tensor([[len(text) - 1] for text in own])
            logits = self.decoder.forward(tokens, positions, contexts[0].cache, self.plan)
            for i, context in enumerate(contexts):
                if len(chains[i]) == wanted[i]:
                    continue
                many = logits[i].expand(len(chains[i]) + 1, -1)
                chosen = context.sampler.choose(many, len(context.tokens), chains[i])
                chains[i].append(chosen[-1])
        return [Draft(tuple(chain)) for chain in chains]
