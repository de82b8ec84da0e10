"""Log-probabilities in the two forms of OpenAI's API."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from conflayers_cli.generation.sequence import TokenLogprobs

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
LOWEST = -9999.0
"""OpenAI's number for "next to never": JSON has no minus infinity."""


class TokenNames:
    """Tokens as texts and bytes.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._bytes = _byte_letters()

    def text(self, token: int) -> str:
        text: str = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return text

    def bytes(self, token: int) -> list[int] | None:
        """The token's bytes; None where part of a character has none that are known."""
        text = self.text(token)
        if "\ufffd" not in text:
            return list(text.encode())
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return None
        if found := _BYTE.fullmatch(piece):
            return [int(found[1], 16)]
        known = [self._bytes.get(letter) for letter in piece]
        return None if None in known else [byte for byte in known if byte is not None]


def chat_logprobs(names: TokenNames, tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """``logprobs`` of a chat's choice."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": names.text(token),
            "logprob": max(logprob, LOWEST),
            "bytes": names.bytes(token),
        }

    return {
        "content": [
            {
                **entry(each.token, each.logprob),
                "top_logprobs": [entry(*other) for other in each.top],
            }
            for each in tokens
        ],
        "refusal": None,
    }


def completion_logprobs(
    names: TokenNames, tokens: Sequence[TokenLogprobs], offset: int
) -> dict[str, Any]:
    """``logprobs`` of a completion's choice; ``offset``: characters of the text before."""
    texts = [names.text(each.token) for each in tokens]
    offsets = [offset + sum(map(len, texts[:i])) for i in range(len(texts))]
    return {
        "tokens": texts,
        "token_logprobs": [max(each.logprob, LOWEST) for each in tokens],
        "top_logprobs": [
            {names.text(token): max(logprob, LOWEST) for token, logprob in each.top}
            for each in tokens
        ],
        "text_offset": offsets,
    }


def _byte_letters() -> dict[str, int]:
    """The letters that byte-level tokenizers write bytes as (GPT-2's): printable ones stand for
    themselves, the others for letters from U+0100 on, in order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(0x100) if byte not in plain)
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(0x100 + i): byte for i, byte in enumerate(others)}
