"""transformers' logits processors as the engine's own sampling, and for one row of a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from conflayers_cli.sampling_params import SamplingParams

_KNOWN = (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
)
"""What the engine's own `SamplingParams` does, in its order."""
_BY_INDEX = (EncoderNoRepeatNGramLogitsProcessor, EncoderRepetitionPenaltyLogitsProcessor)
"""transformers' processors that keep something for each row of a batch."""


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


class _OneRow(LogitsProcessor):
    """A processor that knows the rows of its batch by their indices, for one of them alone."""

    def __init__(self, processor: Any, row: int, rows: int) -> None:
        self._processor, self._row, self._rows = processor, row, rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        many = input_ids.repeat(self._rows, 1), scores.repeat(self._rows, 1)
        processed: torch.Tensor = self._processor(*many)[self._row, None]
        return processed


def of_row(processors: Sequence[Any], row: int, rows: int) -> LogitsProcessorList:
    """The processors of a batch for one of its rows, which they are given as a batch of one."""
    return LogitsProcessorList(
        _of_row(each, row, rows) if rows > 1 else each for each in processors
    )


def _of_row(processor: Any, row: int, rows: int) -> Any:
    if type(processor) is PrefixConstrainedLogitsProcessor:  # its function is called for each row
        allowed = processor._prefix_allowed_tokens_fn
        return PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row, ids), num_beams=1)
    by_index = isinstance(processor, _BY_INDEX)
    if type(processor) is RepetitionPenaltyLogitsProcessor:
        by_index = isinstance(processor.prompt_ignore_length, torch.Tensor)
    return _OneRow(processor, row, rows) if by_index else processor
