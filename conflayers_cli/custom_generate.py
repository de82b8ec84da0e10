"""`model.generate(…, custom_generate=conflayers_generate)`: this engine under transformers' call.

transformers prepares everything, inputs, generation config, logits processors, stopping criteria,
and calls what it is given in place of its decoding loop. What comes out is what its own loop gives:
greedily the same tokens (in half precision as far as kernels round alike), sampled ones of the same
law.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import EosTokenCriteria, GenerationMixin, MaxLengthCriteria
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerationMode,
    StoppingCriteriaList,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from conflayers_cli.borrowed import borrow
from conflayers_cli.cli.drafting import rows_drafter
from conflayers_cli.drafters import DraftBy, ProfileLike, drafter_of, in_python
from conflayers_cli.engine.batch import Batch, BatchRequest
from conflayers_cli.engine.decode import Generation
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.draft import Drafter
from conflayers_cli.engine.sampling import Sampling
from conflayers_cli.errors import InputError
from conflayers_cli.processed import ProcessedGeneration, Text, as_sampling

_LOOKED_AT = frozenset({"attention_mask", "position_ids", "past_key_values"})
_HARMLESS = frozenset({"use_cache", "logits_to_keep", "cache_position"})
"""Arguments of a model's forward that don't change what is decoded."""
_REMEMBERING = (SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)
"""transformers' processors that remember what they were called with."""


class GenerateError(InputError, ValueError):
    """Something that `conflayers_generate` can't do."""


def conflayers_generate(
    model: Any,
    input_ids: torch.Tensor,
    *,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    profile: ProfileLike | None = None,
    draft: DraftBy | None = None,
    lookahead: bool | None = None,
    force: bool = False,
    exact: bool = True,
    in_place: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Decode as `GenerationMixin.generate` does, with drafts.

    Not to be called but by `generate`: ``model.generate(**inputs, custom_generate=
    conflayers_generate, profile="summ.yaml")``. The keywords from ``profile`` to ``in_place`` are
    given to `generate` as any others. Between calls the model is as it was; the engine stays with
    it (see `borrowed.borrow`, and `release`).

    Logits processors and stopping criteria are called once for each token, in order, with the text
    up to there, as by transformers: those that remember something work. Rows of a batch are called
    for one after the other.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs: what
            `generate` prepared.
        profile: what `calibrate` wrote, or its file.
        draft: who drafts, ``skip``, ``ngram``, ``mixed`` or ``none``; None: as the profile says,
            without one nobody.
        lookahead: draft as far as it pays; None: as the profile says.
        force: take a profile of another model of the same depth.
        exact: as for `Decoder`.
        in_place: don't hold weights twice, see `Borrowed`.
        streamer: is taken from the call of `generate`, which does not hand it on; only where that
            is not possible need it be given by `functools.partial`.

    Returns:
        int64 ``[B, L]``, prompts and outputs, or a `GenerateDecoderOnlyOutput`.

    Raises:
        GenerateError: (a ValueError) something is asked for that can't be done; the message says
            what.
        ConfLayersError: as `Generation`.
    """
    outside = _arguments_of_generate(model)
    if outside.get("assistant_model") is not None:
        raise GenerateError("assistant_model: the model drafts for itself here, leave it out")
    stream = _Stream(streamer, outside.get("streamer"))
    request = _Request.of(input_ids, logits_processor, generation_config, model_kwargs)
    ends = _Ends.of(stopping_criteria, request)
    if stream.streamer is not None and request.rows > 1:
        raise GenerateError("streamer: the texts of a batch are not decoded in step: one at a time")
    stream.begin(input_ids)
    try:
        with in_python():
            borrowed = borrow(model, exact=exact, in_place=in_place)
            with borrowed.at_work() as decoder:
                rows = request.rows if request.together else 1
                drafter = drafter_of(
                    *(borrowed, profile, draft, lookahead, force), tree=False, rows=rows
                )
                texts, outputs = _decode(decoder, drafter, request, ends, stream.put)
    except InputError as error:
        raise GenerateError(str(error)) from error
    stream.end()
    sequences = _joined(request, outputs)
    if not generation_config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(
        sequences=sequences,
        scores=tuple(texts[0].scores) if generation_config.output_scores else None,
        logits=tuple(texts[0].logits) if generation_config.output_logits else None,
    )


@dataclass(frozen=True)
class _Request:
    """What `generate` is asked for.

    Attributes:
        input_ids: int64 ``[B, L]``.
        padding: tokens left of each prompt that are none of it.
        processors: logits processors.
        sampling: what they do, in the engine's terms, or nearly so.
        same_law: it is exactly what they do.
        recording: scores or logits are asked for.
        pad: the token behind texts that end before others, if there is one.
    """

    input_ids: torch.Tensor
    padding: tuple[int, ...]
    processors: Any
    sampling: Sampling
    same_law: bool
    recording: bool
    pad: int | None

    @classmethod
    def of(
        cls, input_ids: torch.Tensor, processors: Any, config: Any, model_kwargs: Mapping[str, Any]
    ) -> _Request:
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
        request = cls(
            *(input_ids, padding, processors, sampling, same_law, recording),
            pad=None if pad is None else int(pad),
        )
        if request.rows > 1 and recording:
            raise GenerateError("output_scores, output_logits: for one text at a time")
        if request.rows > 1:
            _check_own(processors, "logits_processor")
        return request

    @property
    def rows(self) -> int:
        return self.input_ids.shape[0]

    @property
    def together(self) -> bool:
        """Whether the engine itself can choose the tokens, for all rows at once."""
        return self.same_law and not self.recording

    @property
    def prompts(self) -> list[list[int]]:
        rows = self.input_ids.tolist()
        return [row[padding:] for row, padding in zip(rows, self.padding, strict=True)]

    def settings(self, row: int) -> Sampling:
        """Those of a row, each with a seed of its own."""
        return replace(self.sampling, seed=self.sampling.seed + row)


@dataclass(frozen=True)
class _Ends:
    """What ends a text.

    Attributes:
        max_new_tokens: the most tokens.
        end_tokens: ids that end it.
        others: criteria beside these two; empty: there are none.
        all: all criteria.
    """

    max_new_tokens: int
    end_tokens: frozenset[int]
    others: Any
    all: Any

    @classmethod
    def of(cls, criteria: Any, request: _Request) -> _Ends:
        """Raises GenerateError where something can't be done."""
        lengths = [each.max_length for each in criteria if type(each) is MaxLengthCriteria]
        if not lengths:
            raise GenerateError("max_new_tokens: is needed, or max_length")
        ends = [each for each in criteria if type(each) is EosTokenCriteria]
        others = [e for e in criteria if type(e) not in (MaxLengthCriteria, EosTokenCriteria)]
        if request.rows > 1:
            _check_own(others, "stopping_criteria")
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


class _Stream:
    """The streamer of a call, if there is one.

    Args:
        given: by whoever made a `partial` of `conflayers_generate`.
        outside: given to `generate`, which has put the prompt already.
    """

    def __init__(self, given: Any, outside: Any) -> None:
        self.streamer = outside if given is None else given
        self._begun = outside is not None

    def begin(self, input_ids: torch.Tensor) -> None:
        if self.streamer is not None and not self._begun:
            self.streamer.put(input_ids.cpu())

    def put(self, token: int) -> None:
        if self.streamer is not None:
            self.streamer.put(torch.tensor([token]))

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()


def _decode(
    decoder: Decoder,
    drafter: Drafter | None,
    request: _Request,
    ends: _Ends,
    put: Callable[[int], None],
) -> tuple[list[Text], list[list[int]]]:
    """(the texts as processors and criteria saw them, the new tokens), row by row."""
    criteria = ends.others if request.together else ends.all
    texts = [
        Text(
            *(request.input_ids[row, None], ends.max_new_tokens, request.processors, criteria),
            row=row,
            rows=request.rows,
            recording=request.recording,
        )
        for row in range(request.rows)
    ]

    def watching(text: Text) -> Callable[[int], bool]:
        def watch(token: int) -> bool:
            ended = bool(ends.others) and text.add(token)
            put(token)
            return ended

        return watch

    if not request.together:
        return texts, [
            _run(
                ProcessedGeneration(
                    *(decoder, prompt, text),
                    max_new_tokens=ends.max_new_tokens,
                    sampling=request.settings(row),
                    drafter=drafter,
                    end_tokens=ends.end_tokens,
                    on_token=put,
                )
            )
            for row, (prompt, text) in enumerate(zip(request.prompts, texts, strict=True))
        ]
    if request.rows == 1:
        only = Generation(
            *(decoder, request.prompts[0]),
            max_new_tokens=ends.max_new_tokens,
            sampling=request.sampling,
            drafter=drafter,
            end_tokens=ends.end_tokens,
            watch=watching(texts[0]),
        )
        return texts, [_run(only)]
    requests = [
        BatchRequest(prompt, ends.max_new_tokens, request.settings(row), watching(text))
        for row, (prompt, text) in enumerate(zip(request.prompts, texts, strict=True))
    ]
    batch = Batch(decoder, requests, drafter=rows_drafter(drafter), end_tokens=ends.end_tokens)
    batch.run()
    return texts, batch.outputs


def _run(generation: Generation) -> list[int]:
    for _ in generation:
        pass
    return generation.output


def _joined(request: _Request, outputs: Sequence[Sequence[int]]) -> torch.Tensor:
    """Prompts and outputs, int64 ``[B, L]``, padded behind the shorter ones."""
    longest = max(map(len, outputs))
    pad = 0 if request.pad is None else request.pad
    rows = [[*output, *[pad] * (longest - len(output))] for output in outputs]
    return torch.cat([request.input_ids, request.input_ids.new_tensor(rows)], dim=1)


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
    cache = model_kwargs.get("past_key_values")
    if cache is not None and (
        getattr(cache, "_is_user_defined", False) or cache.get_seq_length() > 0
    ):
        raise GenerateError("past_key_values: the engine has a cache of its own, leave them out")
    given = {name for name, value in model_kwargs.items() if value is not None}
    if unknown := sorted(given - _LOOKED_AT - _HARMLESS):
        raise GenerateError(f"{', '.join(unknown)}: only tokens go into the model here")


def _padding(input_ids: torch.Tensor, model_kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """How many tokens stand left of each prompt.

    Raises:
        GenerateError: tokens are left out elsewhere, or are to stand at other positions than one
            behind the other.
    """
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    if mask.shape != input_ids.shape:
        raise GenerateError("attention_mask: has another shape than input_ids")
    seen = mask.ne(0).long()
    padding = tuple((seen.shape[1] - seen.sum(dim=1)).tolist())
    if not torch.equal(seen.sort(dim=1).values, seen) or max(padding) == seen.shape[1]:
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


def _check_own(things: Sequence[Any], what: str) -> None:
    """Refuse, for a batch, what may be about the batch as a whole, or remembers its calls.

    Raises:
        GenerateError: there is such a thing among them.
    """
    for each in things:
        if not type(each).__module__.startswith("transformers.") or isinstance(each, _REMEMBERING):
            raise GenerateError(
                f"{what}: {type(each).__name__} may depend on how a batch is decoded: "
                "one text at a time"
            )


def _arguments_of_generate(model: Any) -> dict[str, Any]:
    """The arguments of the `generate` that is calling which it does not hand on.

    transformers (5.17 to 5.23) keeps a streamer and an assistant from what it is given to decode
    with. A streamer that never hears a token would hang whoever listens to it.
    """
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = inspect.currentframe()
    while frame is not None:
        known = frame.f_locals if frame.f_code is code else {}
        if known.get("self") is model:
            return {name: known.get(name) for name in ("streamer", "assistant_model")}
        frame = frame.f_back
    return {}
