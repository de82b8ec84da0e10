"""One thing wrong with a file."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from typing import Any

from tools.fuzz_corpus import NO_TEXT, NUMBERS, TOKENS

_NUMBER = re.compile(rb"[0-9]+")
_WORD = re.compile(rb"[\w.]+")
_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, 1.5, -0.0, 1e308, 1e999),
    *(float("nan"), "", " ", "x", "\ud800", "\0", "x" * 5000, "9" * 5000, [], {}, [[]], [{}]),
    *([None], [1, "a"], ["a", "b"], {"a": 1}, {"": None}, {"type": "image"}, [[1, 2], [3]]),
    *([-1], [10**20], [[0.5, 3], [0, 5]], "NaN", "user", "assistant", "system"),
)
_KINDS = (
    "flip",
    "cut",
    "truncate",
    "double",
    "splice",
    "token",
    "number",
    "number",
    "word",
    "word",
    "repeat-line",
    "drop-line",
    "swap-lines",
    "bytes",
    "extreme",
    "value",
    "value",
    "value",
)
_DEEP = 300


def mutate(data: bytes, draw: random.Random, corpus: Sequence[bytes]) -> bytes:
    """The bytes with one thing wrong."""
    start = draw.randrange(len(data) + 1)
    end = min(len(data), start + draw.choice((1, 2, 8, 64, 512)))
    lines = data.split(b"\n")
    line = draw.randrange(len(lines))
    match draw.choice(_KINDS):
        case "flip" if data:
            at = draw.randrange(len(data))
            return data[:at] + bytes([data[at] ^ 1 << draw.randrange(7)]) + data[at + 1 :]
        case "cut":
            return data[:start] + data[end:]
        case "truncate":
            return data[:start]
        case "double":
            return data[:end] + data[start:end] * draw.choice((1, 2, 20)) + data[end:]
        case "splice":
            other = draw.choice(corpus)
            return data[:start] + other[draw.randrange(len(other)) :]
        case "token":
            return data[:start] + draw.choice(draw.choice([TOKENS] * 9 + [NO_TEXT])) + data[start:]
        case "number" if found := list(_NUMBER.finditer(data)):
            found_at = draw.choice(found)
            return data[: found_at.start()] + draw.choice(NUMBERS).encode() + data[found_at.end() :]
        case "word" if found := list(_WORD.finditer(data)):
            found_at = draw.choice(found)
            others = draw.choice((TOKENS, _WORD.findall(draw.choice(corpus))))
            return data[: found_at.start()] + draw.choice(others) + data[found_at.end() :]
        case "extreme":
            size = draw.choice((1, 2, 4, 8))
            bits = 8 * size
            number = draw.choice((0, 1, 2 ** (bits - 1), 2**bits - 1, draw.getrandbits(5)))
            return data[:start] + number.to_bytes(size, "little") + data[start + size :]
        case "value" if (changed := _other_value(data, draw)) is not None:
            return changed
        case "repeat-line":
            return b"\n".join([*lines[: line + 1], *lines[line:]])
        case "drop-line":
            return b"\n".join([*lines[:line], *lines[line + 1 :]])
        case "swap-lines":
            other_line = draw.randrange(len(lines))
            lines[line], lines[other_line] = lines[other_line], lines[line]
            return b"\n".join(lines)
        case _:
            return data[:start] + bytes(draw.randrange(128) for _ in range(4)) + data[end:]


def _other_value(data: bytes, draw: random.Random) -> bytes | None:
    """A JSON document, or a line of JSON, with one of its values changed; None: it is neither."""
    lines = data.split(b"\n")
    at = draw.randrange(len(lines))
    for begin, end in ((0, len(lines)), (at, at + 1)):
        try:
            document = json.loads(b"\n".join(lines[begin:end]))
        except (ValueError, RecursionError):
            continue
        places = list(_places(document))
        if not places:
            continue
        holder, key = draw.choice(places)
        _change(holder, key, draw, places)
        text = json.dumps(document, ensure_ascii=draw.random() < 0.8, indent=draw.choice((None, 1)))
        changed = text.encode("utf-8", "surrogatepass")
        return b"\n".join([*lines[:begin], changed, *lines[end:]])
    return None


def _places(value: Any, depth: int = 0) -> Any:
    """(list or object, index or key) of all values."""
    if depth > _DEEP or not isinstance(value, dict | list):
        return
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner, depth + 1)


def _change(holder: Any, key: Any, draw: random.Random, places: Sequence[tuple[Any, Any]]) -> None:
    match draw.choice(("odd", "odd", "odd", "drop", "other", "wrap", "deep", "name")):
        case "drop":
            del holder[key]
        case "other":
            other, place = draw.choice(places)
            holder[key] = json.loads(json.dumps(other[place]))
        case "wrap":
            holder[key] = draw.choice(([holder[key]], {"x": holder[key]}, str(holder[key])))
        case "deep":
            for _ in range(draw.choice((1, 20, _DEEP))):
                holder[key] = [holder[key]]
        case "name" if isinstance(holder, dict):
            other, place = draw.choice(places)
            holder[str(place)] = holder.pop(key)
        case _:
            holder[key] = draw.choice(_ODD)
