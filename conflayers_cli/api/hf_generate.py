"""`model.generate(…, custom_generate=conflayers_generate)`: this engine under transformers' call.

transformers prepares everything, inputs, generation config, logits processors, stopping criteria,
and calls what it is given in place of its decoding loop. What comes out is what its own loop gives:
greedily the same tokens (in half precision as far as kernels round alike), sampled ones of the same
law.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.generation import GenerateDecoderOnlyOutput

from conflayers_cli.api.attached_model import borrow
from conflayers_cli.api.hf_processors import Text, processing
from conflayers_cli.api.hf_request import Ends, GenerateError, Request
from conflayers_cli.api.proposers import DraftBy, ProfileLike, current_name, drafter_of, in_python
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.errors import InputError
from conflayers_cli.generation.generator import TextGenerator
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.profile.build_proposer import rows_drafter
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
    draft: DraftBy | None = None,
    adaptive_draft_length: bool | None = None,
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
    it (see `borrowed.borrow` and `release`).

    Logits processors and stopping criteria are called once for each token, in order, with the text
    up to there, as by transformers: those that remember something work. Rows of a batch are called
    for one after the other.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs: what
            `generate` prepared.
        profile: what `calibrate` wrote, or its file.
        draft: who drafts, ``skip``, ``ngram``, ``mixed`` or ``none``; None: as the profile says,
            without one nobody.
        adaptive_draft_length: draft as far as it pays; None: as the profile says.
        lookahead: its old name, taken for one more version.
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
    request = Request.of(input_ids, logits_processor, generation_config, model_kwargs)
    ends = Ends.of(stopping_criteria, request)
    if stream.streamer is not None and request.rows > 1:
        raise GenerateError("streamer: the texts of a batch are not decoded in step: one at a time")
    stream.begin(input_ids)
    try:
        with in_python():
            borrowed = borrow(model, exact=exact, in_place=in_place)
            adaptive = current_name(adaptive_draft_length, lookahead)
            with borrowed.at_work() as decoder:
                options = DraftOptions(
                    method=None if draft is None else DraftMethod.of(draft),
                    adaptive_draft_length=adaptive,
                    tree=False,
                    batch_size=request.rows if request.together else 1,
                )
                drafter = drafter_of(borrowed, profile, options, force)
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
    drafter: Proposer | None,
    request: Request,
    ends: Ends,
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

    def putting(token: int) -> bool:
        put(token)
        return False

    requests = [
        GenerationRequest(
            prompt,
            ends.max_new_tokens,
            request.settings(row),
            on_token=watching(text) if request.together else putting,
        )
        for row, (prompt, text) in enumerate(zip(request.prompts, texts, strict=True))
    ]
    generator = TextGenerator(
        decoder,
        end_tokens=ends.end_tokens,
        drafter=rows_drafter(drafter) if request.together and request.rows > 1 else drafter,
        batch_size=request.rows if request.together else 1,
        begin=None if request.together else processing(decoder, texts),
    )
    return texts, [list(result.token_ids) for result in generator.generate(requests)]


def _joined(request: Request, outputs: Sequence[Sequence[int]]) -> torch.Tensor:
    """Prompts and outputs, int64 ``[B, L]``, padded behind the shorter ones."""
    longest = max(map(len, outputs))
    pad = 0 if request.pad is None else request.pad
    rows = [[*output, *[pad] * (longest - len(output))] for output in outputs]
    return torch.cat([request.input_ids, request.input_ids.new_tensor(rows)], dim=1)


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
