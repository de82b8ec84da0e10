"""What a model's generation config says of its texts, beside end tokens: which tokens may come, and
what ends a text. transformers' `generate` follows it, so it is part of the model's own output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from conflayers_cli.errors import InputError
from conflayers_cli.utils.error_text import first_line

if TYPE_CHECKING:
    from conflayers_cli.sampling_params import SamplingParams

SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p")
"""Of a generation config, what `SamplingParams` has fields for."""
REFUSED = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "constraints": (None,),
    "force_words_ids": (None,),
    "penalty_alpha": (None, 0, 0.0),
    "guidance_scale": (None, 1, 1.0),
    "watermarking_config": (None,),
    "typical_p": (None, 1, 1.0),
    "epsilon_cutoff": (None, 0, 0.0),
    "eta_cutoff": (None, 0, 0.0),
    "dola_layers": (None,),
    "token_healing": (None, False),
    "top_h": (None,),
}
"""Settings that are not followed unless they have one of these values; a note says so."""


def _unusable(name: str, value: object, why: object) -> InputError:
    return InputError(
        f"{name} {value!r:.60} in the model's generation config can't be followed: {why}"
    )


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _unusable(name, value, "it is no number")
    try:
        return float(value)
    except OverflowError as error:
        raise _unusable(name, "of too many digits", error) from None


@dataclass(frozen=True)
class GenerationSettings:
    """A model's settings.

    Attributes:
        config: the generation config.
        end_tokens: ids that end a text.
    """

    config: Any
    end_tokens: frozenset[int]

    @property
    def repetition_penalty(self) -> float:
        """1: none; InputError: it is no number."""
        given = getattr(self.config, "repetition_penalty", None)
        return _number("repetition_penalty", given or 1.0)

    def complete(self, sampling: SamplingParams, *, own: bool = False) -> SamplingParams:
        """``sampling`` with the model's repetition penalty, where it has none.

        ``own``: with all that the model's settings say of sampling. InputError: they are unusable.
        """
        more: dict[str, float] = self.sampling if own else {}
        if sampling.repetition_penalty == 1:
            more["repetition_penalty"] = self.repetition_penalty
        try:
            return replace(sampling, **more)  # type: ignore[arg-type]
        except InputError as error:  # without names: no option is to blame
            raise InputError(f"the model's generation config: {error}") from error

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end a text."""
        given = getattr(self.config, "stop_strings", None) or ()
        return (given,) if isinstance(given, str) else tuple(filter(None, given))

    @property
    def sampling(self) -> dict[str, float]:
        """The model's own sampling, as fields of `SamplingParams`: greedy if it does not sample.

        InputError: a value is no number.
        """
        if not getattr(self.config, "do_sample", None):
            return {"temperature": 0.0}
        given = {name: getattr(self.config, name, None) for name in SAMPLING_KEYS}
        found = {name: value for name, value in given.items() if value is not None}
        if not found.get("top_k"):
            found.pop("top_k", None)  # 0: all tokens
        for name, value in found.items():
            _number(name, value)
        return {"temperature": 1.0, **found}

    @property
    def ignored(self) -> list[str]:
        """Settings that are not followed, as ``name value``."""
        return [
            f"{name} {value}"
            for name, usual in REFUSED.items()
            if (value := getattr(self.config, name, None)) not in usual
        ]

    def processors(self, prompt: Sequence[int], max_new_tokens: int) -> tuple[Any, ...]:
        """transformers' logits processors for one prompt, in the order of its `generate`, without
        the repetition penalty and what is about sampling.

        Raises:
            InputError: a setting has a value that none can follow.
        """
        config, ends = self.config, sorted(self.end_tokens)
        prompt_length, ids = len(prompt), torch.tensor([prompt])
        most = prompt_length + max_new_tokens
        found: list[Any] = []

        def add(name: str, make: Any, *, count: bool = False) -> None:
            value = getattr(config, name, None)
            if value is None or value is False:
                return
            try:
                if not (count and value <= 0):
                    found.append(make(value))
            except (TypeError, ValueError) as error:
                raise _unusable(name, value, error) from error

        add("sequence_bias", SequenceBiasLogitsProcessor)
        if getattr(config, "encoder_repetition_penalty", None) != 1:
            add(
                "encoder_repetition_penalty",
                lambda penalty: EncoderRepetitionPenaltyLogitsProcessor(float(penalty), ids),
            )
        add("no_repeat_ngram_size", NoRepeatNGramLogitsProcessor, count=True)
        add(
            "encoder_no_repeat_ngram_size",
            lambda size: EncoderNoRepeatNGramLogitsProcessor(size, ids),
            count=True,
        )
        add("bad_words_ids", lambda words: NoBadWordsLogitsProcessor(words, ends or None))
        if ends:
            if getattr(config, "min_new_tokens", None) is None:  # which takes precedence
                add("min_length", lambda length: MinLengthLogitsProcessor(length, ends), count=True)
            add(
                "min_new_tokens",
                lambda new: MinNewTokensLengthLogitsProcessor(prompt_length, new, ends),
                count=True,
            )
        add("forced_bos_token_id", ForcedBOSTokenLogitsProcessor)
        add("forced_eos_token_id", lambda token: ForcedEOSTokenLogitsProcessor(most, token))
        add("remove_invalid_values", lambda _: InfNanRemoveLogitsProcessor())
        if ends:
            add(
                "exponential_decay_length_penalty",
                lambda decay: ExponentialDecayLengthPenalty(tuple(decay), ends, prompt_length),
            )
        add("suppress_tokens", SuppressTokensLogitsProcessor)
        add("begin_suppress_tokens", self._suppressed_at_begin(prompt_length))
        return tuple(found)

    def _suppressed_at_begin(self, prompt_length: int) -> Any:
        """As `generate`: a token that is forced first moves the begin by one."""
        forced = getattr(self.config, "forced_bos_token_id", None)
        begin = prompt_length if prompt_length > 1 or forced is None else prompt_length + 1

        def make(tokens: Sequence[int]) -> Any:
            return SuppressTokensAtBeginLogitsProcessor(list(tokens), begin)

        return make


def check_settings(settings: GenerationSettings, vocabulary: int, source: str) -> None:
    """Try a generation config's processors on scores of zero: a file may hold anything.

    Raises:
        InputError: it can't be followed.
    """
    try:
        for stop in settings.stops:
            if not isinstance(stop, str):
                raise TypeError(f"stop_strings has {stop!r:.60}")
        _ = settings.repetition_penalty
        tokens = torch.zeros(1, 2, dtype=torch.long)
        for processor in settings.processors([0, 0], 2):
            processor(tokens, torch.zeros(1, vocabulary))
    except InputError as error:
        raise InputError(f"{source}: {first_line(error)[:200]}") from error
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        cause = first_line(error)[:200]
        raise InputError(f"{source}: the model's generation config is broken: {cause}") from error
