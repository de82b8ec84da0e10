"""The loop: draft, verify, keep. Vanilla decoding is the same loop with nothing drafted."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter

import torch

from conflayers_cli.engine.argmax import INVALID_TOKEN
from conflayers_cli.engine.async_decode import AsyncDecode
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.generation.sequence import Sequence, Step
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.spec_decode.proposer import Context, Draft, Proposer

NOTHING = Draft()
LAUNCHED_AHEAD = 2
"""Vanilla passes launched and not read: while one is read and told, the other keeps a GPU busy."""


class Generation(Sequence):
    """One sequence being decoded. Iterate for :class:`Step` s; stop whenever you like.

    Greedy output equals vanilla greedy decoding token for token; sampled output has the target's
    distribution, whatever the drafter. The budget is exact: nothing after an end token or past
    ``max_new_tokens`` is kept or counted.

    Args:
        decoder: the model.
        request: what is to be decoded.
        drafter: None decodes vanilla. May be exchanged between steps.
        end_tokens: ids that end the output; kept as its last token.
        cache: memory to decode in, with room for prompt and output; None: new memory.
        filled: how many of the prompt's first tokens that cache holds; fewer than all.

    Attributes:
        tokens: prompt and output.
        cache: keys and values of ``tokens`` but the last one; of the first ``filled`` tokens where
            there is no output yet. That holds after an interruption at any place, too.
        finish: why it ended, None while it goes on.

    Raises:
        InputError: a token the model does not have, or a length at which it can't be decoded
            exactly.
        ValueError: the cache is too small, or ``filled`` is no part of the prompt.
        LogitsError: while decoding: the model's logits are not numbers where the text goes on.
    """

    def __init__(
        self,
        decoder: Decoder,
        request: GenerationRequest,
        *,
        drafter: Proposer | None = None,
        end_tokens: frozenset[int] = frozenset(),
        cache: KVCache | None = None,
        filled: int = 0,
    ) -> None:
        super().__init__(decoder, request, end_tokens=end_tokens)
        self.drafter = drafter
        length = request.length
        if not 0 <= filled < self.prompt_length or (cache is None and filled):
            raise ValueError(f"{filled} of {self.prompt_length} prompt tokens are said to be there")
        if cache is not None and cache.capacity < length:
            raise ValueError(f"a cache of {cache.capacity} positions for a text of {length}")
        self.cache: KVCache = decoder.new_cache(length) if cache is None else cache
        self.filled = filled
        self._ahead: tuple[int, str] | None = None
        self._feed: AsyncDecode | None = None

    def __iter__(self) -> Iterator[Step]:
        while self.finish is None:
            yield self.step()

    def step(self) -> Step:
        """Decide at least one more token. Not to be called once ``finish`` is set."""
        if len(self.tokens) == self.prompt_length:
            step = self.read_prompt(self.cache, self.filled)
        else:
            step = self._advance()
        self.steps.append(step)
        return step

    def _advance(self) -> Step:
        """Draft, verify, keep."""
        begin = perf_counter()
        draft = self._draft(self.room)
        drafted = perf_counter() if draft.tokens else begin
        decided = self._fed() or self._verify(draft)
        kept = self.keep(decided)
        return Step(
            tokens=kept,
            drafted=len(draft.tokens),
            accepted=min(len(decided) - 1, len(kept)),
            drafter=self._drafter_name if draft.tokens else "none",
            draft_seconds=drafted - begin,
            verify_seconds=perf_counter() - drafted,
            finish=self.finish,
            leaves=draft.width - len(draft.tokens),
            sources=draft.sources,
        )

    @property
    def _drafter_name(self) -> str:
        return self.drafter.name if self.drafter else "none"

    def _fed(self) -> tuple[int, ...]:
        """The next token by passes launched ahead, none where that can't be.

        Without a drafter nothing has to be known of a token for the next pass to begin.
        """
        sampler = self.sampler
        if self.drafter is not None or not sampler.settings.greedy or sampler.penalises:
            self._feed = None  # the text goes on without it
            return ()
        token, position = self.tokens[-1], len(self.tokens) - 1
        feed = self._feed
        if feed is None or self.decoder.stack.watched or not feed.goes_on_from(token, position):
            self._feed = self.decoder.decode_ahead(token, position, self.cache)
        if self._feed is None:
            return ()
        self._feed.launch(min(LAUNCHED_AHEAD, self.room + 1) - self._feed.ahead)
        choice = self._feed.read()
        return (choice.token if choice.known else INVALID_TOKEN,)

    def _draft(self, room: int) -> Draft:
        """A draft of up to ``room`` tokens, behind what is already expected to come next."""
        ahead, self._ahead = self._ahead, None
        if self.drafter is None or room < 1:
            return NOTHING
        context = Context(self.tokens, self.cache, self.sampler, self.end_tokens)
        if ahead is None:
            return self.drafter.propose(context, room)
        token, source = ahead
        if token in self.end_tokens or room == 1:
            return Draft((token,), sources=(source,))
        self.tokens.append(token)  # text, to the drafter
        try:
            further = self.drafter.propose(context, room - 1)
        finally:
            self.tokens.pop()
        return Draft(
            (token, *further.tokens),
            leaves=further.leaves and ((), *further.leaves),
            sources=(source, *(further.sources or (self._drafter_name,) * len(further.tokens))),
        )

    def _verify(self, draft: Draft) -> tuple[int, ...]:
        """One full pass over the pending token and the draft: the drafts that stand, a next token.

        Every node's slot is its row's, counted from the pending token. The chain's are those of its
        positions; a leaf lies behind them, at the position of the token it would replace.
        """
        filled = len(self.tokens) - 1
        nodes, parents = draft.nodes, draft.parents
        tokens = torch.tensor([[self.tokens[-1], *nodes]])
        slots = torch.arange(filled, filled + tokens.shape[1])[None]
        if draft.width == len(draft.tokens):
            logits = self.decoder.forward(tokens, slots, self.cache)[0]
        else:
            depths = torch.tensor([[0, *(parent + 1 for parent in parents)]])
            logits = self.decoder.forward(tokens, filled + depths, self.cache, slots=slots)[0]
        row, token = self.decide(draft, logits)
        decided = draft.tokens[:row]
        if row > len(draft.tokens):
            parent = parents[row - 1]
            self.cache.move(filled + row, filled + parent + 1)
            decided = (*draft.tokens[:parent], nodes[row - 1])
        if token == INVALID_TOKEN and nodes:
            # A token that may never be text can spoil a pass for those before it: it is masked for
            # them, but nought times NaN is NaN. So what comes next is decided without drafts.
            self.cache.clear(filled + len(decided), filled + 1 + len(nodes))
            return decided or self._verify(NOTHING)
        if (
            row > len(draft.tokens)
            and self.sampler.settings.greedy
            and self.decoder.invariance.bitwise
        ):
            # The leaf is the model's choice to the bit; what follows it is so but for the order in
            # which the leaf's pass summed its keys. It opens the next draft, and is verified there.
            self._ahead = token, draft.sources[parent] if draft.sources else self._drafter_name
            return decided
        return (*decided, token)
