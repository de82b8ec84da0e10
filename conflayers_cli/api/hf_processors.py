"""Decoding under transformers' logits processors and stopping criteria.

Both may be user code that keeps state, so they are called as by transformers' own loop: once for
each token, in order, with the text up to there; for a drafted token only once all tokens before it
are accepted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from conflayers_cli.engine.argmax import INVALID_TOKEN
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.sampler import Sampler
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.generation.serial import BeginGeneration
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.spec_decode.proposer import Draft, Proposer

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
    """(the sampling parameters nearest to the processors, whether they do exactly the same).

    ``padding``: the number of padding tokens left of each prompt.
    """
    found: dict[str, float] = {}
    exact, last = True, -1
    for processor in processors:
        values = _values(processor, padding)
        order = _KNOWN.index(type(processor)) if values else last
        exact = exact and order > last and (do_sample or order == 0)
        last = max(last, order)
        found |= values
    if not do_sample:
        found = {key: v for key, v in found.items() if key == "repetition_penalty"}
    return SamplingParams(**{"temperature": float(do_sample), **found, "seed": seed}), exact  # type: ignore[arg-type]


def _values(processor: Any, padding: Sequence[int]) -> dict[str, Any]:
    """A processor as a field of `SamplingParams`; none where there is no such field."""
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
    if kind is TopKLogitsWarper:  # its top_k is at least `min_tokens_to_keep`
        return {"top_k": int(processor.top_k)}
    if processor.min_tokens_to_keep != 1:
        return {}
    if kind is TopPLogitsWarper:
        return {"top_p": float(processor.top_p)} if processor.top_p > 0 else {}
    return {"min_p": float(processor.min_p)}


class ProcessedText:
    """One text as processors and criteria see it.

    Args:
        ids: int64 ``[1, L]``, the prompt with its padding on the left.
        max_new_tokens: the most tokens that can follow.
        processors, criteria: transformers' lists of them.
        row, rows: its row of a batch of how many; processors get as many rows as they expect.
        recording: keep scores and logits of every token.

    Attributes:
        length: tokens so far, with the padding.
        scores, logits: float32 ``[1, V]`` for each token, processed and as they were.
    """

    def __init__(
        self,
        ids: torch.Tensor,
        max_new_tokens: int,
        processors: Callable[..., torch.Tensor],
        criteria: Callable[..., torch.Tensor],
        *,
        row: int = 0,
        rows: int = 1,
        recording: bool = False,
    ) -> None:
        self._buffer = torch.cat([ids, ids.new_zeros((1, max_new_tokens))], dim=1)
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
        """Append a token; returns whether the criteria end the text with it."""
        self._buffer[0, self.length] = token
        self.length += 1
        return bool(self._criteria(self.ids, tuple(self.scores) or None).all())


class ProcessedGeneration(Generation):
    """`Generation` whose tokens are chosen and ended by transformers' processors and criteria.

    Drafts are chains by the request's sampling, which need only be near what the processors do. The
    request's ``on_token`` is called, but can't end the text.
    """

    def __init__(
        self,
        decoder: Decoder,
        text: ProcessedText,
        request: GenerationRequest,
        *,
        proposer: Proposer | None,
        end_tokens: frozenset[int],
    ) -> None:
        self._text = text
        self._padding = text.length - len(request.prompt)
        self._ended = False
        self._put = request.on_token
        watched = replace(request, on_token=self._watched)
        super().__init__(decoder, watched, proposer=proposer, end_tokens=end_tokens)
        # Scores are processed already: what is left to do is to sample, by the same random numbers.
        plain = SamplingParams(
            temperature=float(not request.sampling.greedy), seed=request.sampling.seed
        )
        self._plain = Sampler(
            plain, decoder.vocabulary, decoder.device, request.prompt, request.answer
        )

    @property
    def takes_best(self) -> bool:
        return False

    def decide(self, draft: Draft, logits: torch.Tensor) -> tuple[int, int]:
        for index in count():
            scores = self._text.process(logits[index])[None]
            token = self._plain.choose(scores, len(self.tokens) + index)[0]
            if token == INVALID_TOKEN:
                break
            self._ended = self._text.add(token)
            if self._ended or token not in draft.tokens[index : index + 1]:
                break
        return index, token

    def _read_ahead(self) -> tuple[int, ...]:
        """None: such passes choose by the logits alone."""
        return ()

    def _watched(self, token: int) -> bool:
        if self._put is not None:
            self._put(token)
        return self._ended and len(self.tokens) + self._padding == self._text.length


def begin_processed(decoder: Decoder, texts: Iterable[ProcessedText]) -> BeginGeneration:
    """A function that begins a `ProcessedGeneration` for each request, on the next text."""
    following = iter(texts)

    def begin(
        request: GenerationRequest, /, *, proposer: Proposer | None, end_tokens: frozenset[int]
    ) -> Generation:
        text = next(following)
        return ProcessedGeneration(decoder, text, request, proposer=proposer, end_tokens=end_tokens)

    return begin
