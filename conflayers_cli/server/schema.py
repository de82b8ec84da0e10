"""Requests as OpenAI's API has them. A field that is not here, or a value that asks for something
else than is done, is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_MESSAGES = 4096
Text = Annotated[str, Field(max_length=16 << 20)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Stop = Annotated[str, Field(min_length=1, max_length=1024)]


class Part(BaseModel):
    """A part of a request: strict, with no other fields than these."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class TextPart(Part):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


# The first fault of a list is enough: all of a large one would take seconds and gigabytes.
Content = Text | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES, fail_fast=True)]


class FunctionCall(Part):
    """A function as the model called it; ``arguments`` is JSON."""

    name: str
    arguments: Text


class ToolCall(Part):
    """A call that the model made in an earlier message."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Part):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_MESSAGES, fail_fast=True)] | None = (
        None
    )
    tool_call_id: str | None = None
    # what clients give back of an answer's message
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise ValueError("a message needs content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls belong to messages of the assistant")
        return self


class Function(Part):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class Tool(Part):
    """A tool, which the chat template tells the model of."""

    type: Literal["function"]
    function: Function


class Prediction(Part):
    """What the answer will mostly be (OpenAI's Predicted Outputs)."""

    type: Literal["content"]
    content: Content


class StreamOptions(Part):
    """What a stream has beside its text."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class ResponseFormat(Part):
    """The form of an answer."""

    type: Literal["text"]


class Request(Part):
    """Fields of both kinds of request. ``repetition_penalty``, ``top_k``, ``min_p`` and
    ``show_drafts`` are not OpenAI's. ``user``, ``metadata`` and their like change nothing."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, Field(pattern=r"^[0-9]{1,9}$")],
                Annotated[float, Field(ge=-100, le=100)],
            ],
            Field(max_length=MAX_BIASES),
        ]
        | None
    ) = None
    show_drafts: bool | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Request:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Request):
    """A request to ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=256, fail_fast=True)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    prediction: Prediction | None = None
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=8, fail_fast=True)] | None = None
    metadata: Annotated[dict[str, Any], Field(max_length=16)] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    usual_budget: ClassVar[int | None] = None

    @model_validator(mode="after")
    def _goes_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs")
        given = self.max_tokens, self.max_completion_tokens
        if None not in given and given[0] != given[1]:
            raise ValueError("max_tokens and max_completion_tokens: give one of the two")
        return self

    @property
    def budget(self) -> int | None:
        """The most tokens wanted; None: as many as there is room for."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def num_prompts(self) -> int:
        return 1


class CompletionRequest(Request):
    """A request to ``/v1/completions``."""

    prompt: (
        Text
        | Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
        | Annotated[list[Text], Field(min_length=1, fail_fast=True)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]],
            Field(min_length=1, fail_fast=True),
        ]
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    usual_budget: ClassVar[int | None] = 16

    @property
    def budget(self) -> int | None:
        """The most tokens wanted; None: OpenAI's 16, if there is room for them."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, a text or token ids."""
        given: Any = self.prompt
        one = isinstance(given, str) or isinstance(given[0], int)
        return [given] if one else list(given)

    @property
    def num_prompts(self) -> int:
        return len(self.prompts)


def text_of(content: Content | None) -> str:
    """A message's text; parts are joined as they are."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)
