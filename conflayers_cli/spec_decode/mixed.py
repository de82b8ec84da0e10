"""Drafts by n-gram matches and by the skipped model, each where it pays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from conflayers_cli.engine.async_decode import AsyncDecode
from conflayers_cli.engine.cost_model import CostTable
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.token_choice import Asked, Choice, choices
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.acceptance import NO_UPDATE, agreeing, disagreeing
from conflayers_cli.spec_decode.draft_chain import DraftChain
from conflayers_cli.spec_decode.draft_length import DraftLengthPolicy
from conflayers_cli.spec_decode.history import SequenceHistories, SequenceHistory
from conflayers_cli.spec_decode.ngram import NO_MATCH, Match
from conflayers_cli.spec_decode.proposer import Context, Draft, leaves_of
from conflayers_cli.spec_decode.tree import TreeShape

MIN_COMPARED = 8
"""Tokens of a match that are compared with the text whether they are drafted or not."""


class MixedProposer:
    """Drafts for one sequence, or for several that share a cache, as far as it pays.

    n-gram matches cost nothing but the verification; the skipped model drafts behind them, and on
    its first pass there decides about them, too. :class:`.draft_length.DraftLengthPolicy` decides
    how far, and whether at all.

    Args:
        decoder: the model.
        plan: what drafting leaves out; None or the empty plan: only n-grams draft.
        costs: what passes cost on this device.
        ngram: whether n-grams draft.
        prior: the share of drafted tokens accepted under the plan, where it was measured.
        max_tokens: the most tokens drafted at once.
        tree: how many leaves are wanted beside each drafted token; only for a single sequence.
            None drafts chains.

    Attributes:
        policy: decides how far, and estimates acceptance.
    """

    def __init__(
        self,
        decoder: Decoder,
        plan: SkipPlan | None,
        costs: CostTable,
        *,
        ngram: bool = True,
        prior: float | None = None,
        max_tokens: int = 25,
        tree: TreeShape | None = None,
    ) -> None:
        self._decoder = decoder
        self._plan = plan or SkipPlan()
        self._ngram = ngram
        self._tree = tree
        self._costs = costs
        self.policy = DraftLengthPolicy(costs, self._plan or None, max_tokens, prior)
        self._histories = SequenceHistories(index=ngram)
        self._feed: AsyncDecode | None = None

    @property
    def name(self) -> str:
        if not self._plan:
            return "ngram"
        return "mixed" if self._ngram else "skip"

    def propose(self, context: Context, limit: int) -> Draft:
        return self.propose_batch([context], [limit])[0]

    def propose_batch(self, contexts: Sequence[Context], limits: Sequence[int]) -> list[Draft]:
        policy = self.policy
        histories = self._histories.get([context.tokens for context in contexts])
        outcomes = [history.last_outcome() for history in histories]
        longest = max(len(context.tokens) for context in contexts)
        policy.begin(len(contexts), longest, [accepted for _, accepted in outcomes])
        chains = [
            self._new_chain(context, history, limit, state)
            for context, history, limit, (state, _) in zip(
                contexts, histories, limits, outcomes, strict=True
            )
        ]
        while True:
            if self._ngram:
                self._extend_with_ngrams(chains)
            taking = policy.next_pass(chains)
            if not any(taking):
                break
            self._run_pass(chains, taking)
        policy.finish(chains)
        self._feed = None  # it holds the text's cache
        return [self._finished(chain, alone=len(chains) == 1) for chain in chains]

    def _new_chain(
        self, context: Context, history: SequenceHistory, limit: int, state: int
    ) -> DraftChain:
        history.last_draft = None
        return DraftChain(context, history, max(0, min(limit, self.policy.max_tokens)), state)

    def _extend_with_ngrams(self, chains: Sequence[DraftChain]) -> None:
        """Let n-grams draft behind every chain, as far as that pays."""
        matches = [self._lookup(chain) for chain in chains]
        before = [len(chain.tokens) for chain in chains]
        self.policy.extend_with_ngrams(chains, matches)
        for chain, match, length in zip(chains, matches, before, strict=True):
            taken = len(chain.tokens) - length
            if taken and chain.tokens[-1] in chain.context.end_tokens:
                chain.closed = True
            if match.tokens and (taken or not length):
                shown = match.tokens[: max(taken, MIN_COMPARED)]
                updates = self.policy.acceptance.ngram_updates(match, chain.sampled)[: len(shown)]
                chain.history.record_proposal(
                    [*chain.tokens[:length], *shown], [NO_UPDATE] * length + updates
                )

    def _lookup(self, chain: DraftChain) -> Match:
        if not chain.open:
            return NO_MATCH
        tokens, ends = chain.context.tokens, chain.context.end_tokens
        match = chain.history.index.lookup(tokens, chain.tokens, chain.limit - len(chain.tokens))
        for i, token in enumerate(match.tokens):
            if token in ends:
                return replace(match, tokens=match.tokens[: i + 1])
        return match

    def _run_pass(self, chains: Sequence[DraftChain], taking: Sequence[bool]) -> None:
        """One pass of the skipped model: it decides about what n-grams proposed, and adds a token.

        Sequences that take no part run a token that they have run before, at its own position.
        """
        if len(chains) == 1 and self._run_ahead(chains[0]):
            return
        inputs = [
            chain.inputs if takes else chain.inputs[:1]
            for chain, takes in zip(chains, taking, strict=True)
        ]
        width = max(map(len, inputs))
        starts = [chain.input_position for chain in chains]
        padded = [own + own[-1:] * (width - len(own)) for own in inputs]
        positions = [
            [start + min(i, len(own) - 1) for i in range(width)]
            for start, own in zip(starts, inputs, strict=True)
        ]
        cache = chains[0].context.cache
        logits = self._decoder.forward(
            torch.tensor(padded), torch.tensor(positions), cache, self._plan
        )
        takers = [i for i, takes in enumerate(taking) if takes]
        asked = [
            Asked(i, chains[i].context.sampler, tuple(chains[i].tokens), len(inputs[i]))
            for i in takers
        ]
        chosen = choices(logits, asked, rows=self._tree is not None)
        for i, own in zip(takers, chosen, strict=True):
            if not self._check(chains[i], own):
                chains[i].context.cache.view(i, i + 1).clear(starts[i], starts[i] + width)

    def _run_ahead(self, chain: DraftChain) -> bool:
        """One more token by a pass that feeds the next, perhaps launched before.

        Returns:
            False where that can't be: tokens that are not the skipped model's own, or are chosen
            otherwise than greedily.
        """
        cache, sampler = chain.context.cache, chain.context.sampler
        if chain.num_unchecked or self._tree or chain.sampled or sampler.penalises:
            return False
        (token,), position = chain.inputs, chain.input_position
        if self._feed is None or not self._feed.goes_on_from(token, position):
            self._feed = self._decoder.decode_ahead(token, position, cache, self._plan)
        if self._feed is None:
            return False
        self._feed.launch(1 + self.policy.launches_ahead(chain) - self._feed.ahead)
        if not self._check(chain, iter([self._feed.read()])):
            cache.clear(position, self._feed.position)
            self._feed = None
        return True

    def _check(self, chain: DraftChain, chosen: Iterator[Choice]) -> bool:
        """Accept the unchecked tokens as long as the skipped model would choose them itself.

        What it is asked to choose where tokens are sampled is *drawn* from its probabilities, and
        stays, so that q is the distribution of every drafted token whatever n-grams proposed.

        Returns:
            False where the pass's logits turn out to be NaN or infinite: the draft ends before
            them.
        """
        acceptance, state = self.policy.acceptance, chain.state
        for choice in chosen:
            at, confidence = chain.num_checked, choice.confidence
            if not choice.known:
                chain.cut(at)
                chain.closed = True
                return False
            chance = acceptance.drafted_token(confidence, chain.bias)
            if chain.num_unchecked:
                update = acceptance.skip_update(chain.last_state, confidence, at == 0)
                before = chain.survival[at]
                ngram = chain.survival[at + 1] / before if before else 0.0
                if chain.tokens[at] == choice.token:
                    chain.check(agreeing(chance, ngram), update, confidence, choice.row)
                    continue
                if not chain.sampled and ngram > chance:
                    own = [*chain.tokens[:at], choice.token]
                    chain.history.record_proposal(own, [NO_UPDATE] * at + [update])
                    chain.check(disagreeing(ngram, chance), NO_UPDATE, confidence, choice.row)
                    continue
                chance = disagreeing(chance, ngram)
                chain.cut(at)
            chain.add(choice.token, chance, "skip")
            update = acceptance.skip_update(state, confidence, at == 0)
            chain.check(chance, update, confidence, choice.row)
            chain.closed = choice.token in chain.context.end_tokens
            break
        return True

    def _finished(self, chain: DraftChain, alone: bool) -> Draft:
        """The draft; what it teaches is noted."""
        if not chain.tokens:
            return Draft()
        tokens, sources = tuple(chain.tokens), tuple(chain.sources)
        chain.history.record_proposal(tokens, chain.updates, sources)
        known = [each for each in chain.probs if each is not None]
        if not known:
            return Draft(tokens, sources=sources)
        probs = torch.stack(
            [
                _one_hot(token, known[0]) if each is None else each
                for token, each in zip(tokens, chain.probs, strict=True)
            ]
        )
        leaves = self._leaves(chain, probs) if alone else ()
        return Draft(tokens, probs if chain.sampled else None, leaves, sources)

    def _leaves(self, chain: DraftChain, probs: torch.Tensor) -> tuple[tuple[int, ...], ...]:
        """The tree's leaves beside the chain, whose probabilities are ``[γ, V]``."""
        if self._tree is None:
            return ()
        costs = self._costs.at(1, len(chain.context.tokens))
        return leaves_of(
            self._decoder,
            chain.context,
            chain.tokens,
            probs,
            self._tree,
            verify_cost=costs.verify_cost,
            draft_seconds=costs.draft_cost(self._plan, self._decoder.depth),
        )


def _one_hot(token: int, like: torch.Tensor) -> torch.Tensor:
    """Probabilities ``[V]`` of a token that was certain."""
    probs = torch.zeros_like(like)
    probs[token] = 1.0
    return probs
