"""Decoding under transformers' logits processors and stopping criteria.

Both may be user code that keeps state, so they are called as by transformers' own loop: once for
each token, in order, with the text up to there; for a drafted token only once all tokens before it
are accepted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteriaList,
)

from conflayers_cli.engine.argmax import INVALID_TOKEN
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.sampler import Sampler
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.spec_decode.proposer import Draft, Proposer


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

    Drafts are chains by the request's sampling, which need only be near what the processors do.

    Args:
        decoder, request, proposer, end_tokens: as for `Generation`.
        text: the prompt, its processors and criteria.
        samples_too: whether processors leave out what the request's sampling asks for; else they
            do all of it, but for the draw.
        more: further keywords of `Generation`.
    """

    def __init__(
        self,
        decoder: Decoder,
        text: ProcessedText,
        request: GenerationRequest,
        *,
        proposer: Proposer | None,
        end_tokens: frozenset[int],
        samples_too: bool = False,
        **more: Any,
    ) -> None:
        self._text = text
        self._padding = text.length - len(request.prompt)
        self._ended = False
        self._put = request.on_token
        watched = replace(request, on_token=self._watched)
        super().__init__(decoder, watched, proposer=proposer, end_tokens=end_tokens, **more)
        # Scores are processed already: what is left to do is to sample, by the same random numbers.
        plain = SamplingParams(
            temperature=float(not request.sampling.greedy), seed=request.sampling.seed
        )
        if samples_too:
            plain = replace(request.sampling, repetition_penalty=1.0)
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
        told = self._put is not None and self._put(token)
        return told or (self._ended and len(self.tokens) + self._padding == self._text.length)


def begin_generation(decoder: Decoder, request: GenerationRequest, **more: Any) -> Generation:
    """A generation of a request, by its processors where it has any: its repetition penalty goes
    before them, as transformers orders them. Keywords as of `Generation`."""
    if not request.processors:
        return Generation(decoder, request, **more)
    processors = LogitsProcessorList(request.processors)
    penalty = request.sampling.repetition_penalty
    if penalty != 1:
        at = sum(isinstance(each, SequenceBiasLogitsProcessor) for each in processors)
        processors.insert(at, RepetitionPenaltyLogitsProcessor(penalty))
    text = ProcessedText(
        torch.tensor([request.prompt], device=decoder.device),
        request.max_new_tokens,
        processors,
        StoppingCriteriaList(),
    )
    return ProcessedGeneration(decoder, text, request, samples_too=True, **more)
