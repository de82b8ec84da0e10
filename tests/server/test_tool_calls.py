"""Calls of tools in texts: found whole and in pieces; what is none stays text."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from conflayers_cli.generation.response import GenerationResponse, GenerationResult
from conflayers_cli.generation.stats import GenerationStats
from conflayers_cli.server.bodies import Bodies
from conflayers_cli.server.logprobs import TokenNames
from conflayers_cli.server.schema import ChatRequest
from conflayers_cli.server.tool_calls import ToolCallReader
from tests.cli.conftest import byte_tokenizer

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'


@dataclass
class Read:
    """What a reader makes of a text given in pieces of a size."""

    text: str = ""
    names: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, text: str, size: int) -> Read:
        reader, found = ToolCallReader(), cls()
        for begin in range(0, len(text), size):
            found.text += reader.feed(text[begin : begin + size])
        rest, calls = reader.finish()
        found.text += rest
        found.names = [call["function"]["name"] for call in calls]
        for call in calls:
            json.loads(call["function"]["arguments"])
        return found


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_calls_at_the_end_of_a_text(size: int) -> None:
    assert Read.of(CALL, size) == Read("", ["weather"])
    assert Read.of(f"I look.\n{CALL}\n{CALL}", size) == Read("I look.\n", ["weather"] * 2)
    assert Read.of(CALL.removesuffix("</tool_call>"), size) == Read("", ["weather"])


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(
    "text",
    [
        "no call < at all <tool",
        "<tool_call>",
        "<tool_call>{}</tool_call>",
        '<tool_call>{"name": 3}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "x"}</tool_call>',
        f"{CALL} and more text",
        "<tool_call>" + "[" * 100_000,
        f"{CALL}<tool_call>nonsense",
    ],
)
def test_what_is_no_call_stays_text(text: str, size: int) -> None:
    assert Read.of(text, size) == Read(text, [])


def bodies(**more: Any) -> Bodies:
    request = ChatRequest.model_validate(
        {
            "messages": [{"role": "user", "content": "Is it warm?"}],
            "tools": [{"type": "function", "function": {"name": "weather"}}],
            **more,
        }
    )
    made = Bodies(request, "tiny", TokenNames(byte_tokenizer(None)), frozenset())
    result = GenerationResult(f"So: {CALL}", (1, 2), "stop", 3, GenerationStats())
    made.add(0, GenerationResponse(0, "So: <tool", None))
    made.add(0, GenerationResponse(0, CALL.removeprefix("<tool"), None, result))
    return made


def test_calls_in_openais_form() -> None:
    made = bodies()
    (choice,) = made.whole()["choices"]
    (call,) = choice["message"]["tool_calls"]
    (last,) = made.last_chunk(0)["choices"]

    assert choice["finish_reason"] == last["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "So:"
    assert json.loads(call["function"]["arguments"]) == {"city": "Köln"}
    assert last["delta"]["tool_calls"] == [{"index": 0, **call}]
    (plain,) = bodies(tool_choice="none").whole()["choices"]
    assert plain["message"]["content"] == f"So: {CALL}"
    assert plain["finish_reason"] == "stop"
