"""The loop: draft, verify, keep. Vanilla decoding is the same loop with nothing drafted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from time import perf_counter

import torch

from conflayers_cli.engine.argmax import INVALID_TOKEN
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.graph_runner import AsyncDecode
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.generation.sequence import Sequence, Step
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.spec_decode.proposer import NO_DRAFT, Context, Draft, Proposer

LAUNCHED_AHEAD = 2
"""Vanilla decode steps kept in flight on the GPU."""


class Generation(Sequence):
    """One sequence decoded alone. Iterate for :class:`Step` s; stop whenever you like.

    The output, greedy or sampled, equals vanilla decoding's token for token, whatever the proposer.
    The budget is exact: nothing after an end token or past
    ``max_new_tokens`` is kept or counted.

    Args:
        decoder, request, end_tokens: as for `Sequence`.
        proposer: None decodes vanilla. May be exchanged between steps.
        cache: to decode in, as long as prompt and output; None: a new one.
        num_cached: how many of the prompt's first tokens that cache holds; fewer than all.

    Attributes:
        cache: keys and values of ``tokens`` but the last one; of the first ``num_cached`` tokens
            while there is no output. That holds after an interruption anywhere, too.

    Raises:
        InputError: as `Sequence`.
        ValueError: the cache is too small, or ``num_cached`` is no part of the prompt.
        LogitsError: while decoding: the logits behind the text are not numbers.
    """

    def __init__(
        self,
        decoder: Decoder,
        request: GenerationRequest,
        *,
        proposer: Proposer | None = None,
        end_tokens: frozenset[int] = frozenset(),
        cache: KVCache | None = None,
        num_cached: int = 0,
    ) -> None:
        super().__init__(decoder, request, end_tokens=end_tokens)
        self.proposer = proposer
        length = request.length
        if not 0 <= num_cached < self.prompt_length or (cache is None and num_cached):
            raise ValueError(f"num_cached {num_cached} of {self.prompt_length} prompt tokens")
        if cache is not None and cache.capacity < length:
            raise ValueError(f"a cache of {cache.capacity} positions for a text of {length}")
        self.cache: KVCache = decoder.new_cache(length) if cache is None else cache
        self.num_cached = num_cached
        self._next_draft: tuple[int, str] | None = None  # a token decided already, and its source
        self._async: AsyncDecode | None = None

    def __iter__(self) -> Iterator[Step]:
        while self.finish is None:
            yield self.step()

    def step(self) -> Step:
        """Decide at least one more token; not once ``finish`` is set."""
        if len(self.tokens) == self.prompt_length:
            step = self.read_prompt(self.cache, self.num_cached)
        else:
            step = self._advance()
        self.steps.append(step)
        return step

    def _advance(self) -> Step:
        begin = perf_counter()
        draft = self._draft(self.remaining)
        if self.processed is not None and self.decoder.invariance.depends_on_slot:
            draft = replace(draft, leaves=())  # processors see a token once, when it is certain
        drafted = perf_counter() if draft.tokens else begin
        decided = self._read_ahead() or self._verify(draft)
        kept = self.keep(decided)
        logprobs = self.take_logprobs(len(kept))
        return Step(
            tokens=kept,
            drafted=len(draft.tokens),
            accepted=min(len(decided) - 1, len(kept)),
            proposer=self._proposer_name if draft.tokens else "none",
            draft_seconds=drafted - begin,
            verify_seconds=perf_counter() - drafted,
            finish=self.finish,
            leaves=draft.width - len(draft.tokens),
            sources=draft.sources,
            logprobs=logprobs,
        )

    @property
    def _proposer_name(self) -> str:
        return self.proposer.name if self.proposer else "none"

    def _read_ahead(self) -> tuple[int, ...]:
        """The next token by passes launched ahead; none where they can't be.

        Only without a proposer, greedily, can a pass begin before the host knows its token.
        """
        if self.proposer is not None or not self.takes_best:
            self._async = None
            return ()
        token, position, ahead = self.tokens[-1], len(self.tokens) - 1, self._async
        if ahead is None or self.decoder.stack.watched or not ahead.continues_from(token, position):
            ahead = self._async = self.decoder.decode_ahead(token, position, self.cache)
        if ahead is None:
            return ()
        ahead.launch(min(LAUNCHED_AHEAD, self.remaining + 1) - ahead.ahead)
        choice = ahead.read()
        return (choice.token if choice.is_valid else INVALID_TOKEN,)

    def _draft(self, remaining: int) -> Draft:
        """A draft of up to ``remaining`` tokens, the first of which may be decided already."""
        first, self._next_draft = self._next_draft, None
        if self.proposer is None or remaining < 1:
            return NO_DRAFT
        context = Context(
            self.tokens,
            self.cache,
            self.sampler,
            self.end_tokens,
            self.request.prediction,
            self.request.store,
        )
        if first is None:
            return self.proposer.propose(context, remaining)
        token, source = first
        if token in self.end_tokens or remaining == 1:
            return Draft((token,), sources=(source,))
        self.tokens.append(token)  # so that the proposer takes it for text
        try:
            further = self.proposer.propose(context, remaining - 1)
        finally:
            self.tokens.pop()
        return Draft(
            (token, *further.tokens),
            leaves=further.leaves and ((), *further.leaves),
            sources=(source, *(further.sources or (self._proposer_name,) * len(further.tokens))),
        )

    def _verify(self, draft: Draft) -> tuple[int, ...]:
        """One full pass over the pending token and the draft: the accepted tokens, and the next.

        Nodes use the slots from the pending token's on. A leaf has the position of the token that
        it would replace.
        """
        kv_len = len(self.tokens) - 1
        nodes, parents = draft.nodes, draft.parents
        tokens = torch.tensor([[self.tokens[-1], *nodes]])
        slots = torch.arange(kv_len, kv_len + tokens.shape[1])[None]
        positions = slots
        if draft.width > len(draft.tokens):
            positions = kv_len + torch.tensor([[0, *(parent + 1 for parent in parents)]])
        if self.takes_best:
            (best,) = self.decoder.greedy(tokens, positions, self.cache, slots=slots)
            row, token = draft.follow(best)
        else:
            logits = self.decoder.forward(tokens, positions, self.cache, slots=slots)[0]
            row, token = self.decide(draft, logits)
        decided = draft.tokens[:row]
        if row > len(draft.tokens):
            parent = parents[row - 1]
            self.cache.move(kv_len + row, kv_len + parent + 1)
            decided = (*draft.tokens[:parent], nodes[row - 1])
        if token == INVALID_TOKEN and nodes:
            # A rejected token can spoil the pass for those before it: masked, but 0 times NaN is
            # NaN. So the next token is decided without drafts.
            self.cache.clear(kv_len + len(decided), kv_len + 1 + len(nodes))
            return decided or self._verify(NO_DRAFT)
        if row > len(draft.tokens) and self.decoder.invariance.depends_on_slot:
            # The leaf is the model's choice to the bit, but not the token behind it (see
            # `spec_decode.tree`), which opens the next draft and is verified there.
            source = draft.sources[parent] if draft.sources else self._proposer_name
            self._next_draft = token, source
            return decided
        return (*decided, token)
