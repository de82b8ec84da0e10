"""Proposers: draft the next few tokens cheaply. Any draft is right: it decides the speed alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.race import scale
from conflayers_cli.engine.sampler import Sampler
from conflayers_cli.engine.token_choice import TokenChoice, TokenRequest, choose_tokens
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.draft_store import DraftStore
from conflayers_cli.spec_decode.tree import TreeShape, VerifyCost, leaf_counts


@dataclass(frozen=True)
class Draft:
    """Drafted tokens and where they came from: a chain, perhaps with leaves beside it.

    Attributes:
        tokens: γ token ids, possibly none.
        leaves: for each token other candidates for its position; empty: none.
        sources: for each token who drafted it ("skip", "ngram", "store": earlier texts); empty: the
            proposer's name holds for all.

    Raises:
        ValueError: leaves or sources without an entry for each token.
    """

    tokens: tuple[int, ...] = ()
    leaves: tuple[tuple[int, ...], ...] = ()
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what, entries in (("sets of leaves", self.leaves), ("sources", self.sources)):
            if entries and len(entries) != len(self.tokens):
                raise ValueError(f"{len(entries)} {what} for {len(self.tokens)} tokens")

    @property
    def nodes(self) -> tuple[int, ...]:
        """All tokens to be verified: the chain's, then the leaves, position by position.

        Node i is row i + 1 of the full pass; row 0 is the pending token.
        """
        return (*self.tokens, *(leaf for side in self.leaves for leaf in side))

    @property
    def parents(self) -> tuple[int, ...]:
        """For each node the row before it."""
        beside = (row for row, side in enumerate(self.leaves) for _ in side)
        return (*range(len(self.tokens)), *beside)

    @property
    def width(self) -> int:
        """How many nodes there are."""
        return len(self.tokens) + sum(map(len, self.leaves))

    def follow(self, chosen: Sequence[int]) -> tuple[int, int]:
        """How far the full model's choices follow the draft.

        Args:
            chosen: its choice at each row: behind the text, behind each drafted token, and behind
                each leaf, position by position; `INVALID_TOKEN` where it has none, and no drafted
                token is accepted.

        Returns:
            (row, token): the last row accepted, and the model's choice there, which may be
            `INVALID_TOKEN`. Row k ≤ γ: the first k drafted tokens are the model's choices. A row
            beyond: a leaf is, and the drafted tokens before it.
        """
        row = 0
        while (following := self.next_row(row, chosen[row])) is not None:
            row = following
        return row, chosen[row]

    def next_row(self, row: int, token: int) -> int | None:
        """The row behind a token that was drafted at ``row``; None: it was not."""
        if row >= len(self.tokens):
            return None
        if self.tokens[row] == token:
            return row + 1
        if self.leaves and token in self.leaves[row]:
            before = sum(map(len, self.leaves[:row])) + self.leaves[row].index(token)
            return len(self.tokens) + 1 + before
        return None


NO_DRAFT = Draft()


@dataclass(frozen=True)
class Context:
    """What a proposer is given: the text so far and its KV cache.

    Attributes:
        tokens: prompt and output; the cache holds all but the last one.
        cache: keys and values.
        sampler: how tokens are chosen.
        end_tokens: ids that end the output; nothing is drafted behind one.
        prediction: tokens that the text may go on with, in order; n-grams draft from them, too.
        store: of earlier texts that n-grams draft from, too; None: there are none.
    """

    tokens: list[int]
    cache: KVCache
    sampler: Sampler
    end_tokens: frozenset[int] = frozenset()
    prediction: tuple[int, ...] = ()
    store: DraftStore | None = None


class Proposer(Protocol):
    """Drafts up to ``limit`` ≥ 1 tokens. May write to the cache behind the tokens it holds."""

    @property
    def name(self) -> str: ...

    def propose(self, context: Context, limit: int) -> Draft: ...


@runtime_checkable
class BatchProposer(Protocol):
    """Drafts up to ``limits[i]`` ≥ 0 tokens for sequence i, which is row i of a shared cache."""

    @property
    def name(self) -> str: ...

    def propose_batch(self, contexts: Sequence[Context], limits: Sequence[int]) -> list[Draft]: ...


@dataclass(frozen=True)
class SkipProposer:
    """Drafts with the model itself, some sub-layers left out: a chain, or a tree.

    Source: Draft & Verify, arXiv 2309.08168 §3; the stop rule as in SWIFT, arXiv 2410.06916 §4.2;
    the tree as in :mod:`.tree`.

    Attributes:
        decoder: the model.
        plan: what is left out.
        max_tokens: the most tokens drafted at once.
        stop_probability: the chain ends after the first token whose draft probability is lower
            (after the temperature, before top-k and the like); 0 never stops early.
        tree: how many leaves are wanted beside each token; None drafts a chain.
        verify_cost: only leaves worth their cost are drafted; None: all that are wanted.
        draft_seconds: of drafting one token, for the same decision.
    """

    decoder: Decoder
    plan: SkipPlan
    max_tokens: int = 25
    stop_probability: float = 0.8
    tree: TreeShape | None = None
    verify_cost: VerifyCost | None = None
    draft_seconds: float = 0.0

    @property
    def name(self) -> str:
        return "skip"

    def propose(self, context: Context, limit: int) -> Draft:
        sampler, token, length = context.sampler, context.tokens[-1], len(context.tokens)
        choices: list[TokenChoice] = []
        others = self.tree.max_leaves if self.tree else 0
        while len(choices) < min(limit, self.max_tokens):
            position = length - 1 + len(choices)
            logits = self.decoder.forward(
                torch.tensor([[token]]), torch.tensor([[position]]), context.cache, self.plan
            )
            drafted = [choice.token for choice in choices]
            asked = TokenRequest(0, sampler, length, drafted, 1)
            ((choice,),) = choose_tokens(logits, [asked], others=others)
            if not choice.is_valid:
                context.cache.clear(position, position + 1)
                break
            choices.append(choice)
            token = choice.token
            if token in context.end_tokens or (
                self.stop_probability > 0
                and self._probability(logits, drafted, token, sampler) < self.stop_probability
            ):
                break
        drafted = [choice.token for choice in choices]
        if self.tree is None or not choices:
            return Draft(tuple(drafted))
        leaves = propose_leaves(
            self.decoder,
            context,
            [choice.share for choice in choices],
            [choice.others for choice in choices],
            self.tree,
            self.verify_cost,
            self.draft_seconds,
        )
        return Draft(tuple(drafted), leaves)

    @staticmethod
    def _probability(
        logits: torch.Tensor, drafted: Sequence[int], token: int, sampler: Sampler
    ) -> float:
        """The draft's probability of a token by the logits ``[1, 1, V]`` behind drafted ones."""
        rows = logits[0].expand(len(drafted) + 1 if sampler.has_penalty else 1, -1)
        scores = sampler.scores(rows, drafted if sampler.has_penalty else ())[-1].float()
        if not sampler.settings.greedy:
            scores = (scores - scores.max()) / scale(sampler.settings.temperature)
        return float(torch.exp(scores[token] - torch.logsumexp(scores, 0)))


def propose_leaves(
    decoder: Decoder,
    context: Context,
    shares: Sequence[float],
    others: Sequence[Sequence[tuple[int, float]]],
    tree: TreeShape,
    verify_cost: VerifyCost | None,
    draft_seconds: float,
) -> tuple[tuple[int, ...], ...]:
    """The leaves beside γ drafted tokens, as far as the cache has slots.

    ``shares``: of the drafted tokens; ``others``: for each other tokens and their shares, falling.
    Other arguments as of `.tree.leaf_counts`.
    """
    counts = leaf_counts(
        shares,
        [[share for _, share in each] for each in others],
        tree,
        verify_cost,
        draft_seconds,
        max_leaves=context.cache.capacity - len(context.tokens) - len(shares),
        only_draft=decoder.invariance.depends_on_slot,
    )
    return tuple(
        tuple(token for token, _ in each[:count])
        for each, count in zip(others, counts, strict=True)
    )
