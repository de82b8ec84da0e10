"""OpenAI's requests → what the engine decodes."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from conflayers_cli.errors import InputError
from conflayers_cli.generation.prompt_encoding import PromptOptions
from conflayers_cli.generation.request import GenerationRequest, with_seed
from conflayers_cli.models.loaded_model import LoadedModel
from conflayers_cli.models.tokenization import encode, encode_text
from conflayers_cli.sampling_params import LogitAdjustments, SamplingParams
from conflayers_cli.server.errors import ApiError
from conflayers_cli.server.schema import ChatRequest, CompletionRequest, Message, text_of
from conflayers_cli.spec_decode.draft_store import OwnedStores

_NOT_THE_TEMPLATES = frozenset(
    inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
) - {"tools", "documents"}
"""What transformers would take for itself among a template's arguments."""


@dataclass(frozen=True)
class Encoder:
    """Encodes requests, in one thread at a time: tokenizers and the bounds of templates are not
    for several.

    Attributes:
        loaded: the model.
        context: positions of each text, prompt and answer together.
        max_new_tokens: the most tokens of an answer; None: what the context leaves.
        stores: of each owner's earlier texts; None: nothing is drafted from them.
    """

    loaded: LoadedModel
    context: int
    max_new_tokens: int | None
    stores: OwnedStores | None = None

    def encode(
        self, request: ChatRequest | CompletionRequest, owner: str
    ) -> list[GenerationRequest]:
        """A generation request for each text: of each prompt in turn, ``n``.

        Raises:
            ApiError: the request can't be answered.
        """
        try:
            return self._encode(request, owner)
        except InputError as error:
            raise ApiError(400, str(error), code="invalid_value") from error

    def _encode(
        self, request: ChatRequest | CompletionRequest, owner: str
    ) -> list[GenerationRequest]:
        if isinstance(request, ChatRequest):
            prompts = [self._chat(request)]
        else:
            prompts = [self._completion(each) for each in request.prompts]
        sampling, adjustments = self._sampling(request), _adjustments(request)
        prediction, settings = self._prediction(request), self.loaded.settings
        stops = (*request.stops, *settings.stops)
        budgets = [self._budget(len(prompt), request) for prompt in prompts]
        store = self.stores.get(owner) if self.stores else None
        return [
            GenerationRequest(
                prompt,
                budget,
                sampling,
                stops,
                continues=isinstance(request, CompletionRequest),
                answer=answer,
                adjustments=adjustments,
                prediction=prediction,
                logprobs=request.num_logprobs,
                owner=owner,
                store=store,
                processors=settings.processors(prompt, budget),
            )
            for prompt, budget in zip(prompts, budgets, strict=True)
            for answer in range(request.n or 1)
        ]

    def _chat(self, request: ChatRequest) -> list[int]:
        template = dict(request.chat_template_kwargs or {})
        # A template of a client's own would be a program of its own.
        if own := sorted(template.keys() & _NOT_THE_TEMPLATES):
            raise ApiError(
                400, f"chat_template_kwargs: {own[0]} is not taken", param="chat_template_kwargs"
            )
        if request.tools is not None and request.tool_choice != "none":
            if "tools" in template:
                raise ApiError(400, "tools are given twice", param="chat_template_kwargs")
            template["tools"] = [each.model_dump(exclude_none=True) for each in request.tools]
        PromptOptions(template=template)  # raises InputError for what is no argument of templates
        messages: list[Any] = [_template_message(each) for each in request.messages]
        return encode(self.loaded, messages, None, template)

    def _completion(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            return encode(self.loaded, None, prompt)
        known = self.loaded.model.config.get_text_config().vocab_size
        if max(prompt) >= known:
            raise ApiError(400, f"prompt: token ids end at {known - 1}", param="prompt")
        return list(prompt)

    def _budget(self, length: int, request: ChatRequest | CompletionRequest) -> int:
        wanted, left = request.budget, self.context - length
        if left < 1:
            raise ApiError(
                400,
                f"the prompt has {length:,} tokens, and the context is {self.context:,} tokens "
                "long, the answer included",
                param="messages",
                code="context_length_exceeded",
            )
        if wanted is None:
            return min(left, self.max_new_tokens or left, request.usual_budget or left)
        if self.max_new_tokens is not None and wanted > self.max_new_tokens:
            raise ApiError(
                400,
                f"max_tokens {wanted:,}: this server gives {self.max_new_tokens:,} at most",
                param="max_tokens",
                code="max_tokens_exceeded",
            )
        if wanted > left:
            raise ApiError(
                400,
                f"the context is {self.context:,} tokens long: the prompt has {length:,}, and "
                f"max_tokens {wanted:,} are more than the {left:,} left",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return wanted

    def _sampling(self, request: ChatRequest | CompletionRequest) -> SamplingParams:
        penalty = request.repetition_penalty
        given = SamplingParams(
            temperature=1.0 if request.temperature is None else request.temperature,
            top_k=request.top_k if request.top_k and request.top_k > 0 else None,
            top_p=request.top_p,
            min_p=request.min_p,
            repetition_penalty=1.0 if penalty is None else penalty,
            seed=None if request.seed is None else request.seed % (1 << 63),
        )
        if penalty is None:
            given = self.loaded.settings.complete(given)
        return with_seed(given)  # one for all texts, which differ by the answer's number

    def _prediction(self, request: ChatRequest | CompletionRequest) -> tuple[int, ...]:
        if not isinstance(request, ChatRequest) or request.prediction is None:
            return ()
        text = text_of(request.prediction.content)
        if not text:
            return ()
        tokens = encode_text(
            self.loaded.tokenizer,
            text,
            special=False,
            vocabulary=self.loaded.model.config.get_text_config().vocab_size,
            context=self.context,
            name=self.loaded.name,
        )
        return tuple(tokens[: self.context])


def _template_message(message: Message) -> dict[str, Any]:
    """A message as chat templates take it: ``developer`` is OpenAI's newer word for ``system``,
    and arguments of calls are objects, not JSON."""
    role = "system" if message.role == "developer" else message.role
    made: dict[str, Any] = {"role": role, "content": text_of(message.content)}
    if message.name is not None:
        made["name"] = message.name
    if message.tool_call_id is not None:
        made["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        made["tool_calls"] = [
            {
                "id": call.id,
                "type": call.type,
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments),
                },
            }
            for call in message.tool_calls
        ]
    return made


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ApiError(
            400, "the arguments of a tool call are not valid JSON", param="messages"
        ) from None


def _adjustments(request: ChatRequest | CompletionRequest) -> LogitAdjustments:
    return LogitAdjustments(
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=tuple((int(key), bias) for key, bias in (request.logit_bias or {}).items()),
    )
