"""`model.generate(…, custom_generate=conflayers_generate)`: this engine under transformers' call.

transformers prepares inputs, generation config, logits processors and stopping criteria, and calls
`conflayers_generate` in place of its decoding loop. Greedy tokens are those of its own loop (in
half precision as far as kernels round alike), sampled ones have the same distribution.

Processors and criteria are called once for each token, in order, with the text up to there, as by
transformers, so those that keep state work for a text alone. In a batch, whose texts part in length
where drafts are accepted, each row's are called on that row.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationMixin
from transformers.generation import GenerateDecoderOnlyOutput

from conflayers_cli.api.attached_model import attach
from conflayers_cli.api.hf_processors import of_row
from conflayers_cli.api.hf_request import GenerateError, HFRequest, StopConditions
from conflayers_cli.api.proposers import (
    DraftMethodName,
    ProfileLike,
    get_proposer,
    notes_as_warnings,
    resolve_lookahead,
)
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.errors import InputError
from conflayers_cli.generation.generator import TextGenerator
from conflayers_cli.generation.processed import ProcessedText
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.profile.build_proposer import as_batch_proposer
from conflayers_cli.spec_decode.options import DraftMethod, DraftOptions
from conflayers_cli.spec_decode.proposer import Proposer


def conflayers_generate(
    model: Any,
    input_ids: torch.Tensor,
    *,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    profile: ProfileLike | None = None,
    draft: DraftMethodName | None = None,
    adaptive_draft_length: bool | None = None,
    lookahead: bool | None = None,
    force: bool = False,
    exact: bool = True,
    in_place: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Decode as `GenerationMixin.generate`, which calls this, with drafts.

    ``model.generate(**inputs, custom_generate=conflayers_generate, profile="summ.yaml")``: keywords
    from ``profile`` to ``in_place`` are given to `generate`, and as of `load` and `generate` of the
    Python API; ``streamer`` is taken from its call, else by `functools.partial`. The model is
    restored between calls, but keeps the engine (see `attached_model.attach` and `release`).

    Returns int64 ``[B, L]``, prompts and outputs, or a `GenerateDecoderOnlyOutput`. Raises
    GenerateError (a ValueError) for what can't be done, ConfLayersError as `Generation`.
    """
    outer = _arguments_of_generate(model)
    streamer = outer.get("streamer") if streamer is None else streamer
    try:
        adaptive = resolve_lookahead(adaptive_draft_length, lookahead)
        return _generate(
            model,
            input_ids,
            outer=outer,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            profile=profile,
            draft=draft,
            adaptive_draft_length=adaptive,
            force=force,
            exact=exact,
            in_place=in_place,
            streamer=streamer,
            model_kwargs=model_kwargs,
        )
    except InputError as error:
        raise GenerateError(str(error)) from error
    finally:
        if streamer is not None:  # after an error, too: whoever reads it would wait for ever
            streamer.end()


def _generate(
    model: Any,
    input_ids: torch.Tensor,
    *,
    outer: dict[str, Any],
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    profile: ProfileLike | None,
    draft: DraftMethodName | None,
    adaptive_draft_length: bool | None,
    force: bool,
    exact: bool,
    in_place: bool,
    streamer: Any,
    model_kwargs: dict[str, Any],
) -> Any:
    """`conflayers_generate`, which ends the streamer; ``outer``: arguments of `generate`."""
    if torch.is_autocast_enabled(model.device.type):
        raise GenerateError(
            "torch.autocast: passes run in the model's own dtype here, and would give another text "
            "than under autocast: leave it, or load the model in the dtype that is wanted"
        )
    if outer.get("assistant_model") is not None:
        raise GenerateError("assistant_model: the model drafts for itself here, leave it out")
    request = HFRequest.parse(input_ids, logits_processor, generation_config, model_kwargs)
    conditions = StopConditions.parse(stopping_criteria, request)
    if streamer is not None:
        if request.batch_size > 1:
            raise GenerateError(
                "streamer: the texts of a batch are not decoded in step: one at a time"
            )
        if outer.get("streamer") is None:  # else `generate` has put the prompt
            streamer.put(input_ids.cpu())
    with notes_as_warnings(stacklevel=5):
        engine = attach(model, exact=exact, in_place=in_place)
        options = DraftOptions(
            method=None if draft is None else DraftMethod.parse(draft),
            adaptive_draft_length=adaptive_draft_length,
            tree=False,
            batch_size=request.batch_size,
        )
        with engine.active() as decoder:
            proposer = get_proposer(engine, profile, options, force)
            texts, outputs = _decode(decoder, proposer, request, conditions, streamer)
    if not generation_config.return_dict_in_generate:
        return outputs
    return GenerateDecoderOnlyOutput(
        sequences=outputs,
        scores=tuple(texts[0].scores) if generation_config.output_scores else None,
        logits=tuple(texts[0].logits) if generation_config.output_logits else None,
    )


def _decode(
    decoder: Decoder,
    proposer: Proposer | None,
    request: HFRequest,
    conditions: StopConditions,
    streamer: Any,
) -> tuple[list[ProcessedText], torch.Tensor]:
    """(the texts as processors and criteria saw them, prompts and padded outputs ``[B, L]``)."""
    ids, budget = request.input_ids, conditions.max_new_tokens
    texts = [
        ProcessedText(
            ids[row, None],
            budget,
            of_row(request.processors, row, request.batch_size),
            conditions.others if request.chosen_by_engine else conditions.all,
            samples=True,
            recording=request.recording,
        )
        for row in range(request.batch_size)
    ]

    def on_token(text: ProcessedText, token: int) -> bool:
        ended = request.chosen_by_engine and bool(conditions.others) and text.add(token)
        if streamer is not None:
            streamer.put(torch.tensor([token]))
        return ended

    prompts = request.prompts
    requests = [
        GenerationRequest(
            prompt,
            budget,
            request.sampling,
            on_token=partial(on_token, text),
            text=None if request.chosen_by_engine else text,
            answer=prompts[:row].count(prompt),
        )
        for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]
    generator = TextGenerator(
        decoder,
        end_tokens=conditions.end_tokens,
        proposer=as_batch_proposer(proposer) if request.batch_size > 1 else proposer,
        batch_size=request.batch_size,
    )
    results = generator.generate(requests)
    outputs = [torch.tensor(result.token_ids) for result in results]
    padded = pad_sequence(outputs, batch_first=True, padding_value=request.pad or 0)
    return texts, torch.cat([ids, padded.to(ids)], dim=1)


def _arguments_of_generate(model: Any) -> dict[str, Any]:
    """The arguments that the calling `generate` does not pass on: a streamer and an assistant.

    (transformers 5.17 to 5.23.) A streamer without tokens would hang its reader.
    """
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = inspect.currentframe()
    while frame is not None:
        known = frame.f_locals if frame.f_code is code else {}
        if known.get("self") is model:
            return {name: known.get(name) for name in ("streamer", "assistant_model")}
        frame = frame.f_back
    return {}
