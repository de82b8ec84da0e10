"""The vocabulary in a GGUF file: its tokens, their kinds, and which of them have a meaning."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from gguf import TokenType

from conflayers_cli.errors import InputError
from conflayers_cli.models.gguf_metadata import GGUFMetadata

logger = logging.getLogger(__name__)

PREFIX = "tokenizer.ggml."
BYTE_LEVEL, UNIGRAM = "gpt2", "t5"
SENTENCEPIECE = ("llama", "gemma4")
"""Of ``tokenizer.ggml.model``: pieces merged by rank, with bytes for what is in no piece."""
NAMED_TOKENS: Mapping[str, str] = MappingProxyType(
    {
        "bos_token": f"{PREFIX}bos_token_id",
        "eos_token": f"{PREFIX}eos_token_id",
        "unk_token": f"{PREFIX}unknown_token_id",
        "sep_token": f"{PREFIX}seperator_token_id",  # the format's own spelling
        "pad_token": f"{PREFIX}padding_token_id",
        "mask_token": f"{PREFIX}mask_token_id",
    }
)
"""Names of transformers' special tokens, and the keys of their numbers."""
END_KEYS = tuple(
    f"{PREFIX}{name}_token_id" for name in ("eot", "eom", "fim_pad", "fim_rep", "fim_sep")
)
"""Ends of a turn, a message, a file and a repository, which end a text as the end of text does."""
ENDS = frozenset(
    {
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<turn|>", "<|eom_id|>"),
        *("<EOT>", "_<EOT>", "[EOT]", "<|endoftext|>", "<|end_of_text|>", "<end_of_utterance>"),
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        *("<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<|tool_response>"),
        *("<|fim_pad|>", "<fim_pad>", "<|repo_name|>", "<reponame>", "<|file_sep|>"),
    }
)
"""Special tokens that end a text by what they are called, as in llama.cpp, whatever the file says:
many files name one end alone, and give the others the wrong kind."""
_PART_END, _CALLS = "<|end|>", ("<|call|>", "<|calls|>")
"""The first ends but a part of a text in vocabularies with one of the others."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens, by their numbers.

    Attributes:
        kind: as ``tokenizer.ggml.model`` has it.
        tokens, types: each token's text and kind.
        scores: how soon a piece is merged; None: the file has none.
        merges: pairs of pieces, in order; None: the file has none.
        named: tokens with a meaning, by transformers' names for it.
    """

    kind: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[tuple[str, str]] | None
    named: dict[str, str]

    def of_type(self, *types: TokenType) -> list[str]:
        """The tokens of some kinds, in order."""
        wanted = set(map(int, types))
        both = zip(self.tokens, self.types, strict=True)
        return [token for token, kind in both if kind in wanted]

    def usable(self) -> dict[str, int]:
        """Numbers by token, without those that are there to fill up."""
        named, unused = set(self.named.values()), int(TokenType.UNUSED)
        return {
            token: number
            for number, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind != unused or token in named
        }

    def special(self) -> list[str]:
        """Tokens that are no part of a text, in order."""
        wanted = self.of_type(TokenType.CONTROL, TokenType.UNKNOWN)
        return list(dict.fromkeys([*wanted, *self.named.values(), *self.ends()]))

    def ends(self) -> dict[str, int]:
        """Tokens that end a text by what they are called, and their numbers."""
        wanted = {*ENDS, *_CALLS}
        known = {token: at for at, token in enumerate(self.tokens) if token in wanted}
        return find_ends(known.get)


def find_ends(number_of: Callable[[str], int | None]) -> dict[str, int]:
    """Tokens that end a text by what they are called, and their numbers."""
    inner = {_PART_END} if any(number_of(call) is not None for call in _CALLS) else set()
    found = {token: number_of(token) for token in sorted(ENDS - inner)}
    return {token: number for token, number in found.items() if number is not None}


def end_numbers(known: GGUFMetadata, keys: Iterable[str]) -> list[int]:
    """The numbers of tokens that some keys name."""
    given = (known.values.get(key) for key in keys)
    return [number for number in given if isinstance(number, int)]


def read_vocabulary(known: GGUFMetadata, source: str) -> Vocabulary:
    """The vocabulary in a file.

    Raises:
        InputError: there is none, one of a kind that is not supported, or a broken one.
    """
    kind = str(known.values.get(f"{PREFIX}model", "none"))
    if kind not in (BYTE_LEVEL, UNIGRAM, *SENTENCEPIECE):
        raise InputError(
            f"{source} has a vocabulary of the kind {kind!r:.60}: supported are {BYTE_LEVEL}, "
            f"{', '.join(SENTENCEPIECE)} and {UNIGRAM}"
        )
    tokens = known.texts(f"{PREFIX}tokens")
    if not tokens:
        raise InputError(f"the vocabulary of {source} is broken: it has no tokens")
    types = known.numbers(f"{PREFIX}token_type") or [int(TokenType.NORMAL)] * len(tokens)
    scores = known.numbers(f"{PREFIX}scores")
    for name, items in (("token types", types), ("scores", scores)):
        if items is not None and len(items) != len(tokens):
            raise InputError(
                f"the vocabulary of {source} is broken: {len(items):,} {name} for "
                f"{len(tokens):,} tokens"
            )
    merges = known.texts(f"{PREFIX}merges")
    return Vocabulary(
        kind=kind,
        tokens=tokens,
        types=types,
        scores=scores,
        merges=None if merges is None else list(map(_pair, merges)),
        named=_named(known, tokens, types, source),
    )


def _pair(merge: str) -> tuple[str, str]:
    """The two pieces of a merge; the first may be a space itself."""
    at = merge.find(" ", 1)
    return (merge[:at], merge[at + 1 :]) if at > 0 else (merge, "")


def _named(known: GGUFMetadata, tokens: list[str], types: list[int], source: str) -> dict[str, str]:
    named = {}
    for name, key in NAMED_TOKENS.items():
        number = known.values.get(key)
        if number is None:
            continue
        if isinstance(number, int) and 0 <= number < len(tokens):
            named[name] = tokens[number]
        else:
            logger.warning(
                f"note: {key} in {source} is {number}, and there are {len(tokens):,} tokens: it is "
                "not followed"
            )
    if "unk_token" not in named and int(TokenType.UNKNOWN) in types:
        named["unk_token"] = tokens[types.index(int(TokenType.UNKNOWN))]
    return named
