"""One sequence being decoded: its tokens, how they are chosen, where it ends, its steps."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import numpy as np
import torch

from conflayers_cli.engine.argmax import INVALID_TOKEN, LogitsError, float_row
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.sampler import Sampler
from conflayers_cli.errors import InputError
from conflayers_cli.generation.processed import ProcessedChoice
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.spec_decode.proposer import NO_DRAFT, Draft

FinishReason = Literal["stop", "length"]
MODEL = "model"
"""Who drafted a token that nobody drafted."""


@dataclass(frozen=True)
class TokenLogprobs:
    """What the model thought of a token, before penalties, temperature and truncation.

    Attributes:
        token: the token chosen.
        logprob: its log-probability.
        top: the likeliest tokens and theirs, falling.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of(cls, logits: torch.Tensor, token: int, count: int) -> TokenLogprobs:
        """From logits ``[V]``."""
        row = float_row(logits.detach().cpu())
        total = row.max() + np.log(np.exp(row - row.max()).sum())
        top = np.argpartition(row, -count)[-count:] if count else ()
        ordered = sorted((int(i) for i in top), key=lambda i: (-row[i], i))
        pairs = tuple((i, float(row[i] - total)) for i in ordered)
        return cls(token, float(row[token] - total), pairs)


@dataclass(frozen=True)
class Step:
    """What one step decided.

    Attributes:
        tokens: the new tokens, in order; one at least.
        drafted: length of the drafted chain, without leaves.
        accepted: drafted tokens that were kept; a leaf in a chain token's position is one, if it
            gained a token in this step (see `spec_decode.tree`).
        proposer: who drafted; "none": nobody, "prefill": the step that reads the prompt.
        draft_seconds: of drafting.
        verify_seconds: of the full pass and the choice of tokens.
        finish: why the output ends here ("stop": an end token or stop string; "length": the token
            budget); None: it doesn't.
        leaves: verified beside the chain.
        sources: for each drafted token who drafted it; empty: ``proposer`` holds for all.
        logprobs: of each token, if the request asks for them.
    """

    tokens: tuple[int, ...]
    drafted: int
    accepted: int
    proposer: str
    draft_seconds: float
    verify_seconds: float
    finish: FinishReason | None
    leaves: int = 0
    sources: tuple[str, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()

    @property
    def drafters(self) -> tuple[str, ...]:
        """Who drafted each token; "model": nobody, the pass itself decided it."""
        by = self.sources or (self.proposer,) * self.drafted
        return (*by[: self.accepted], *(MODEL,) * (len(self.tokens) - self.accepted))

    @property
    def seconds(self) -> float:
        return self.draft_seconds + self.verify_seconds


def check_request(decoder: Decoder, request: GenerationRequest) -> None:
    """Raise InputError unless this model can decode the request."""
    for token in request.prompt:
        if not 0 <= token < decoder.vocabulary:
            raise InputError(
                f"the prompt has token id {token}, but the model's vocabulary ends at "
                f"{decoder.vocabulary - 1}: tokenizer and model don't belong together"
            )
    length, bound = request.length, decoder.exact_positions
    if bound is not None and length > bound:
        raise InputError(
            f"prompt and output have up to {length} tokens, but beyond {bound} this model's "
            "rotary embedding changes with the length and can't be decoded exactly"
        )


class Sequence:
    """One sequence being decoded.

    Args:
        decoder: the model.
        request: what is decoded.
        end_tokens: ids that end the output; kept as its last token.

    Attributes:
        tokens: prompt and output.
        steps: in order.
        finish: why it ended, None while it goes on.
        num_cached: how many of the prompt's first tokens were in the cache before.
        sampler: how tokens are drafted, and chosen where there are no processors.
        processed: how tokens are chosen by logits processors; None: there are none.

    Raises:
        InputError: as `check_request`.
    """

    def __init__(
        self,
        decoder: Decoder,
        request: GenerationRequest,
        *,
        end_tokens: frozenset[int] = frozenset(),
    ) -> None:
        check_request(decoder, request)
        self.decoder = decoder
        self.request = request
        self.tokens = list(request.prompt)
        self.prompt_length = len(request.prompt)
        self.max_new_tokens = request.max_new_tokens
        self.end_tokens = end_tokens
        self.finish: FinishReason | None = None
        self.num_cached = 0
        self.steps: list[Step] = []
        self.sampler = Sampler(
            request.sampling,
            decoder.vocabulary,
            decoder.device,
            request.prompt,
            request.answer,
            request.adjustments,
        )
        self.processed = ProcessedChoice.of(decoder, request)
        self._logprobs: dict[int, TokenLogprobs] = {}  # by position

    @property
    def output(self) -> list[int]:
        """The tokens generated so far."""
        return self.tokens[self.prompt_length :]

    @property
    def remaining(self) -> int:
        """The most drafted tokens that can be kept: the last one is the full model's own."""
        return self.max_new_tokens - (len(self.tokens) - self.prompt_length) - 1

    def read_prompt(self, cache: KVCache, num_cached: int = 0) -> Step:
        """The pass over the prompt, whose first ``num_cached`` tokens the cache of this sequence
        alone holds; it decides the first token.
        """
        begin = perf_counter()  # whatever a step decides was read from the device within it
        prompt = torch.tensor([self.tokens[num_cached:]])
        logits = self.decoder.prefill(prompt, cache, start=num_cached)
        _, token = self.decide(NO_DRAFT, logits[0])
        kept = self.keep((token,))
        seconds = perf_counter() - begin
        logprobs = self.take_logprobs(len(kept))
        return Step(kept, 0, 0, "prefill", 0.0, seconds, self.finish, logprobs=logprobs)

    def read_part(self, cache: KVCache, begin: int, end: int) -> None:
        """The pass over prompt tokens ``begin`` to ``end`` (excluded), which are not its last."""
        self.decoder.prefill(torch.tensor([self.tokens[begin:end]]), cache, start=begin)

    @property
    def takes_best(self) -> bool:
        """Whether the highest logit decides every token: then no other need be known."""
        best = self.processed is None and self.sampler.takes_best
        return best and self.request.logprobs is None

    def decide(self, draft: Draft, logits: torch.Tensor) -> tuple[int, int]:
        """Which drafted tokens are accepted, and the token that follows them.

        Args:
            draft: what was drafted.
            logits: ``[1 + draft.width, V]`` behind the pending token and each of the draft's nodes.

        Returns:
            (row, token) as `Draft.follow`; the token may be `INVALID_TOKEN`.
        """
        if self.processed is not None:
            row, token = self.processed.decide(draft, logits)
        else:
            chosen = self.sampler.choose(logits, len(self.tokens), draft.nodes, draft.parents)
            row, token = draft.follow(chosen)
        if self.request.logprobs is not None:
            self._note_logprobs(draft, logits, row, token)
        return row, token

    def _note_logprobs(self, draft: Draft, logits: torch.Tensor, row: int, token: int) -> None:
        """Note those of the tokens decided; what is decided again is noted again."""
        count = min(self.request.logprobs or 0, logits.shape[-1])
        rows, tokens = list(range(row + 1)), [*draft.tokens[:row], token]
        if row > len(draft.tokens):  # a leaf beside the chain
            parent = draft.parents[row - 1]
            rows = [*range(parent + 1), row]
            tokens = [*draft.tokens[:parent], draft.nodes[row - 1], token]
        for position, (at, each) in enumerate(zip(rows, tokens, strict=True), len(self.tokens)):
            if each != INVALID_TOKEN:
                self._logprobs[position] = TokenLogprobs.of(logits[at], each, count)

    def take_logprobs(self, count: int) -> tuple[TokenLogprobs, ...]:
        """Those of the last ``count`` tokens; none where they are not asked for."""
        if self.request.logprobs is None:
            return ()
        begin = len(self.tokens) - count
        found = (self._logprobs.pop(at, None) for at in range(begin, begin + count))
        return tuple(each for each in found if each is not None)

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
            watched = self.request.on_token is not None and self.request.on_token(token)
            ended = self.processed is not None and self.processed.ends(len(self.tokens))
            if token in self.end_tokens or watched or ended:
                self.finish = "stop"
            elif len(self.tokens) - self.prompt_length >= self.max_new_tokens:
                self.finish = "length"
            if self.finish:
                break
        self.sampler.mark_seen(tokens[:kept])
        return tokens[:kept]
