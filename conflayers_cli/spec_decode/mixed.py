"""Drafts by n-gram matches and by the skipped model, each where it pays."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from time import perf_counter

import torch

from conflayers_cli.engine.cost_model import CostTable
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.graph_runner import AsyncDecode
from conflayers_cli.engine.token_choice import (
    TokenChoice,
    TokenRequest,
    choose_tokens,
    greedy_choices,
)
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.acceptance import NO_UPDATE, agreeing, disagreeing
from conflayers_cli.spec_decode.draft_chain import DraftChain
from conflayers_cli.spec_decode.draft_length import DraftLengthPolicy
from conflayers_cli.spec_decode.history import SequenceHistories
from conflayers_cli.spec_decode.ngram import NO_MATCH, Match, PredictedText
from conflayers_cli.spec_decode.proposer import Context, Draft, propose_leaves
from conflayers_cli.spec_decode.tree import TreeShape

ROWS_TIMED = 31
"""Choices of sampled tokens whose time counts, the latest ones."""
MIN_COMPARED = 8
"""Tokens of a match that are compared with the text, drafted or not."""


class MixedProposer:
    """Drafts for one sequence, or for several that share a cache, as far as it pays.

    n-gram matches cost only their verification; the skipped model drafts behind them, and checks
    them on its first pass there. `.draft_length.DraftLengthPolicy` decides how far, if at all.

    Args:
        decoder: the model.
        plan: what drafting leaves out; None or the empty plan: only n-grams draft.
        costs: what passes cost on this device.
        ngram: whether n-grams draft.
        prior: the acceptance rate measured under the plan.
        max_tokens: the most tokens drafted at once.
        tree: how many leaves are wanted beside each token of a single sequence; None: chains.
        rows_apart: whether costs leave out what sampling a token takes, which is then added.
        alike: a proposer that takes turns with this one at the same texts: their n-grams are
            shared.

    Attributes:
        policy: decides how far, and estimates acceptance.
        passes: (tokens of all sequences, seconds) of each pass of the last call.
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
        rows_apart: bool = True,
        alike: MixedProposer | None = None,
    ) -> None:
        self._decoder = decoder
        self._plan = plan or SkipPlan()
        self._ngram = ngram
        self._tree = tree
        self._costs = costs
        self.policy: DraftLengthPolicy = DraftLengthPolicy(
            costs, self._plan or None, max_tokens, prior, alike.policy if alike else None
        )
        self._histories: SequenceHistories = alike._histories if alike else SequenceHistories(ngram)
        self.passes: list[tuple[int, float]] = []
        self._rows_apart = rows_apart
        self._row_seconds: deque[float] = deque(maxlen=ROWS_TIMED)
        self._ahead: AsyncDecode | None = None

    @property
    def name(self) -> str:
        if not self._plan:
            return "ngram"
        return "mixed" if self._ngram else "skip"

    def propose(self, context: Context, limit: int) -> Draft:
        return self.propose_batch([context], [limit])[0]

    def propose_batch(self, contexts: Sequence[Context], limits: Sequence[int]) -> list[Draft]:
        policy = self.policy
        histories = self._histories.get((each.tokens, each.store) for each in contexts)
        chains, accepted = [], []
        for context, history, limit in zip(contexts, histories, limits, strict=True):
            state, num_accepted = history.last_outcome()
            history.last_draft = None
            if context.prediction and history.predicted is None and self._ngram:
                # Reading the prompt has decided a token already.
                history.predicted = PredictedText(context.prediction, context.tokens[:-1])
            accepted.append(num_accepted)
            chains.append(DraftChain(context, history, min(limit, policy.max_tokens), state))
        longest = max(len(context.tokens) for context in contexts)
        sampled = any(chain.sampled for chain in chains)
        known = self._rows_apart and sampled and self._row_seconds
        policy.set_row_seconds(median(self._row_seconds) if known else 0.0)
        policy.begin(len(contexts), longest, accepted)
        self.passes = []
        while True:
            if self._ngram:
                self._extend_with_ngrams(chains)
            taking = policy.next_pass(chains)
            if not any(taking):
                break
            begin = perf_counter()
            width = self._run_pass(chains, taking)
            self.passes.append((width * len(chains), perf_counter() - begin))
        policy.finish(chains)
        self._ahead = None  # it holds the text's cache
        tree = self._tree if len(chains) == 1 else None
        return [self._finish(chain, tree) for chain in chains]

    def _extend_with_ngrams(self, chains: Sequence[DraftChain]) -> None:
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
        matcher = chain.history.matcher
        if matcher is None or not chain.open:
            return NO_MATCH
        tokens, ends = chain.context.tokens, chain.context.end_tokens
        count, predicted = chain.limit - len(chain.tokens), chain.history.predicted
        match = matcher.lookup(tokens, chain.tokens, count)
        if predicted is not None:
            other = predicted.lookup(tokens, chain.tokens, count)
            if other.tokens and other.length >= match.length:
                match = other
        for i, token in enumerate(match.tokens):
            if token in ends:
                return replace(match, tokens=match.tokens[: i + 1])
        return match

    def _run_pass(self, chains: Sequence[DraftChain], taking: Sequence[bool]) -> int:
        """One pass of the skipped model: it checks what n-grams proposed, and adds a token.

        Sequences that take no part run a token again, at its own position. Returns the width.
        """
        if len(chains) == 1 and self._run_ahead(chains[0]):
            return 1
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
        takers = [i for i, takes in enumerate(taking) if takes]
        asked = [
            TokenRequest(
                i,
                chains[i].context.sampler,
                len(chains[i].context.tokens),
                tuple(chains[i].tokens),
                len(inputs[i]),
            )
            for i in takers
        ]
        chosen = self._choose(torch.tensor(padded), torch.tensor(positions), cache, asked)
        for i, own in zip(takers, chosen, strict=True):
            if not self._check(chains[i], own):
                chains[i].context.cache.view(i, i + 1).clear(starts[i], starts[i] + width)
        return width

    def _choose(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        cache: KVCache,
        asked: Sequence[TokenRequest],
    ) -> list[list[TokenChoice]]:
        """The tokens that a pass of the skipped model chooses."""
        if self._tree is None and all(request.sampler.takes_best for request in asked):
            found = self._decoder.greedy_with_confidence(tokens, positions, cache, self._plan)
            return greedy_choices(found, asked)
        logits = self._decoder.forward(tokens, positions, cache, self._plan)
        begin = perf_counter()
        chosen = choose_tokens(logits, asked, others=self._tree.max_leaves if self._tree else 0)
        rows = sum(request.count for request in asked)
        self._row_seconds.append((perf_counter() - begin) / rows)
        return chosen

    def _run_ahead(self, chain: DraftChain) -> bool:
        """One more greedy token by a pass launched ahead; False: only `_run_pass` can do it."""
        cache, sampler = chain.context.cache, chain.context.sampler
        if chain.num_unchecked or self._tree or chain.sampled or sampler.has_penalty:
            return False
        (token,), position = chain.inputs, chain.input_position
        if self._ahead is None or not self._ahead.continues_from(token, position):
            self._ahead = self._decoder.decode_ahead(token, position, cache, self._plan)
        if self._ahead is None:
            return False
        self._ahead.launch(1 + self.policy.launches_ahead(chain) - self._ahead.ahead)
        if not self._check(chain, [self._ahead.read()]):
            cache.clear(position, self._ahead.position)
            self._ahead = None
        return True

    def _check(self, chain: DraftChain, chosen: Sequence[TokenChoice]) -> bool:
        """Keep the unchecked tokens as long as the skipped model would choose them itself, or they
        are likelier to be right than its choice.

        Returns:
            False where the pass's logits are NaN or infinite: the draft ends before them.
        """
        acceptance, state = self.policy.acceptance, chain.state
        for choice in chosen:
            at = chain.num_checked
            if not choice.is_valid:
                chain.cut(at)
                chain.closed = True
                return False
            chance = acceptance.drafted_token(choice.confidence, chain.history.bias)
            if chain.num_unchecked:
                update = acceptance.skip_update(chain.last_state, choice.confidence, at == 0)
                before = chain.survival[at]
                ngram = chain.survival[at + 1] / before if before else 0.0
                if chain.tokens[at] == choice.token:
                    chain.check(agreeing(chance, ngram), update, choice)
                    continue
                if ngram > chance:
                    own = [*chain.tokens[:at], choice.token]
                    chain.history.record_proposal(own, [NO_UPDATE] * at + [update])
                    chain.check(disagreeing(ngram, chance), NO_UPDATE, choice)
                    continue
                chance = disagreeing(chance, ngram)
                chain.cut(at)
            chain.add(choice.token, chance, "skip")
            chain.check(chance, acceptance.skip_update(state, choice.confidence, at == 0), choice)
            chain.closed = choice.token in chain.context.end_tokens
            break
        return True

    def _finish(self, chain: DraftChain, tree: TreeShape | None) -> Draft:
        """The draft, noted in the sequence's history."""
        if not chain.tokens:
            return Draft()
        tokens, sources = tuple(chain.tokens), tuple(chain.sources)
        chain.history.record_proposal(tokens, chain.updates, sources)
        if tree is None:
            return Draft(tokens, sources=sources)
        costs = self._costs.at(1, len(chain.context.tokens))
        leaves = propose_leaves(
            self._decoder,
            chain.context,
            *chain.candidates(),
            tree,
            costs.verify_cost,
            costs.draft_cost(self._plan, self._decoder.depth),
        )
        return Draft(tokens, leaves, sources)
