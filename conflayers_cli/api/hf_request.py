"""The arguments of transformers' `generate`, checked for what the engine can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import EosTokenCriteria, MaxLengthCriteria
from transformers.generation import (
    GenerationMode,
    StoppingCriteriaList,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from conflayers_cli.api.hf_processors import as_sampling
from conflayers_cli.errors import InputError
from conflayers_cli.sampling_params import SamplingParams

_CHECKED = frozenset({"attention_mask", "position_ids", "past_key_values"})
_HARMLESS = frozenset({"use_cache", "logits_to_keep", "cache_position"})
"""Arguments of a model's forward that don't change what is decoded."""
_STATEFUL = (SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)
"""transformers' processors that keep state between calls."""


class GenerateError(InputError, ValueError):
    """Something that `conflayers_generate` can't do."""


@dataclass(frozen=True)
class HFRequest:
    """What `generate` is asked for.

    Attributes:
        input_ids: int64 ``[B, L]``.
        padding: number of padding tokens left of each prompt.
        processors: logits processors.
        sampling: what they do as the engine's parameters, or nearly so.
        same_law: it is exactly what they do.
        recording: scores or logits are asked for.
        pad: the token behind texts that end before others, if any.
    """

    input_ids: torch.Tensor
    padding: tuple[int, ...]
    processors: Any
    sampling: SamplingParams
    same_law: bool
    recording: bool
    pad: int | None

    @classmethod
    def parse(
        cls, input_ids: torch.Tensor, processors: Any, config: Any, model_kwargs: Mapping[str, Any]
    ) -> HFRequest:
        """Raises GenerateError where something can't be done."""
        _check_config(config)
        _check_kwargs(model_kwargs, input_ids)
        padding = _padding(input_ids, model_kwargs)
        # One number from torch's own generator: torch.manual_seed decides what is drawn.
        seed = int(torch.randint(2**62, ())) if config.do_sample else 0
        sampling, same_law = as_sampling(processors, bool(config.do_sample), seed, padding)
        pad = getattr(config, "_pad_token_tensor", None)
        recording = bool(
            config.return_dict_in_generate and (config.output_scores or config.output_logits)
        )
        if len(input_ids) > 1 and recording:
            raise GenerateError("output_scores, output_logits: for one text at a time")
        if len(input_ids) > 1:
            _check_stateless(processors, "logits_processor")
        return cls(
            input_ids=input_ids,
            padding=padding,
            processors=processors,
            sampling=sampling,
            same_law=same_law,
            recording=recording,
            pad=None if pad is None else int(pad),
        )

    @property
    def batch_size(self) -> int:
        return self.input_ids.shape[0]

    @property
    def chosen_by_engine(self) -> bool:
        """Whether the engine itself can choose the tokens, without the processors."""
        return self.same_law and not self.recording

    @property
    def prompts(self) -> list[list[int]]:
        ids = self.input_ids.tolist()
        return [own[padding:] for own, padding in zip(ids, self.padding, strict=True)]


@dataclass(frozen=True)
class StopConditions:
    """What ends a text: the token budget, end tokens, and ``others`` of ``all`` criteria."""

    max_new_tokens: int
    end_tokens: frozenset[int]
    others: Any
    all: Any

    @classmethod
    def parse(cls, criteria: Any, request: HFRequest) -> StopConditions:
        """Raises GenerateError where something can't be done."""
        lengths = [each.max_length for each in criteria if type(each) is MaxLengthCriteria]
        if not lengths:
            raise GenerateError("max_new_tokens: is needed, or max_length")
        ends = [each for each in criteria if type(each) is EosTokenCriteria]
        others = [e for e in criteria if type(e) not in (MaxLengthCriteria, EosTokenCriteria)]
        if request.batch_size > 1:
            _check_stateless(others, "stopping_criteria")
            if others and not ends:
                raise GenerateError(
                    "eos_token_id: without one, texts of a batch that stop can't be padded: "
                    "one at a time"
                )
        return cls(
            max_new_tokens=int(min(lengths)) - request.input_ids.shape[1],
            end_tokens=frozenset(int(i) for each in ends for i in each.eos_token_id.flatten()),
            others=StoppingCriteriaList(others),
            all=criteria,
        )


def _check_config(config: Any) -> None:
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise GenerateError(
            f"{mode.value.replace('_', ' ')} is asked for: tokens are chosen greedily or drawn "
            "here, by one model (num_beams=1, no assistant; draft='ngram' looks prompts up)"
        )
    for name in ("output_attentions", "output_hidden_states"):
        if config.return_dict_in_generate and getattr(config, name, None):
            raise GenerateError(f"{name}: only sequences, scores and logits are to be had here")


def _check_kwargs(model_kwargs: Mapping[str, Any], input_ids: torch.Tensor) -> None:
    if model_kwargs.get("inputs_embeds") is not None:
        raise GenerateError("inputs_embeds: the engine reads tokens, give input_ids")
    if input_ids.shape[1] < 1:
        raise GenerateError("input_ids: the prompt has no tokens")
    # `generate` makes a cache of its own, too, and marks one that was given to it.
    if getattr(model_kwargs.get("past_key_values"), "_is_user_defined", False):
        raise GenerateError("past_key_values: the engine has a cache of its own, leave them out")
    given = {name for name, value in model_kwargs.items() if value is not None}
    if unknown := sorted(given - _CHECKED - _HARMLESS):
        raise GenerateError(f"{', '.join(unknown)}: only tokens go into the model here")


def _padding(input_ids: torch.Tensor, model_kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """The number of padding tokens left of each prompt.

    Raises:
        GenerateError: tokens are masked elsewhere, or positions are not consecutive.
    """
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    if mask.shape != input_ids.shape:
        raise GenerateError("attention_mask: has another shape than input_ids")
    seen = mask.ne(0).long()
    padding = tuple((seen.shape[1] - seen.sum(dim=1)).tolist())
    if max(padding) == seen.shape[1]:
        raise GenerateError(f"input_ids: prompt {padding.index(max(padding))} is all padding")
    if not torch.equal(seen.sort(dim=1).values, seen):
        raise GenerateError(
            "attention_mask: leaves out tokens that are no padding on the left "
            "(a tokenizer with padding_side='left' makes it so)"
        )
    positions = model_kwargs.get("position_ids")
    if positions is not None:
        expected = (seen.cumsum(dim=1) - 1).clamp(min=0)
        if not torch.equal((positions * seen).expand_as(seen), expected * seen):
            raise GenerateError(
                "position_ids: tokens stand one behind the other here, leave them out"
            )
    return padding


def _check_stateless(functions: Sequence[Any], what: str) -> None:
    """Raise GenerateError for what may treat a batch as a whole, or keeps state between calls.

    A program's own says by an attribute ``rowwise`` that it does neither.
    """
    for each in functions:
        if getattr(each, "rowwise", False):
            continue
        if isinstance(each, _STATEFUL):
            raise GenerateError(
                f"{what}: {type(each).__name__} keeps the state of a batch: one text at a time"
            )
        if not type(each).__module__.startswith("transformers."):
            raise GenerateError(
                f"{what}: {type(each).__name__} may depend on how a batch is decoded: one text at "
                "a time, or an attribute rowwise = True, which says that it treats each row alone"
            )
