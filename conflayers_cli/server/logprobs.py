"""Log-probabilities in the two forms of OpenAI's API.

Tokens are named as they are written in the text, so that names, or their bytes where characters are
cut in pieces, join up to it: SentencePiece and WordPiece write a space before most words, but for a
text's first.
"""

from __future__ import annotations

import re
from codecs import getincrementaldecoder
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from conflayers_cli.generation.sequence import TokenLogprobs
from conflayers_cli.generation.text_stages import REPLACEMENT

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_ANCHOR = "x"
MAX_NAMES = 1 << 16
"""Tokens whose names are kept."""
LOWEST = -9999.0
"""OpenAI's number for "next to never": JSON has no minus infinity."""


@dataclass(frozen=True)
class TokenName:
    """A token as clients see it.

    Attributes:
        text: what it adds to the text; of part of a character its bytes, written out.
        bytes: the same as bytes; None: it is no part of the text, or they are not known.
        partial: whether it begins or ends within a character.
    """

    text: str
    bytes: tuple[int, ...] | None
    partial: bool = False


class TokenNames:
    """Tokens as texts and bytes; those named before are kept, the least recently used go first.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._letters = _byte_letters()
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._special = frozenset(token for token, each in added.items() if each.special)
        # What is written between others is known from between two letters.
        anchor = tokenizer(_ANCHOR, add_special_tokens=False)["input_ids"]
        self._anchor = [int(token) for token in anchor[-1:]]
        self._before = self._decode(self._anchor)
        self._behind = self._decode([*self._anchor, *self._anchor]).removeprefix(self._before)
        self.name = lru_cache(MAX_NAMES)(self._name)

    def _name(self, token: int, first: bool = False) -> TokenName:
        """A token's name; ``first``: it begins a text."""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if token in self._special:
            return TokenName(str(piece), None)
        text = self._text(token, first)
        if REPLACEMENT not in text:
            return TokenName(text, tuple(text.encode()))
        if not isinstance(piece, str):
            return TokenName(text, None)
        if REPLACEMENT in piece:  # the character itself
            return TokenName(text, tuple(text.encode()))
        if found := _BYTE.fullmatch(piece):
            return _of_bytes([int(found[1], 16)])
        known = [self._letters.get(letter) for letter in piece]
        if None in known:
            return TokenName(text, None)
        return _of_bytes([byte for byte in known if byte is not None])

    def _text(self, token: int, first: bool) -> str:
        before, anchor = ("", []) if first else (self._before, self._anchor)
        text = self._decode([*anchor, token, *self._anchor])
        if len(text) < len(before) + len(self._behind) or not (
            text.startswith(before) and text.endswith(self._behind)
        ):
            return self._decode([token])
        return text[len(before) : len(text) - len(self._behind)]

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
        return text


def _of_bytes(known: Sequence[int]) -> TokenName:
    try:
        return TokenName(bytes(known).decode(), tuple(known))
    except UnicodeDecodeError:
        written = (chr(byte) if 0x20 <= byte < 0x7F else f"\\x{byte:02x}" for byte in known)
        return TokenName("".join(written), tuple(known), partial=True)


@dataclass
class ChatLogprobs:
    """``logprobs`` of a chat's choice, token by token.

    Attributes:
        names: of tokens.
        content: OpenAI's entries so far.
    """

    names: TokenNames
    content: list[dict[str, Any]] = field(default_factory=list)
    _begun: bool = False

    def add(self, tokens: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        """The next tokens; returns their part of a stream, None where there are none."""
        new = []
        for each in tokens:
            top = [self._entry(*other) for other in each.top]
            new.append({**self._entry(each.token, each.logprob), "top_logprobs": top})
            self._begun = self._begun or new[-1]["bytes"] is not None
        self.content += new
        return {"content": new, "refusal": None} if new else None

    def whole(self) -> dict[str, Any]:
        return {"content": self.content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        name = self.names.name(token, not self._begun)
        known = None if name.bytes is None else list(name.bytes)
        return {"token": name.text, "logprob": max(logprob, LOWEST), "bytes": known}


class CompletionLogprobs:
    """``logprobs`` of a completion's choice, token by token; its text goes on behind the prompt's.

    Args:
        names: of tokens.
    """

    def __init__(self, names: TokenNames) -> None:
        self._names = names
        self._characters = getincrementaldecoder("utf-8")("replace")
        self._length = 0
        self._all = _completion_lists()

    def add(self, tokens: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        """The next tokens; returns their part of a stream, None where there are none."""
        new = _completion_lists()
        for each in tokens:
            name = self._names.name(each.token)
            new["tokens"].append(self._text(each.token))
            new["token_logprobs"].append(max(each.logprob, LOWEST))
            likeliest: dict[str, float] = {}
            for token, logprob in each.top:  # of two that are written alike, the likelier
                likeliest.setdefault(self._text(token), max(logprob, LOWEST))
            new["top_logprobs"].append(likeliest)
            new["text_offset"].append(self._length)
            self._length += len(self._characters.decode(bytes(name.bytes or ())))
        for key, values in new.items():
            self._all[key] += values
        return dict(new) if new["tokens"] else None

    def whole(self) -> dict[str, Any]:
        return dict(self._all)

    def _text(self, token: int) -> str:
        name = self._names.name(token)
        return f"bytes:{name.text}" if name.partial else name.text


def _completion_lists() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _byte_letters() -> dict[str, int]:
    """The letters that byte-level tokenizers write bytes as (GPT-2's): printable ones stand for
    themselves, the others for letters from U+0100 on, in order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(0x100) if byte not in plain)
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(0x100 + i): byte for i, byte in enumerate(others)}
