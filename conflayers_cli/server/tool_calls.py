"""Calls of tools in a model's text, where they are written as most templates teach it:
``<tool_call>{"name": …, "arguments": {…}}</tool_call>`` (Hermes, Qwen and their like).

From the first mark on the text is held back; what turns out to be no call is text after all.
"""

from __future__ import annotations

import json
import uuid
from typing import Any

BEGIN, END = "<tool_call>", "</tool_call>"


class ToolCallReader:
    """Parts the text of one answer from the calls at its end."""

    def __init__(self) -> None:
        self._held = ""

    def feed(self, piece: str) -> str:
        """Add a piece of the text; returns what is certainly no call."""
        text = self._held + piece
        begin = text.find(BEGIN)
        if begin < 0:
            longest = min(len(BEGIN) - 1, len(text))
            sizes = (n for n in range(longest, 0, -1) if BEGIN.startswith(text[-n:]))
            begin = len(text) - next(sizes, 0)
        self._held = text[begin:]
        return text[:begin]

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """(the rest of the text, the calls in OpenAI's form)."""
        held, self._held = self._held, ""
        calls = _calls(held)
        return ("", calls) if calls else (held, [])


def _calls(text: str) -> list[dict[str, Any]]:
    """The calls that a text consists of; none where it is anything else."""
    calls: list[dict[str, Any]] = []
    for part in text.split(BEGIN)[1:]:
        inside, _, behind = part.partition(END)
        try:
            call = json.loads(inside)
            name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
            json.dumps(call, ensure_ascii=False).encode()  # no halves of surrogate pairs
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return []
        if not isinstance(name, str) or not isinstance(arguments, dict) or behind.strip():
            return []
        function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        calls.append({"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function})
    return calls
