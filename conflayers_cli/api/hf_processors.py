"""transformers' logits processors as the engine's own sampling, and texts decoded by them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.processed import ProcessedGeneration, ProcessedText
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.generation.serial import BeginGeneration
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.spec_decode.proposer import Proposer

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


def begin_processed(decoder: Decoder, texts: Iterable[ProcessedText]) -> BeginGeneration:
    """A function that begins a `ProcessedGeneration` for each request, on the next text."""
    following = iter(texts)

    def begin(
        request: GenerationRequest, /, *, proposer: Proposer | None, end_tokens: frozenset[int]
    ) -> Generation:
        text = next(following)
        return ProcessedGeneration(decoder, text, request, proposer=proposer, end_tokens=end_tokens)

    return begin
