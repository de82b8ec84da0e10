"""The loop: draft, verify, keep. Vanilla decoding is the same loop with nothing drafted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import torch

from conflayers_cli.engine.argmax import INVALID_TOKEN, LogitsError, greedy_tokens
from conflayers_cli.engine.async_decode import AsyncDecode
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.sampler import Sampler
from conflayers_cli.errors import InputError
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.spec_decode.proposer import Context, Draft, Proposer
from conflayers_cli.spec_decode.rejection_sampler import accept_greedy, accept_sampled

Finish = Literal["stop", "length"]
NOTHING = Draft()
LAUNCHED_AHEAD = 2
"""Vanilla passes launched and not read: while one is read and told, the other keeps a GPU busy."""


@dataclass(frozen=True)
class Step:
    """What one step decided.

    Attributes:
        tokens: the new tokens, in order; one at least.
        drafted: tokens drafted in this step: the chain's length, without leaves beside it.
        accepted: drafted tokens that were kept; a leaf that took a chain token's place is one,
            where it gained a token in this step (see :mod:`conflayers_cli.spec_decode.tree`).
        drafter: who drafted; "none" where nobody did, "prefill" for the step that reads the prompt.
        draft_seconds: time spent drafting.
        verify_seconds: time of the full pass and the choice of tokens.
        finish: why the output ends here ("stop": an end token or stop string; "length": the token
            budget), None while it goes on.
        leaves: side candidates verified beside the chain.
        sources: for each drafted token who drafted it, where the drafter has several ways; empty:
            ``drafter`` holds for all.
    """

    tokens: tuple[int, ...]
    drafted: int
    accepted: int
    drafter: str
    draft_seconds: float
    verify_seconds: float
    finish: Finish | None
    leaves: int = 0
    sources: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return self.draft_seconds + self.verify_seconds


def check_request(decoder: Decoder, prompt: Sequence[int], max_new_tokens: int) -> None:
    """Raise InputError unless a prompt can be decoded for so many new tokens."""
    if not prompt:
        raise InputError("the prompt has no tokens")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens {max_new_tokens}: at least 1 is needed")
    strange = [token for token in prompt if not 0 <= token < decoder.vocabulary]
    if strange:
        raise InputError(
            f"the prompt has token id {strange[0]}, but the model's vocabulary ends at "
            f"{decoder.vocabulary - 1}: tokenizer and model don't belong together"
        )
    length, bound = len(prompt) + max_new_tokens, decoder.exact_positions
    if bound is not None and length > bound:
        raise InputError(
            f"prompt and output have up to {length} tokens, but beyond {bound} this model's "
            "rotary embedding changes with the length and can't be decoded exactly"
        )


class Row:
    """One text at work: its tokens, how they are chosen, and where it ends.

    Args:
        decoder: the model.
        prompt: token ids, at least one.
        max_new_tokens: the most tokens produced, at least one.
        sampling: how tokens are chosen.
        end_tokens: ids that end the output; kept as its last token.
        watch: called with every new token in order; True ends the output with it.

    Attributes:
        tokens: prompt and output.
        finish: why it ended, None while it goes on.

    Raises:
        InputError: empty prompt, no budget, a token the model does not have, or a length at which
            it can't be decoded exactly.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: SamplingParams | None = None,
        end_tokens: frozenset[int] = frozenset(),
        watch: Callable[[int], bool] | None = None,
    ) -> None:
        check_request(decoder, prompt, max_new_tokens)
        self.decoder = decoder
        self.tokens = list(prompt)
        self.prompt_length = len(prompt)
        self.max_new_tokens = max_new_tokens
        self.end_tokens = end_tokens
        self.finish: Finish | None = None
        self.sampler = Sampler(sampling or SamplingParams(), decoder.vocabulary, decoder.device)
        self._watch = watch

    @property
    def output(self) -> list[int]:
        """The tokens produced so far."""
        return self.tokens[self.prompt_length :]

    @property
    def room(self) -> int:
        """The most drafts that can be kept: the last place is the full model's own."""
        return self.max_new_tokens - (len(self.tokens) - self.prompt_length) - 1

    def read_prompt(self, cache: KVCache, filled: int = 0) -> Step:
        """The pass over the prompt, which decides the first token.

        Args:
            cache: of this row alone.
            filled: how many of the prompt's first tokens it holds; fewer than all.
        """
        begin = perf_counter()  # whatever a step decides was read from the device within it
        self.sampler.saw(self.tokens)
        prompt = torch.tensor([self.tokens[filled:]])
        logits = self.decoder.prefill(prompt, cache, start=filled)
        kept = self.keep((self.sampler.choose(logits[0]),))
        return Step(kept, 0, 0, "prefill", 0.0, perf_counter() - begin, self.finish)

    def decide(
        self, draft: Draft, logits: torch.Tensor, best: Sequence[int] | None = None
    ) -> tuple[int, int]:
        """Which drafts stand, and the token that follows them.

        Args:
            draft: what was drafted behind the text.
            logits: ``[1 + draft.width, V]`` behind the pending token and each of the draft's nodes.
            best: their largest ones' tokens, where somebody has them already; used where they
                decide.

        Returns:
            (row, token) as :func:`accept_greedy`; the token may be `INVALID_TOKEN`.
        """
        nodes, parents = draft.nodes, draft.parents
        if not self.sampler.settings.greedy:
            target = self.sampler.distribution(logits, nodes, parents)
            return accept_sampled(
                draft.tokens, target, draft.distribution, self.sampler, draft.leaves
            )
        if best is None or self.sampler.penalises:
            best = greedy_tokens(self.sampler.scores(logits, nodes, parents)).tolist()
        return accept_greedy(draft.tokens, best, draft.leaves)

    def keep(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """Append tokens up to the first that ends the output; returns those kept.

        Raises:
            LogitsError: one of them is `INVALID_TOKEN`.
        """
        kept = 0
        for token in tokens:
            if token == INVALID_TOKEN:
                step = len(self.tokens) - self.prompt_length + 1
                raise LogitsError.at(step, len(self.tokens) - 1, self.decoder.dtype)
            self.tokens.append(token)
            kept += 1
            watched = self._watch is not None and self._watch(token)
            if token in self.end_tokens or watched:
                self.finish = "stop"
            elif len(self.tokens) - self.prompt_length >= self.max_new_tokens:
                self.finish = "length"
            if self.finish:
                break
        self.sampler.saw(tokens[:kept])
        return tokens[:kept]


class Generation(Row):
    """One sequence being decoded. Iterate for :class:`Step` s; stop whenever you like.

    Greedy output equals vanilla greedy decoding token for token; sampled output has the target's
    distribution, whatever the drafter. The budget is exact: nothing after an end token or past
    ``max_new_tokens`` is kept or counted.

    Args:
        decoder: the model.
        prompt: token ids, at least one.
        max_new_tokens: the most tokens produced, at least one.
        sampling: how tokens are chosen.
        drafter: None decodes vanilla. May be exchanged between steps.
        end_tokens: ids that end the output; kept as its last token.
        watch: called with every new token in order; True ends the output with it.
        cache: memory to decode in, with room for prompt and output; None: new memory.
        filled: how many of the prompt's first tokens that cache holds; fewer than all.

    Attributes:
        tokens: prompt and output.
        cache: keys and values of ``tokens`` but the last one; of the first ``filled`` tokens where
            there is no output yet. That holds after an interruption at any place, too.
        finish: why it ended, None while it goes on.

    Raises:
        InputError: empty prompt, no budget, a token the model does not have, or a length at which
            it can't be decoded exactly.
        ValueError: the cache is too small, or ``filled`` is no part of the prompt.
        LogitsError: while decoding: the model's logits are not numbers where the text goes on.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: SamplingParams | None = None,
        drafter: Proposer | None = None,
        end_tokens: frozenset[int] = frozenset(),
        watch: Callable[[int], bool] | None = None,
        cache: KVCache | None = None,
        filled: int = 0,
    ) -> None:
        super().__init__(
            decoder,
            prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            end_tokens=end_tokens,
            watch=watch,
        )
        self.drafter = drafter
        length = len(prompt) + max_new_tokens
        if not 0 <= filled < len(prompt) or (cache is None and filled):
            raise ValueError(f"{filled} of {len(prompt)} prompt tokens are said to be there")
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
            return self.read_prompt(self.cache, self.filled)
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
