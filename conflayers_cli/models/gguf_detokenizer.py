"""Tokens of a GGUF file back to text, byte by byte.

The tokenizers package turns a run of bytes that is broken anywhere into replacement characters as a
whole, takes added tokens with accents for bytes, and knows one token only of those spelt alike.
"""

from __future__ import annotations

from typing import Any

from gguf import TokenType
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conflayers_cli.models.gguf_vocabulary import BYTE_LEVEL, Vocabulary

SPACE = "\u2581"
"""SentencePiece's sign for a space."""


class TokenBytes:
    """The bytes that each token of a vocabulary stands for.

    Args:
        prefixed: a space before the first word was put there by the tokenizer.
    """

    def __init__(self, vocabulary: Vocabulary, *, prefixed: bool) -> None:
        special = set(vocabulary.special())
        self.count = len(vocabulary.tokens)
        self._vocabulary, self._prefixed = vocabulary, prefixed
        self._special = {n for n, token in enumerate(vocabulary.tokens) if token in special}
        self._letters = _byte_letters() if vocabulary.kind == BYTE_LEVEL else {}
        self._found: dict[int, bytes] = {}

    def decode(self, numbers: list[int], *, skip_special: bool) -> str:
        """The text of some tokens; numbers beyond the vocabulary have none."""
        wanted = (n for n in numbers if not (skip_special and n in self._special))
        text = b"".join(map(self._bytes, wanted)).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._prefixed else text

    def _bytes(self, number: int) -> bytes:
        if not 0 <= number < self.count:
            return b""
        if number not in self._found:
            self._found[number] = self._spell(number)
        return self._found[number]

    def _spell(self, number: int) -> bytes:
        token, kind = self._vocabulary.tokens[number], self._vocabulary.types[number]
        if number in self._special or kind == TokenType.USER_DEFINED:
            return token.encode()
        if kind == TokenType.UNUSED:
            return b""
        if kind == TokenType.BYTE:
            return bytes([int(token[1:-1], 16)])
        if not self._letters:
            return token.replace(SPACE, " ").encode()
        if set(token) <= self._letters.keys():
            return bytes(self._letters[letter] for letter in token)
        return token.encode()


class GGUFTokenizer(PreTrainedTokenizerFast):
    """A tokenizer that decodes by `TokenBytes`."""

    token_bytes: TokenBytes

    def __len__(self) -> int:
        return self.token_bytes.count if hasattr(self, "token_bytes") else super().__len__()

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **_: Any,
    ) -> str:
        numbers = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        return self.token_bytes.decode(numbers, skip_special=skip_special_tokens)


def _byte_letters() -> dict[str, int]:
    """The letters that byte-level vocabularies write bytes as, and the bytes.

    Bytes that are printable in Latin-1 are themselves, the others follow from U+0100 on.
    """
    letters = set(pre_tokenizers.ByteLevel.alphabet())
    own = {chr(byte): byte for byte in range(256) if chr(byte) in letters}
    others = [byte for byte in range(256) if chr(byte) not in own]
    return own | {chr(256 + place): byte for place, byte in enumerate(others)}
