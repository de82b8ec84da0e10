"""One text being decoded: its tokens, how they are chosen, where it ends, and its steps."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import torch

from conflayers_cli.engine.argmax import INVALID_TOKEN, LogitsError, greedy_tokens
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.sampler import Sampler
from conflayers_cli.errors import InputError
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.spec_decode.proposer import Draft
from conflayers_cli.spec_decode.rejection_sampler import accept_greedy, accept_sampled

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Step:
    """What one step decided.

    Attributes:
        tokens: the new tokens, in order; one at least.
        drafted: tokens drafted in this step: the chain's length, without leaves beside it.
        accepted: drafted tokens that were kept; a leaf that took a chain token's place is one,
            where it gained a token in this step (see `engine.tree`).
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
    finish: FinishReason | None
    leaves: int = 0
    sources: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return self.draft_seconds + self.verify_seconds


def check_request(decoder: Decoder, request: GenerationRequest) -> None:
    """Raise InputError unless this model can decode the request."""
    strange = [token for token in request.prompt if not 0 <= token < decoder.vocabulary]
    if strange:
        raise InputError(
            f"the prompt has token id {strange[0]}, but the model's vocabulary ends at "
            f"{decoder.vocabulary - 1}: tokenizer and model don't belong together"
        )
    length, bound = request.length, decoder.exact_positions
    if bound is not None and length > bound:
        raise InputError(
            f"prompt and output have up to {length} tokens, but beyond {bound} this model's "
            "rotary embedding changes with the length and can't be decoded exactly"
        )


class Sequence:
    """One text at work.

    Args:
        decoder: the model.
        request: what is to be decoded.
        end_tokens: ids that end the output; kept as its last token.

    Attributes:
        request: what is decoded.
        tokens: prompt and output.
        steps: what was decided, in order.
        finish: why it ended, None while it goes on.
        filled: how many of the prompt's first tokens were in the cache before.

    Raises:
        InputError: a token the model does not have, or a length at which it can't be decoded
            exactly.
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
        self.filled = 0
        self.steps: list[Step] = []
        self.sampler = Sampler(request.sampling, decoder.vocabulary, decoder.device)
        self._on_token = request.on_token

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
            cache: of this sequence alone.
            filled: how many of the prompt's first tokens it holds; fewer than all.
        """
        begin = perf_counter()  # whatever a step decides was read from the device within it
        self.sampler.saw(self.tokens)
        prompt = torch.tensor([self.tokens[filled:]])
        logits = self.decoder.prefill(prompt, cache, start=filled)
        kept = self.keep((self.sampler.choose(logits[0]),))
        return Step(kept, 0, 0, "prefill", 0.0, perf_counter() - begin, self.finish)

    def decide(
        self, draft: Draft, logits: torch.Tensor, best: list[int] | None = None
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
            watched = self._on_token is not None and self._on_token(token)
            if token in self.end_tokens or watched:
                self.finish = "stop"
            elif len(self.tokens) - self.prompt_length >= self.max_new_tokens:
                self.finish = "length"
            if self.finish:
                break
        self.sampler.saw(tokens[:kept])
        return tokens[:kept]
