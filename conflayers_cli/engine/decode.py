"""The loop: draft, verify, keep. Vanilla decoding is the same loop with nothing drafted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from conflayers_cli.errors import InputError

from .cache import KVCache
from .costs import clock
from .decoder import Decoder
from .draft import Context, Draft, Drafter
from .sampling import Sampler, Sampling, accept_greedy, accept_sampled

Finish = Literal["stop", "length"]
NOTHING = Draft()


@dataclass(frozen=True)
class Step:
    """What one step decided.

    Attributes:
        tokens: the new tokens, in order; one at least.
        drafted: tokens drafted in this step.
        accepted: drafted tokens that were kept.
        drafter: who drafted; "none" where nobody did, "prefill" for the step that reads the prompt.
        draft_seconds: time spent drafting.
        verify_seconds: time of the full pass and the choice of tokens.
        finish: why the output ends here ("stop": an end token or stop string; "length": the token
            budget), None while it goes on.
    """

    tokens: tuple[int, ...]
    drafted: int
    accepted: int
    drafter: str
    draft_seconds: float
    verify_seconds: float
    finish: Finish | None

    @property
    def seconds(self) -> float:
        return self.draft_seconds + self.verify_seconds


class Generation:
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

    Attributes:
        tokens: prompt and output.
        cache: keys and values of ``tokens`` but the last one.
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
        sampling: Sampling | None = None,
        drafter: Drafter | None = None,
        end_tokens: frozenset[int] = frozenset(),
        watch: Callable[[int], bool] | None = None,
    ) -> None:
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
        self.decoder = decoder
        self.drafter = drafter
        self.tokens = list(prompt)
        self.prompt_length = len(prompt)
        self.max_new_tokens = max_new_tokens
        self.end_tokens = end_tokens
        self.finish: Finish | None = None
        self.cache: KVCache = decoder.new_cache(len(prompt) + max_new_tokens)
        self.sampler = Sampler(sampling or Sampling(), decoder.vocabulary, decoder.device)
        self._watch = watch

    @property
    def output(self) -> list[int]:
        """The tokens produced so far."""
        return self.tokens[self.prompt_length :]

    def __iter__(self) -> Iterator[Step]:
        while self.finish is None:
            yield self.step()

    def step(self) -> Step:
        """Decide at least one more token. Not to be called once ``finish`` is set."""
        if len(self.tokens) == self.prompt_length:
            return self._prefill()
        begin = clock(self.decoder.device)
        draft = NOTHING
        room = self.max_new_tokens - (len(self.tokens) - self.prompt_length) - 1
        if self.drafter is not None and room > 0:
            context = Context(self.tokens, self.cache, self.sampler, self.end_tokens)
            draft = self.drafter.draft(context, room)
        drafted = clock(self.decoder.device) if draft.tokens else begin
        accepted, token = self._verify(draft)
        kept = self._keep((*draft.tokens[:accepted], token))
        return Step(
            tokens=kept,
            drafted=len(draft.tokens),
            accepted=min(accepted, len(kept)),
            drafter=self.drafter.name if self.drafter and draft.tokens else "none",
            draft_seconds=drafted - begin,
            verify_seconds=clock(self.decoder.device) - drafted,
            finish=self.finish,
        )

    def _prefill(self) -> Step:
        begin = clock(self.decoder.device)
        self.sampler.saw(self.tokens)
        prompt = torch.tensor([self.tokens], device=self.decoder.device)
        logits = self.decoder.prefill(prompt, self.cache)
        kept = self._keep((self.sampler.choose(logits[0]),))
        return Step(kept, 0, 0, "prefill", 0.0, clock(self.decoder.device) - begin, self.finish)

    def _verify(self, draft: Draft) -> tuple[int, int]:
        """One full pass over the pending token and the draft: (drafts that stand, next token)."""
        filled, device = len(self.tokens) - 1, self.decoder.device
        tokens = torch.tensor([[self.tokens[-1], *draft.tokens]], device=device)
        positions = torch.arange(filled, filled + tokens.shape[1], device=device)[None]
        logits = self.decoder.forward(tokens, positions, self.cache)[0]
        if self.sampler.settings.greedy:
            best = self.sampler.scores(logits, draft.tokens).argmax(dim=-1).tolist()
            return accept_greedy(draft.tokens, best)
        target = self.sampler.distribution(logits, draft.tokens)
        return accept_sampled(draft.tokens, target, draft.distribution, self.sampler)

    def _keep(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """Append tokens up to the first that ends the output; returns those kept."""
        kept = 0
        for token in tokens:
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
