"""Decoding under transformers' logits processors and stopping criteria.

Both are somebody's code, and may remember what they were called with. So they are called as
transformers' own loop calls them, once for each token of the text, in order, with the text up to
there; a token that was drafted is looked at only once all tokens before it stand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from conflayers_cli.engine.argmax import INVALID_TOKEN, greedy_tokens
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.generation.loop import NOTHING, Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.generation.sequence import Step
from conflayers_cli.generation.serial import Begin
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.spec_decode.proposer import Draft, Proposer
from conflayers_cli.spec_decode.rejection_sampler import accept_sampled

_KNOWN = (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
)
"""What the engine's own `SamplingParams` does, in its order."""


def as_sampling(
    processors: Sequence[Any], do_sample: bool, seed: int, padding: Sequence[int]
) -> tuple[SamplingParams, bool]:
    """Settings of the engine's that do what the processors do, or nearly so.

    Args:
        processors: transformers', as its ``generate`` prepared them.
        do_sample: whether tokens are drawn.
        seed: of what is drawn.
        padding: how many tokens stand left of each prompt that no processor is to see.

    Returns:
        (settings, whether they are the processors' very law).
    """
    found: dict[str, float] = {}
    exact, last = True, -1
    for processor in processors:
        values = _values(processor, padding)
        place = _KNOWN.index(type(processor)) if values else last
        exact = exact and place > last and (do_sample or place == 0)
        last = max(last, place)
        found |= values
    if not do_sample:
        found = {key: v for key, v in found.items() if key == "repetition_penalty"}
    return SamplingParams(**{"temperature": float(do_sample), **found, "seed": seed}), exact  # type: ignore[arg-type]


def _values(processor: Any, padding: Sequence[int]) -> dict[str, Any]:
    """A processor as one of the engine's settings; none where it is something else."""
    kind = type(processor)
    if kind is RepetitionPenaltyLogitsProcessor:
        unseen = processor.prompt_ignore_length
        if isinstance(unseen, torch.Tensor):
            own = unseen.tolist() == list(padding)
        else:  # transformers 5.17 takes padding for text
            own = unseen is None and not any(padding)
        return {"repetition_penalty": float(processor.penalty)} if own else {}
    if kind is TemperatureLogitsWarper:
        return {"temperature": float(processor.temperature)}
    if kind not in _KNOWN or processor.filter_value != -math.inf:
        return {}
    if kind is TopKLogitsWarper:  # it keeps no fewer than it is told by `min_tokens_to_keep`
        return {"top_k": int(processor.top_k)}
    if processor.min_tokens_to_keep != 1:
        return {}
    if kind is TopPLogitsWarper:
        return {"top_p": float(processor.top_p)} if processor.top_p > 0 else {}
    return {"min_p": float(processor.min_p)}


class Text:
    """One text as processors and criteria see it.

    Args:
        ids: int64 ``[1, L]``, the prompt with the padding on its left.
        room: the most tokens that can follow.
        processors, criteria: transformers' lists of them.
        row, rows: which row of a batch it is, and of how many: processors that know one another's
            rows get as many as they expect.
        recording: keep scores and logits of every token.

    Attributes:
        length: tokens so far, with the padding.
        scores, logits: float32 ``[1, V]`` for each token, processed and as they were.
    """

    def __init__(
        self,
        ids: torch.Tensor,
        room: int,
        processors: Callable[..., torch.Tensor],
        criteria: Callable[..., torch.Tensor],
        *,
        row: int = 0,
        rows: int = 1,
        recording: bool = False,
    ) -> None:
        self._buffer = torch.cat([ids, ids.new_zeros((1, room))], dim=1)
        self.length = ids.shape[1]
        self._processors, self._criteria = processors, criteria
        self._row, self._rows = row, rows
        self._recording = recording
        self.scores: list[torch.Tensor] = []
        self.logits: list[torch.Tensor] = []

    @property
    def ids(self) -> torch.Tensor:
        """The text so far, int64 ``[1, L]``."""
        return self._buffer[:, : self.length]

    def process(self, logits: torch.Tensor) -> torch.Tensor:
        """What the processors make of the logits ``[V]`` behind the text: float32 ``[V]``."""
        # A copy outside of inference mode, which processors may write to.
        own = logits.to(self._buffer.device, torch.float32, copy=True)[None]
        if self._recording:
            self.logits.append(own.clone())
        if self._rows > 1:
            ids, many = self.ids.repeat(self._rows, 1), own.repeat(self._rows, 1)
            scores = self._processors(ids, many)[self._row, None]
        else:
            scores = self._processors(self.ids, own)
        if self._recording:
            self.scores.append(scores)
        return scores[0]

    def add(self, token: int) -> bool:
        """Append a token; whether the criteria end the text with it."""
        self._buffer[0, self.length] = token
        self.length += 1
        return bool(self._criteria(self.ids, tuple(self.scores) or None).all())


class ProcessedGeneration(Generation):
    """`Generation` whose tokens are chosen and ended by transformers' processors and criteria.

    Drafts are chains; they are made as the request's sampling says, which need only be near what
    the processors do.

    Args:
        text: the text, prompt included.
        request: as for `Generation`; it is not asked whether a token ends the text.
        others: as for `Generation`.
    """

    def __init__(
        self,
        decoder: Decoder,
        text: Text,
        request: GenerationRequest,
        *,
        drafter: Proposer | None,
        end_tokens: frozenset[int],
    ) -> None:
        self._text = text
        self._padding = text.length - len(request.prompt)
        self._ended = False
        self._put = request.on_token
        watched = replace(request, on_token=self._watched)
        super().__init__(decoder, watched, drafter=drafter, end_tokens=end_tokens)

    def read_prompt(self, cache: KVCache, filled: int = 0) -> Step:
        begin = perf_counter()
        self.sampler.saw(self.tokens)
        logits = self.decoder.prefill(torch.tensor([self.tokens[filled:]]), cache, start=filled)
        _, token = self.decide(NOTHING, logits[0])
        kept = self.keep((token,))
        return Step(kept, 0, 0, "prefill", 0.0, perf_counter() - begin, self.finish)

    def decide(
        self, draft: Draft, logits: torch.Tensor, best: list[int] | None = None
    ) -> tuple[int, int]:
        place = 0
        while True:
            token = self._choose(self._text.process(logits[place]), draft, place)
            if token == INVALID_TOKEN:
                return place, token
            self._ended = self._text.add(token)
            if self._ended or token not in draft.tokens[place : place + 1]:
                return place, token
            place += 1

    def _choose(self, scores: torch.Tensor, draft: Draft, place: int) -> int:
        """The token at a place of the draft, or behind it, from its scores ``[V]``."""
        if self.sampler.settings.greedy:
            return int(greedy_tokens(scores))
        p = torch.softmax(scores, dim=-1).to(self.decoder.device)
        if place == len(draft.tokens):
            return self.sampler.draw(p)
        drafted = draft.tokens[place]
        q = None if draft.distribution is None else draft.distribution[place, None]
        # What would follow an accepted token is decided next, so its row can be any.
        stands, token = accept_sampled((drafted,), p.expand(2, -1), q, self.sampler)
        return drafted if stands else token

    def _fed(self) -> tuple[int, ...]:
        """None: passes launched ahead choose by the logits alone."""
        return ()

    def _watched(self, token: int) -> bool:
        if self._put is not None:
            self._put(token)
        return self._ended and len(self.tokens) + self._padding == self._text.length


def processing(decoder: Decoder, texts: Iterable[Text]) -> Begin:
    """Begins a `ProcessedGeneration` for each request, on the next of the texts."""
    following = iter(texts)

    def begin(
        request: GenerationRequest, /, *, drafter: Proposer | None, end_tokens: frozenset[int]
    ) -> Generation:
        text = next(following)
        return ProcessedGeneration(decoder, text, request, drafter=drafter, end_tokens=end_tokens)

    return begin
