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
        leaves: for each token other candidates for its position, in the order in which they are
            tried, drawn from the same q without replacement where there is one; empty: none.
        sources: for each token who drafted it ("skip", "ngram"); empty: the proposer's name holds
            for all.

    Raises:
        ValueError: leaves or sources without an entry for each token.
    """

    tokens: tuple[int, ...] = ()
    distribution: torch.Tensor | None = None
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


NO_DRAFT = Draft()


@dataclass(frozen=True)
class Context:
    """What a proposer is given: the text so far and its KV cache.

    Attributes:
        tokens: prompt and output; the cache holds all but the last one.
        cache: keys and values.
        sampler: how tokens are chosen.
        end_tokens: ids that end the output; nothing is drafted behind one.
    """

    tokens: list[int]
    cache: KVCache
    sampler: Sampler
    end_tokens: frozenset[int] = frozenset()


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
        stop_probability: the chain ends after the first token whose draft probability is lower;
            0 never stops early.
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
        sampler, token, position = context.sampler, context.tokens[-1], len(context.tokens) - 1
        drafted: list[int] = []
        probs: list[torch.Tensor] = []
        while len(drafted) < min(limit, self.max_tokens):
            logits = self.decoder.forward(
                torch.tensor([[token]]), torch.tensor([[position]]), context.cache, self.plan
            )
            token, probability, distribution = self._choose(logits[0], drafted, sampler)
            if token == INVALID_TOKEN:
                context.cache.clear(position, position + 1)
                break
            drafted.append(token)
            if distribution is not None:
                probs.append(distribution)
            if probability < self.stop_probability or token in context.end_tokens:
                break
            position += 1
        if not probs:
            return Draft(tuple(drafted))
        q = torch.stack(probs)
        leaves = propose_leaves(
            self.decoder, context, drafted, q, self.tree, self.verify_cost, self.draft_seconds
        )
        return Draft(tuple(drafted), None if sampler.settings.greedy else q, leaves)

    def _choose(
        self, logits: torch.Tensor, drafted: list[int], sampler: Sampler
    ) -> tuple[int, float, torch.Tensor | None]:
        """(token, its draft probability, probabilities ``[V]``) from the logits ``[1, V]``.

        The probabilities of all tokens only for sampling and for leaves; else None. The token is
        `INVALID_TOKEN` where the logits are NaN or infinite.
        """
        penalised = drafted if sampler.has_penalty else []
        many = logits.expand(len(penalised) + 1, -1)
        if not sampler.settings.greedy:
            q = sampler.distribution(many, penalised)[-1]
            token = sampler.draw(q)
            return token, float(q[token]), q
        scores = sampler.scores(many, penalised)[-1]
        token = int(greedy_tokens(scores))
        if token == INVALID_TOKEN:
            return token, 0.0, None
        if self.tree is not None:
            q = torch.softmax(scores.float(), dim=-1)
            return token, float(q[token]), q
        if self.stop_probability <= 0:
            return token, 1.0, None
        scores = scores.float()
        return token, float(torch.exp(scores[token] - torch.logsumexp(scores, 0))), None


def propose_leaves(
    decoder: Decoder,
    context: Context,
    drafted: Sequence[int],
    probs: torch.Tensor,
    tree: TreeShape | None,
    verify_cost: VerifyCost | None,
    draft_seconds: float,
) -> tuple[tuple[int, ...], ...]:
    """`.tree.leaves_beside` a chain, as far as the cache has slots; ``probs`` are ``[γ, V]``."""
    if tree is None:
        return ()
    return leaves_beside(
        drafted,
        probs,
        context.sampler,
        tree,
        verify_cost,
        draft_seconds,
        max_leaves=context.cache.capacity - len(context.tokens) - len(drafted),
        only_draft=context.sampler.settings.greedy and decoder.invariance.bitwise,
    )
