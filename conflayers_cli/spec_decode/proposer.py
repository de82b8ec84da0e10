"""Proposers: draft the next few tokens cheaply, and say what distribution they came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from conflayers_cli.engine.argmax import INVALID_TOKEN, greedy_tokens
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.sampler import Sampler
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.tree import TreeShape, VerifyCost, leaves_beside


@dataclass(frozen=True)
class Draft:
    """Drafted tokens and where they came from: a chain, perhaps with leaves beside it.

    Attributes:
        tokens: γ token ids, possibly none.
        distribution: q, float32 ``[γ, V]``, where they were sampled; None where each was certain
            (greedy), which acceptance treats as q = 1 at the token.
        leaves: for each token other candidates for its place, in the order in which they are tried,
            drawn from the same q without replacement where there is one; empty: none anywhere.
        sources: for each token who drafted it, where a proposer has several ways ("skip",
            "ngram"); empty: the proposer's name holds for all.

    Raises:
        ValueError: there are leaves or sources, but not an entry for each token.
    """

    tokens: tuple[int, ...] = ()
    distribution: torch.Tensor | None = None
    leaves: tuple[tuple[int, ...], ...] = ()
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.leaves and len(self.leaves) != len(self.tokens):
            raise ValueError(f"{len(self.leaves)} sets of leaves for {len(self.tokens)} tokens")
        if self.sources and len(self.sources) != len(self.tokens):
            raise ValueError(f"{len(self.sources)} sources for {len(self.tokens)} tokens")

    @property
    def nodes(self) -> tuple[int, ...]:
        """All tokens to be verified: the chain's, then the leaves, position by position.

        Node i is row i + 1 of the pass that verifies them; row 0 is the pending token.
        """
        return (*self.tokens, *(leaf for side in self.leaves for leaf in side))

    @property
    def parents(self) -> tuple[int, ...]:
        """For each node the row that it stands behind."""
        beside = (row for row, side in enumerate(self.leaves) for _ in side)
        return (*range(len(self.tokens)), *beside)

    @property
    def width(self) -> int:
        """How many nodes there are."""
        return len(self.tokens) + sum(map(len, self.leaves))


@dataclass(frozen=True)
class Context:
    """What a proposer is given: the text so far and its KV cache.

    Attributes:
        tokens: prompt and output; the last one is not in the cache yet.
        cache: filled for all tokens but the last.
        sampler: how tokens are chosen.
        end_tokens: ids that end the output; nothing needs to be drafted behind one.
    """

    tokens: list[int]
    cache: KVCache
    sampler: Sampler
    end_tokens: frozenset[int] = frozenset()


class Proposer(Protocol):
    """Drafts up to ``limit`` tokens (≥ 1). May write to the cache behind the filled part."""

    @property
    def name(self) -> str: ...

    def propose(self, context: Context, limit: int) -> Draft: ...


@runtime_checkable
class BatchProposer(Protocol):
    """Drafts for several sequences at once, which share one cache; contexts[i] is its row i.

    Sequence i gets up to ``limits[i]`` tokens, with a limit of 0 none. May write to the cache
    behind the filled part of every row.
    """

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
        stop_probability: the chain ends after the first token whose draft probability is lower;
            0 never stops early.
        tree: how many leaves are wanted beside each token; None drafts a chain.
        verify_cost: seconds of a full pass by its number of tokens: only leaves that are worth
            their cost are drafted; None: all that are wanted.
        draft_seconds: what drafting one token takes, for the same decision.
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
        sampler = context.sampler
        filled = len(context.tokens) - 1
        token = torch.tensor([[context.tokens[-1]]])
        position = torch.tensor([[filled]])
        drafted: list[int] = []
        probs: list[torch.Tensor] = []
        for _ in range(min(limit, self.max_tokens)):
            logits = self.decoder.forward(token, position, context.cache, self.plan)[0]
            chosen, probability, row = self._choose(logits, drafted, sampler)
            if chosen == INVALID_TOKEN:
                at = filled + len(drafted)
                context.cache.clear(at, at + 1)
                break
            drafted.append(chosen)
            if row is not None:
                probs.append(row)
            if probability < self.stop_probability or chosen in context.end_tokens:
                break
            token = torch.tensor([[chosen]])
            position = position + 1
        if not probs:
            return Draft(tuple(drafted))
        probabilities = torch.stack(probs)
        q = None if sampler.settings.greedy else probabilities
        leaves: tuple[tuple[int, ...], ...] = ()
        if self.tree is not None:
            leaves = leaves_of(
                self.decoder,
                context,
                drafted,
                probabilities,
                self.tree,
                verify_cost=self.verify_cost,
                draft_seconds=self.draft_seconds,
            )
        return Draft(tuple(drafted), q, leaves)

    def _choose(
        self, logits: torch.Tensor, drafted: list[int], sampler: Sampler
    ) -> tuple[int, float, torch.Tensor | None]:
        """(token, its draft probability, probabilities ``[V]``) from the logits ``[1, V]``.

        The probabilities of all tokens only for sampling and for leaves; else None. The token is
        `INVALID_TOKEN` where the logits are NaN or infinite.
        """
        if sampler.settings.greedy:
            scores = _last_row(sampler, logits, drafted)
            token = int(greedy_tokens(scores))
            if token == INVALID_TOKEN:
                return token, 0.0, None
            if self.tree is not None:
                row = torch.softmax(scores.float(), dim=-1)
                return token, float(row[token]), row
            if self.stop_probability <= 0:
                return token, 1.0, None
            scores = scores.float()
            return token, float(torch.exp(scores[token] - torch.logsumexp(scores, 0))), None
        many = logits.expand(len(drafted) + 1, -1) if sampler.penalises else logits
        q = sampler.distribution(many, drafted)[-1]
        token = sampler.draw(q)
        return token, float(q[token]), q


def leaves_of(
    decoder: Decoder,
    context: Context,
    drafted: Sequence[int],
    probabilities: torch.Tensor,
    tree: TreeShape,
    *,
    verify_cost: VerifyCost | None,
    draft_seconds: float,
) -> tuple[tuple[int, ...], ...]:
    """The leaves beside a chain (see `.tree.leaves_beside`), as far as the cache has room.

    Each leaf needs a slot behind the chain. ``probabilities`` are the draft's, ``[γ, V]``.
    """
    return leaves_beside(
        drafted,
        probabilities,
        context.sampler,
        tree,
        verify_cost,
        draft_seconds,
        room=context.cache.capacity - len(context.tokens) - len(drafted),
        only_draft=context.sampler.settings.greedy and decoder.invariance.bitwise,
    )


def _last_row(sampler: Sampler, logits: torch.Tensor, drafted: list[int]) -> torch.Tensor:
    """Scores ``[V]`` of the position behind all drafted tokens."""
    if not sampler.penalises:
        return logits[-1]
    return sampler.scores(logits.expand(len(drafted) + 1, -1), drafted)[-1]
