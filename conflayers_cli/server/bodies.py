"""Responses in OpenAI's forms: whole, and as chunks of a stream."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from time import time
from typing import Any

from conflayers_cli.generation.response import GenerationResponse, GenerationResult
from conflayers_cli.generation.sequence import MODEL, TokenLogprobs
from conflayers_cli.server.logprobs import ChatLogprobs, CompletionLogprobs, TokenNames
from conflayers_cli.server.schema import ChatRequest, CompletionRequest
from conflayers_cli.server.tool_calls import ToolCallReader
from conflayers_cli.server.usage import drafting, usage
from conflayers_cli.version import __version__


@dataclass
class Choice:
    """One text as far as it has come.

    Attributes:
        text: what is no call of a tool, as far as it is certain.
        reader: parts it from the calls; None: no tools were given.
        calls: of tools, once it has ended.
        logprobs: of its tokens; None: they are not asked for.
        drafts: which texts who drafted.
        result: once it has ended.
    """

    text: str = ""
    reader: ToolCallReader | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: ChatLogprobs | CompletionLogprobs | None = None
    drafts: list[dict[str, str]] = field(default_factory=list)
    result: GenerationResult | None = None


class Bodies:
    """What is sent for one request.

    Args:
        request: what was asked for.
        model: the model's name to clients.
        names: tokens as texts.
        end_tokens: ids that end a text; nothing is said of them.
    """

    def __init__(
        self,
        request: ChatRequest | CompletionRequest,
        model: str,
        names: TokenNames,
        end_tokens: frozenset[int],
    ) -> None:
        self._request, self._end_tokens = request, end_tokens
        self._chat = isinstance(request, ChatRequest)
        self._kind = "chat.completion" if self._chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time()),
            "model": model,
            "system_fingerprint": f"conflayers-{__version__}",
        }
        count = (request.n or 1) * request.num_prompts
        tools = isinstance(request, ChatRequest) and request.tools and request.tool_choice != "none"
        self.choices = [
            Choice(reader=ToolCallReader() if tools else None, logprobs=self._new_logprobs(names))
            for _ in range(count)
        ]

    def _new_logprobs(self, names: TokenNames) -> ChatLogprobs | CompletionLogprobs | None:
        if self._request.num_logprobs is None:
            return None
        return ChatLogprobs(names) if self._chat else CompletionLogprobs(names)

    @property
    def id(self) -> str:
        return str(self._head["id"])

    def add(self, index: int, response: GenerationResponse) -> dict[str, Any]:
        """Note what came of a text; returns its part of a chunk."""
        choice, step = self.choices[index], response.step
        logprobs = [each for each in (step.logprobs if step else ()) if self._is_shown(each)]
        drafts = self._drafts(response)
        text = self._without_calls(choice, response)
        choice.text += text
        part: dict[str, Any] = {"index": index, **self._text(text)}
        part["logprobs"] = None if choice.logprobs is None else choice.logprobs.add(logprobs)
        choice.drafts += drafts
        choice.result = response.result
        part["finish_reason"] = None
        if self._request.show_drafts:
            part["drafts"] = drafts
        return part

    @staticmethod
    def _without_calls(choice: Choice, response: GenerationResponse) -> str:
        """What a response adds to the text; at its end the choice gets the calls."""
        if choice.reader is None:
            return response.text
        text = choice.reader.feed(response.text)
        if response.result is not None:
            rest, choice.calls = choice.reader.finish()
            text += rest
        return text

    def _is_shown(self, token: TokenLogprobs) -> bool:
        return token.token not in self._end_tokens

    def _text(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}} if self._chat else {"text": text}

    def _drafts(self, response: GenerationResponse) -> list[dict[str, str]]:
        if not self._request.show_drafts:
            return []
        by = response.step.drafters if response.step else ()
        names = (*by, *(MODEL,) * (len(response.pieces) - len(by)))
        pairs = zip(response.pieces, names, strict=False)
        return [{"text": piece, "by": name} for piece, name in pairs]

    @staticmethod
    def says_something(part: dict[str, Any]) -> bool:
        """Whether a choice's part of a chunk is worth sending."""
        text = part.get("text") or part.get("delta", {}).get("content")
        return bool(text or part.get("drafts") or part["logprobs"])

    def first_chunks(self) -> list[dict[str, Any]]:
        """What begins a stream: the role of each text of a chat."""
        if not self._chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [
            self.chunk({"index": i, "delta": delta, "logprobs": None, "finish_reason": None})
            for i in range(len(self.choices))
        ]

    def chunk(self, *choices: dict[str, Any]) -> dict[str, Any]:
        """A chunk of a stream."""
        kind = f"{self._kind}.chunk" if self._chat else self._kind
        made = {**self._head, "object": kind, "choices": list(choices)}
        return {**made, "usage": None} if self._request.include_usage else made

    def last_chunk(self, index: int) -> dict[str, Any]:
        """The chunk that says why a text has ended."""
        ended: dict[str, Any] = {"delta": {}} if self._chat else {"text": ""}
        if calls := self.choices[index].calls:
            numbered = [{"index": i, **call} for i, call in enumerate(calls)]
            ended["delta"] = {"tool_calls": numbered}
        reason = self._finish(self.choices[index])
        return self.chunk({"index": index, **ended, "logprobs": None, "finish_reason": reason})

    def usage_chunk(self) -> dict[str, Any] | None:
        """The chunk that ends a stream; None where it is not asked for."""
        if not self._request.include_usage:
            return None
        return {**self.chunk(), **self._figures()}

    def whole(self) -> dict[str, Any]:
        """The response as a whole, once all texts have ended."""
        return {
            **self._head,
            "object": self._kind,
            "choices": [self._whole(i, choice) for i, choice in enumerate(self.choices)],
            **self._figures(),
        }

    def _whole(self, index: int, choice: Choice) -> dict[str, Any]:
        text = choice.text
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if choice.calls:
            message |= {"content": text.strip() or None, "tool_calls": choice.calls}
        made: dict[str, Any] = {
            "index": index,
            **({"message": message} if self._chat else {"text": text}),
            "logprobs": None if choice.logprobs is None else choice.logprobs.whole(),
            "finish_reason": self._finish(choice),
        }
        return {**made, "drafts": choice.drafts} if self._request.show_drafts else made

    def _figures(self) -> dict[str, Any]:
        results = [choice.result for choice in self.choices if choice.result is not None]
        return {
            "usage": usage(results, self._request.num_prompts),
            "conflayers": drafting(results),
        }

    @staticmethod
    def _finish(choice: Choice) -> str | None:
        if choice.result is None:
            return None
        called = choice.calls and choice.result.finish_reason == "stop"
        return "tool_calls" if called else choice.result.finish_reason
