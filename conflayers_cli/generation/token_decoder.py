"""A tokenizer's decoding, token by token: text as soon as no later token can change it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias

from tokenizers import Regex, decoders
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from conflayers_cli.generation.text_stages import (
    REPLACEMENT,
    ByteFallback,
    ByteLevel,
    LastDiffers,
    PerToken,
    Replace,
    Stage,
    Stages,
    StripLeft,
    Without,
    WithoutRepeats,
    common_prefix,
)

_WINDOW = 8
"""Tokens decoded along by a decoder that isn't known, so that what follows comes out right."""
_MAX_HELD = 8
"""Tokens after which undecodable ones are not going to become a character."""
_CLEANED = (
    *((f" {mark}", mark) for mark in ".?!,"),
    (" ' ", "'"),
    *((f" {end}", end) for end in ("n't", "'m", "'s", "'ve", "'re")),
)
"""What transformers' `clean_up_tokenization` replaces, in this order."""
_ANCHOR = "x"
_StageMakers: TypeAlias = Mapping[str, Callable[[Mapping[str, Any]], Stage | None]]


class TokenDecoder(Protocol):
    """Pieces and the rest put together are what the tokenizer decodes all tokens to."""

    def feed(self, token: int) -> str:
        """The text that has become certain."""

    def peek(self) -> str:
        """The rest of the text, if this were its end; more may be fed all the same."""


def token_decoder(
    tokenizer: Any, *, keep_special: bool = False, prompt: Sequence[int] = ()
) -> TokenDecoder:
    """The decoder of one text, which comes to ``tokenizer.decode(tokens, skip_special_tokens=…)``.

    Args:
        tokenizer: a transformers tokenizer.
        keep_special: whether special tokens are part of the text.
        prompt: tokens that the text goes on behind, as one text with theirs: SentencePiece drops
            the space before the first word of a text of its own.
    """
    own_clean_up = _has_own_clean_up(tokenizer)
    clean_up = [] if own_clean_up else _clean_up(tokenizer)
    stages = None if own_clean_up else _known_stages(tokenizer)
    decoder: _KnownDecoder | _UnknownDecoder
    if stages is not None:
        decoder = _KnownDecoder(tokenizer, keep_special, Stages([*stages, *clean_up]))
    else:
        decoder = _UnknownDecoder(tokenizer, keep_special, own_clean_up, Stages(clean_up))
        prompt = prompt[-_WINDOW:]
    for token in prompt:
        decoder.feed(token)
    decoder.stages.append(Without(decoder.peek()))
    return decoder


class _KnownDecoder:
    """Of a tokenizer of which all is known that its decoder does."""

    def __init__(self, tokenizer: Any, keep_special: bool, stages: Stages) -> None:
        backend = tokenizer.backend_tokenizer
        added = {} if keep_special else backend.get_added_tokens_decoder()
        self._skipped = frozenset(each.content for each in added.values() if each.special)
        self._token_of = backend.id_to_token
        self.stages = stages

    def feed(self, token: int) -> str:
        text = self._token_of(token)
        return "" if text is None or text in self._skipped else self.stages.feed(text)

    def peek(self) -> str:
        return self.stages.peek()


class _UnknownDecoder:
    """Of any other tokenizer: text on which two decodings agree, one with a token more.

    Tokens far behind are taken not to change what is new.
    """

    def __init__(
        self, tokenizer: Any, keep_special: bool, own_clean_up: bool, stages: Stages
    ) -> None:
        self._tokenizer = tokenizer
        self._arguments = {"skip_special_tokens": not keep_special}
        if not own_clean_up:  # it is done by ``stages``
            self._arguments["clean_up_tokenization_spaces"] = False
        self.stages = stages
        self._tokens: list[int] = []
        self._text = ""  # of these tokens
        self._given = 0  # characters of it
        self._held = 0  # tokens since some were given
        self._limit = 2 * _WINDOW

    def feed(self, token: int) -> str:
        self._tokens.append(token)
        before, self._text = self._text, self._decode(self._tokens)
        certain = self._text[: common_prefix(before, self._text)]
        if self._held < _MAX_HELD:
            certain = certain.rstrip(REPLACEMENT)
        new = certain[self._given :]
        self._given += len(new)
        self._held = 0 if new else self._held + 1
        if len(self._tokens) >= self._limit:
            self._forget()
        return self.stages.feed(new)

    def peek(self) -> str:
        return self.stages.peek(self._text[self._given :])

    def _forget(self) -> None:
        """Go on with the last tokens, if the rest of the text can be told from them."""
        tokens, rest = self._tokens[-_WINDOW:], self._text[self._given :]
        text = self._decode(tokens)
        self._limit = 2 * len(self._tokens)
        if text.endswith(rest) and len(text) > len(rest):
            self._tokens, self._text, self._given = tokens, text, len(text) - len(rest)
            self._limit = 2 * _WINDOW

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), **self._arguments)
        return text


def _known_stages(tokenizer: Any) -> list[Stage] | None:
    """What a tokenizer of the tokenizers package does to its tokens; None: it is not known."""
    kind = type(tokenizer)
    if (
        getattr(kind, "_decode", None) is not PreTrainedTokenizerFast._decode
        or kind.decode is not PreTrainedTokenizerBase.decode
    ):
        return None
    decoder = tokenizer.backend_tokenizer.decoder
    if decoder is None:
        return [PerToken(str, " {}".format)]
    try:
        spec = json.loads(decoder.__getstate__())
    except Exception as error:
        if type(error) is not Exception:  # the package raises bare ones for what is not its own
            raise
        return None
    stages: list[Stage] = []
    make: _StageMakers = _TOKEN_STAGES
    for each in _flat(spec):
        if each["type"] in ("Fuse", "ByteLevel") and make is not _TEXT_STAGES:
            if each["type"] == "ByteLevel" and make is not _TOKEN_STAGES:
                return None
            stages += [ByteLevel()] if each["type"] == "ByteLevel" else []
            make = _TEXT_STAGES
            continue
        stage = make[each["type"]](each) if each["type"] in make else None
        if stage is None:
            return None
        stages.append(stage)
        if isinstance(stage, LastDiffers):
            make = MappingProxyType(
                {}
            )  # it gives parts of tokens: nothing but a whole text comes of these
    return stages


def _flat(spec: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if spec["type"] != "Sequence":
        yield spec
    else:
        for each in spec["decoders"]:
            yield from _flat(each)


def _per_token(decoder: Any) -> PerToken:
    """A stage that leaves each token to the decoder itself."""
    skip = len(decoder.decode([_ANCHOR]))
    return PerToken(
        lambda token: decoder.decode([token]),
        lambda token: decoder.decode([_ANCHOR, token])[skip:],
    )


def _replace(spec: Mapping[str, Any]) -> PerToken:
    pattern = spec["pattern"]
    wanted = pattern["String"] if "String" in pattern else Regex(pattern["Regex"])
    return _per_token(decoders.Replace(wanted, spec["content"]))


def _ends_with(spec: Mapping[str, Any]) -> LastDiffers:
    decoder = decoders.BPEDecoder(spec["suffix"])
    return LastDiffers(
        lambda token: decoder.decode([token]),
        lambda token: decoder.decode([token, _ANCHOR])[: -len(_ANCHOR)],
    )


def _ctc(spec: Mapping[str, Any]) -> WithoutRepeats:
    decoder = decoders.CTC(spec["pad_token"], spec["word_delimiter_token"], spec["cleanup"])
    return WithoutRepeats(lambda token: decoder.decode([token]))


_TOKEN_STAGES: _StageMakers = MappingProxyType(
    {
        "BPEDecoder": _ends_with,
        "ByteFallback": lambda _: ByteFallback(),
        "CTC": _ctc,
        "Metaspace": lambda spec: _per_token(
            decoders.Metaspace(spec["replacement"], spec["prepend_scheme"], spec["split"])
        ),
        "Replace": _replace,
        "Strip": lambda spec: (
            None if spec["stop"] else _per_token(decoders.Strip(spec["content"], spec["start"], 0))
        ),
        "WordPiece": lambda spec: _per_token(decoders.WordPiece(spec["prefix"], spec["cleanup"])),
    }
)
"""What decoders do to tokens, by their type."""

_TEXT_STAGES: _StageMakers = MappingProxyType(
    {
        "Fuse": lambda _: Without(""),  # they are one text already
        "Replace": lambda spec: (
            Replace(spec["pattern"]["String"], spec["content"])
            if spec["pattern"].get("String")
            else None
        ),
        "Strip": lambda spec: None if spec["stop"] else StripLeft(spec["content"], spec["start"]),
    }
)
"""What they do to the whole text, behind `Fuse` and `ByteLevel`."""


def _has_own_clean_up(tokenizer: Any) -> bool:
    """Whether cleaning spaces up is another thing than transformers makes of it."""
    known = PreTrainedTokenizerBase.clean_up_tokenization
    return getattr(type(tokenizer), "clean_up_tokenization", known) is not known


def _clean_up(tokenizer: Any) -> list[Stage]:
    """The stages by which transformers takes spaces out, where the tokenizer is set so.

    transformers doesn't for BPE, where spaces are part of tokens, unless it is told to.
    """
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    if type(getattr(backend, "model", None)).__name__ == "BPE" and not getattr(
        tokenizer, forced, False
    ):
        return []
    return [Replace(old, new) for old, new in _CLEANED]
