"""Drafts by n-gram matches and by the skipped model, each where it pays, for one row or many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from conflayers_cli.engine.async_decode import AsyncDecode
from conflayers_cli.engine.cost_model import CostTable
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.token_choice import Asked, Choice, choices
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.acceptance import (
    NOTHING,
    Mark,
    agreeing,
    confidence_bin,
    disagreeing,
)
from conflayers_cli.spec_decode.draft_chain import Chain
from conflayers_cli.spec_decode.draft_length import Figures, Lookahead
from conflayers_cli.spec_decode.history import Text, Texts
from conflayers_cli.spec_decode.ngram import NO_MATCH, Match
from conflayers_cli.spec_decode.proposer import Context, Draft, leaves_of
from conflayers_cli.spec_decode.tree import TreeShape

SHADOW = 8
"""Tokens of a match that are compared with the text whether they are drafted or not."""


@dataclass
class _Row:
    """One row of a draft at work.

    Attributes:
        context: what the drafter was given.
        text: what it remembers of the row's text.
        chain: what is being drafted.
        rows: the draft's probabilities ``[V]`` of each token, where they are asked for; None where
            an n-gram drafted it and the skipped model had no say.
    """

    context: Context
    text: Text
    chain: Chain
    rows: list[torch.Tensor | None] = field(default_factory=list)

    @property
    def inputs(self) -> list[int]:
        """What the skipped model has not run yet: the last settled token, the pending ones."""
        chain = self.chain
        settled = chain.settled
        last = chain.tokens[settled - 1] if settled else self.context.tokens[-1]
        return [last, *chain.tokens[settled:]]


class MixedProposer:
    """Drafts for one row, or for rows that share a cache, as far as it pays.

    n-gram matches cost nothing but the verification; the skipped model drafts behind them, and on
    its first pass there decides about them, too. How far, and whether at all, is
    :class:`conflayers_cli.spec_decode.draft_length.Lookahead`'s matter.

    Args:
        decoder: the model.
        plan: what drafting leaves out; None or the empty plan: only n-grams draft.
        costs: what passes cost on this device.
        ngram: whether n-grams draft.
        prior: the share of drafted tokens that stand under the plan, where it was measured.
        max_tokens: the most tokens drafted at once.
        tree: how many leaves are wanted beside each drafted token; only for a single row. None
            drafts chains.
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
        self._lookahead = Lookahead(costs, self._plan or None, max_tokens, prior)
        self._texts = Texts(index=ngram)
        self._feed: AsyncDecode | None = None

    @property
    def name(self) -> str:
        if not self._plan:
            return "ngram"
        return "mixed" if self._ngram else "skip"

    def figures(self) -> Figures:
        """What the estimates have come to."""
        return self._lookahead.figures()

    def draft(self, context: Context, limit: int) -> Draft:
        return self.propose_batch([context], [limit])[0]

    def propose_batch(self, contexts: Sequence[Context], limits: Sequence[int]) -> list[Draft]:
        look = self._lookahead
        texts = self._texts.at_hand([context.tokens for context in contexts])
        outcomes = [text.outcome() for text in texts]
        longest = max(len(context.tokens) for context in contexts)
        look.begin(len(contexts), longest, [stood for _, stood in outcomes])
        rows = [
            _Row(context, text, self._chain(context, text, limit, state))
            for context, text, limit, (state, _) in zip(
                contexts, texts, limits, outcomes, strict=True
            )
        ]
        chains = [row.chain for row in rows]
        while True:
            if self._ngram:
                self._match(rows)
            taking = look.skip(chains)
            if not any(taking):
                break
            self._skip(rows, taking)
        look.end(chains)
        self._feed = None  # it holds the text's cache
        return [self._finished(row, alone=len(rows) == 1) for row in rows]

    def _chain(self, context: Context, text: Text, limit: int, state: int) -> Chain:
        text.last = None
        limit = max(0, min(limit, self._lookahead.max_tokens))
        return Chain(limit, text.bias, state, not context.sampler.settings.greedy)

    def _match(self, rows: Sequence[_Row]) -> None:
        """Let n-grams draft behind every chain, as far as that pays."""
        look = self._lookahead
        matches = [self._lookup(row) for row in rows]
        before = [len(row.chain.tokens) for row in rows]
        look.ngrams([row.chain for row in rows], matches)
        for row, match, length in zip(rows, matches, before, strict=True):
            chain = row.chain
            taken = len(chain.tokens) - length
            row.rows += [None] * taken
            if taken and chain.tokens[-1] in row.context.end_tokens:
                chain.closed = True
            if match.tokens and (taken or not length):
                shown = match.tokens[: max(taken, SHADOW)]
                marks = look.chances.ngram_marks(match, chain.sampled)[: len(shown)]
                row.text.propose([*chain.tokens[:length], *shown], [NOTHING] * length + marks)

    def _lookup(self, row: _Row) -> Match:
        if not row.chain.open:
            return NO_MATCH
        tokens, chain, ends = row.text.tokens, row.chain, row.context.end_tokens
        match = row.text.index.lookup(tokens, chain.tokens, chain.limit - len(chain.tokens))
        for i, token in enumerate(match.tokens):
            if token in ends:
                return replace(match, tokens=match.tokens[: i + 1])
        return match

    def _skip(self, rows: Sequence[_Row], taking: Sequence[bool]) -> None:
        """One pass of the skipped model: it decides about what n-grams proposed, and adds a token.

        Rows that take no part run a token that they have run before, in its own place.
        """
        if len(rows) == 1 and self._fed(rows[0]):
            return
        inputs = [
            row.inputs if takes else row.inputs[:1] for row, takes in zip(rows, taking, strict=True)
        ]
        width = max(map(len, inputs))
        starts = [len(row.text.tokens) - 1 + row.chain.settled for row in rows]
        padded = [own + own[-1:] * (width - len(own)) for own in inputs]
        positions = [
            [start + min(i, len(own) - 1) for i in range(width)]
            for start, own in zip(starts, inputs, strict=True)
        ]
        logits = self._decoder.forward(
            torch.tensor(padded),
            torch.tensor(positions),
            rows[0].context.cache,
            self._plan,
        )
        takers = [i for i, takes in enumerate(taking) if takes]
        asked = [
            Asked(i, rows[i].context.sampler, tuple(rows[i].chain.tokens), len(inputs[i]))
            for i in takers
        ]
        chosen = choices(logits, asked, rows=self._tree is not None)
        for i, own in zip(takers, chosen, strict=True):
            if not self._settle(rows[i], own):
                rows[i].context.cache.view(i, i + 1).clear(starts[i], starts[i] + width)

    def _fed(self, row: _Row) -> bool:
        """One more token by a pass that feeds the next, perhaps launched before; False where that
        can't be: tokens that are not the skipped model's own, or chosen otherwise than greedily.
        """
        context, chain = row.context, row.chain
        sampler = context.sampler
        if chain.pending or self._tree or not sampler.settings.greedy or sampler.penalises:
            return False
        (token,), position = row.inputs, len(row.text.tokens) - 1 + chain.settled
        if self._feed is None or not self._feed.goes_on_from(token, position):
            self._feed = self._decoder.decode_ahead(token, position, context.cache, self._plan)
        if self._feed is None:
            return False
        self._feed.launch(1 + self._lookahead.blind(chain) - self._feed.ahead)
        if not self._settle(row, iter([self._feed.read()])):
            context.cache.clear(position, self._feed.position)
            self._feed = None
        return True

    def _settle(self, row: _Row, chosen: Iterator[Choice]) -> bool:
        """Go along the pending tokens as long as the skipped model would choose them itself.

        What it is asked to choose where tokens are sampled is *drawn* from its probabilities, and
        stands, so that q stays the law of every drafted token whatever n-grams proposed.

        Returns:
            False where the pass's logits turn out to be no numbers: the draft ends before them.
        """
        chain, chances = row.chain, self._lookahead.chances
        greedy, standing = not chain.sampled, chain.standing
        for choice in chosen:
            at = chain.settled
            if not choice.known:
                chain.cut(at)
                del row.rows[at:]
                chain.closed = True
                return False
            chance = chances.drafted(choice.confidence, chain.bias)
            if chain.pending:
                mark = chances.skip_mark(chain.state, choice.confidence, at == 0, chain.bias)
                ngrams = chain.reach[at + 1] / chain.reach[at] if chain.reach[at] else 0.0
                if chain.tokens[at] == choice.token:
                    row.rows[at] = choice.row
                    self._settled(row, choice, agreeing(chance, ngrams), mark)
                    continue
                if greedy and ngrams > chance:
                    own = [*chain.tokens[:at], choice.token]
                    row.text.propose(own, [NOTHING] * at + [mark])
                    row.rows[at] = choice.row
                    self._settled(row, choice, disagreeing(ngrams, chance), NOTHING)
                    continue
                chance = disagreeing(chance, ngrams)
                chain.cut(at)
                del row.rows[at:]
            mark = chances.skip_mark(standing, choice.confidence, at == 0, chain.bias)
            row.rows.append(choice.row)
            chain.add(choice.token, chance, "skip")
            self._settled(row, choice, chance, mark)
            chain.closed = choice.token in row.context.end_tokens
            break
        return True

    def _settled(self, row: _Row, choice: Choice, chance: float, mark: Mark) -> None:
        """The skipped model has judged the first pending token."""
        chain = row.chain
        chain.settle(chance, mark)
        chain.state = confidence_bin(choice.confidence)
        if chain.sampled:
            chain.fixed = chain.settled

    def _finished(self, row: _Row, alone: bool) -> Draft:
        """The draft, and what is to be learnt from it."""
        chain, text = row.chain, row.text
        if not chain.tokens:
            return Draft()
        tokens = tuple(chain.tokens)
        text.propose(tokens, chain.marks)
        text.drafted(tokens, chain.sources)
        q: torch.Tensor | None = None
        leaves: tuple[tuple[int, ...], ...] = ()
        known = [each for each in row.rows[: len(tokens)] if each is not None]
        if known:
            probabilities = torch.stack(
                [
                    _certain(token, known[0]) if each is None else each
                    for token, each in zip(tokens, row.rows, strict=False)
                ]
            )
            if not row.context.sampler.settings.greedy:
                q = probabilities
            if alone:
                leaves = self._leaves(row, probabilities)
        return Draft(tokens, q, leaves, tuple(chain.sources))

    def _leaves(self, row: _Row, probabilities: torch.Tensor) -> tuple[tuple[int, ...], ...]:
        """What stands beside the chain."""
        if self._tree is None:
            return ()
        context = row.context
        costs = self._costs.at(1, len(context.tokens))
        draft_seconds = costs.draft_cost(self._plan, self._decoder.depth)
        return leaves_of(
            *(self._decoder, context, row.chain.tokens, probabilities, self._tree),
            *(costs.verify_cost, draft_seconds),
        )


def _certain(token: int, like: torch.Tensor) -> torch.Tensor:
    """Probabilities ``[V]`` of a token that was certain."""
    row = torch.zeros_like(like)
    row[token] = 1.0
    return row
