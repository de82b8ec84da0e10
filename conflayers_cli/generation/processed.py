"""Tokens chosen under transformers' logits processors and stopping criteria.

Both may be user code that keeps state, so they are called as by transformers' own loop: once for
each token, in order, with the text up to there; for a drafted token only once all tokens before it
are accepted. A text is always a row of its own, whatever it is decoded beside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import (
    EncoderRepetitionPenaltyLogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from conflayers_cli.engine.argmax import INVALID_TOKEN
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.sampler import Sampler
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.spec_decode.proposer import Draft

_BEFORE_PENALTY = (SequenceBiasLogitsProcessor, EncoderRepetitionPenaltyLogitsProcessor)


class ProcessedText:
    """One text as processors and criteria see it.

    Args:
        ids: int64 ``[1, L]``, the prompt with its padding on the left; processors run on its
            device.
        max_new_tokens: the most tokens that can follow.
        processors: transformers' list of them, which take a batch of one.
        criteria: transformers' list of them; None: none end the text.
        samples: whether the processors do all that the request's sampling asks for, but for the
            draw; else they come before it, in place of its repetition penalty.
        recording: keep scores and logits of every token.

    Attributes:
        length: tokens so far, with the padding.
        ended: whether the criteria have ended the text.
        scores, logits: float32 ``[1, V]`` for each token, processed and as they were.
    """

    def __init__(
        self,
        ids: torch.Tensor,
        max_new_tokens: int,
        processors: Callable[..., torch.Tensor],
        criteria: Callable[..., torch.Tensor] | None = None,
        *,
        samples: bool = False,
        recording: bool = False,
    ) -> None:
        self._buffer = torch.cat([ids, ids.new_zeros((1, max_new_tokens))], dim=1)
        self.length = ids.shape[1]
        self._processors, self._criteria = processors, criteria
        self.samples = samples
        self._recording = recording
        self.ended = False
        self.scores: list[torch.Tensor] = []
        self.logits: list[torch.Tensor] = []

    @property
    def ids(self) -> torch.Tensor:
        """The text so far, int64 ``[1, L]``."""
        return self._buffer[:, : self.length]

    def process(self, logits: torch.Tensor) -> torch.Tensor:
        """What the processors make of the logits ``[V]`` behind the text: float32 ``[1, V]``."""
        # A copy outside of inference mode, which processors may write to.
        own = logits.to(self._buffer.device, torch.float32, copy=True)[None]
        if self._recording:
            self.logits.append(own.clone())
        scores = self._processors(self.ids, own)
        if self._recording:
            self.scores.append(scores)
        return scores

    def add(self, token: int) -> bool:
        """Append a token; returns whether the criteria end the text with it."""
        self._buffer[0, self.length] = token
        self.length += 1
        if self._criteria is not None:
            self.ended = bool(self._criteria(self.ids, tuple(self.scores) or None).all())
        return self.ended


class ProcessedChoice:
    """How the tokens of one sequence are chosen on its `ProcessedText`.

    Drafts are made by the request's sampling, which need only be near what the processors do.
    """

    def __init__(self, decoder: Decoder, request: GenerationRequest, text: ProcessedText) -> None:
        self._text = text
        self._padding = text.length - len(request.prompt)
        sampling = request.sampling
        if text.samples:  # what is left to do is to draw, by the same random numbers
            sampling = SamplingParams(temperature=float(not sampling.greedy), seed=sampling.seed)
        self._sampler = Sampler(
            replace(sampling, repetition_penalty=1.0),
            decoder.vocabulary,
            decoder.device,
            request.prompt,
            request.answer,
            request.adjustments,
        )

    @classmethod
    def of(cls, decoder: Decoder, request: GenerationRequest) -> ProcessedChoice | None:
        """By the request's text or its processors; None where it has neither."""
        text = request.text
        if text is None and request.processors:
            text = _text_of(request)
        return None if text is None else cls(decoder, request, text)

    def decide(self, draft: Draft, logits: torch.Tensor) -> tuple[int, int]:
        """Arguments and result as of `Sequence.decide`. Tokens decided are part of the text."""
        row: int | None = 0
        while row is not None:
            at = row
            scores = self._text.process(logits[at])
            token = self._sampler.choose(scores, self._text.length - self._padding)[0]
            if token == INVALID_TOKEN:
                break
            self._sampler.mark_seen((token,))
            row = None if self._text.add(token) else draft.next_row(at, token)
        return at, token

    def ends(self, length: int) -> bool:
        """Whether the criteria have ended the text, at this length without padding."""
        return self._text.ended and length + self._padding == self._text.length


def _text_of(request: GenerationRequest) -> ProcessedText:
    """With the sampling's repetition penalty where transformers has it in its order.

    On the CPU, where the model's settings have their tensors, too.
    """
    processors = LogitsProcessorList(request.processors)
    penalty = request.sampling.repetition_penalty
    if penalty != 1:
        before = sum(type(each) in _BEFORE_PENALTY for each in processors)
        processors.insert(before, RepetitionPenaltyLogitsProcessor(float(penalty)))
    return ProcessedText(torch.tensor([request.prompt]), request.max_new_tokens, processors)
