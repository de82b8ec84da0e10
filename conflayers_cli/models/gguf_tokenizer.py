"""A tokenizer of what a GGUF file says, as llama.cpp reads it.

transformers has a reader of its own, which drops special tokens that are not written in the bytes'
alphabet, puts the space before the first word whatever ``add_space_prefix`` says, and fails where a
special token's number is out of range.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from conflayers_cli.errors import InputError
from conflayers_cli.models.gguf_detokenizer import SPACE, GGUFTokenizer, TokenBytes
from conflayers_cli.models.gguf_metadata import GGUFMetadata
from conflayers_cli.models.gguf_splits import PRE_TOKENIZERS, WHOLE_WORDS, pre_tokenizer
from conflayers_cli.models.gguf_vocabulary import (
    BYTE_LEVEL,
    PREFIX,
    SENTENCEPIECE,
    UNIGRAM,
    Vocabulary,
    read_vocabulary,
)
from conflayers_cli.utils.error_text import first_line

logger = logging.getLogger(__name__)

TEMPLATE = "tokenizer.chat_template"
WHOLE = "tokenizer.huggingface.json"
"""A whole ``tokenizer.json``, which says more than the other keys."""
READ_KEYS = frozenset(
    PREFIX + name
    for name in (
        *("model", "pre", "tokens", "token_type", "scores", "merges", "precompiled_charsmap"),
        *("add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces"),
        # read, or without an effect where a text goes on
        *("add_sep_token", "cls_token_id", "token_type_count"),
        *("fim_pre_token_id", "fim_suf_token_id", "fim_mid_token_id"),
        *("prefix_token_id", "suffix_token_id", "middle_token_id"),
    )
)
DEFAULT_SPLIT = "default"
_MODEL_NAMES = ("phi-3", "phi3")
"""Parts of names of models whose special tokens take the white space behind them."""
_KEEP_SPACE = ("<unk>", "<s>", "<|endoftext|>")


def build_tokenizer(known: GGUFMetadata, source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a file.

    Raises:
        InputError: the file has no vocabulary, or one that is broken or not supported.
    """
    vocabulary = read_vocabulary(known, source)
    build = {BYTE_LEVEL: _byte_level, UNIGRAM: _unigram, **dict.fromkeys(SENTENCEPIECE, _pieces)}
    whole = known.values.get(WHOLE)
    try:
        if isinstance(whole, str):
            backend = Tokenizer.from_str(whole)
        else:
            backend = build[vocabulary.kind](known, vocabulary, source)
            _add_tokens(backend, known, vocabulary)
    except InputError:
        raise
    except Exception as error:  # the tokenizers package raises bare ones
        raise InputError(f"the vocabulary of {source} is broken: {first_line(error)}") from error
    begins = known.values.get(f"{PREFIX}add_bos_token", _begins(known, vocabulary))
    # transformers invents a beginning and an end for tokenizers that have none
    named = {"bos_token": None, "eos_token": None, **vocabulary.named}
    kind = PreTrainedTokenizerFast if isinstance(whole, str) else GGUFTokenizer
    tokenizer = kind(
        tokenizer_object=backend,
        add_bos_token=bool(begins) and named["bos_token"] is not None,
        add_eos_token=bool(known.values.get(f"{PREFIX}add_eos_token", False)),
        chat_template=_templates(known),
        clean_up_tokenization_spaces=False,
        **named,
    )
    if isinstance(tokenizer, GGUFTokenizer):
        prefixed = _prefixed(known, vocabulary)
        tokenizer.token_bytes = TokenBytes(vocabulary, prefixed=prefixed)
    return tokenizer


def _prefixed(known: GGUFMetadata, vocabulary: Vocabulary) -> bool:
    """Whether a space is put before a text, and behind every special token."""
    if vocabulary.kind == BYTE_LEVEL:
        return False
    return bool(known.values.get(f"{PREFIX}add_space_prefix", vocabulary.kind != "gemma4"))


def _begins(known: GGUFMetadata, vocabulary: Vocabulary) -> bool:
    """Whether texts begin with a special token where the file does not say."""
    if vocabulary.kind == BYTE_LEVEL:
        return known.values.get(f"{PREFIX}pre") in WHOLE_WORDS
    return vocabulary.kind != UNIGRAM


def _templates(known: GGUFMetadata) -> str | dict[str, str] | None:
    """The chat template; by name, where the file has several."""
    named = {
        key.removeprefix(f"{TEMPLATE}."): text
        for key, text in known.values.items()
        if key.startswith(f"{TEMPLATE}.") and isinstance(text, str)
    }
    own: str | None = known.values.get(TEMPLATE)
    if not named or own is None:
        return named or own
    return {"default": own, **named}


def _byte_level(known: GGUFMetadata, vocabulary: Vocabulary, source: str) -> Any:
    """Merges of bytes, each written as a letter."""
    name = known.values.get(f"{PREFIX}pre")
    splits = PRE_TOKENIZERS.get(str(name or "gpt-2"))
    if splits is None or name is None:
        said = "does not say how text is split" if name is None else f"splits text as {name!r} does"
        but = "GPT-2's way is taken" if name is None else "which is not known"
        logger.warning(
            f"note: {source} {said}, {but}: its tokens may be others than the model was trained on"
        )
    tokens = vocabulary.usable()
    merges = [
        (left, right)
        for left, right in vocabulary.merges or ()
        if left in tokens and right in tokens and left + right in tokens
    ]
    backend = Tokenizer(models.BPE(tokens, merges, ignore_merges=name in WHOLE_WORDS))
    backend.pre_tokenizer = pre_tokenizer(splits or PRE_TOKENIZERS[DEFAULT_SPLIT])
    backend.decoder = decoders.ByteLevel()
    return backend


def _pieces(known: GGUFMetadata, vocabulary: Vocabulary, source: str) -> Any:
    """SentencePiece's merges of letters."""
    tokens = vocabulary.usable()
    merges = vocabulary.merges
    if merges is None:
        if vocabulary.scores is None:
            raise InputError(f"the vocabulary of {source} is broken: no scores and no merges")
        merges = _merges_by_score(vocabulary, tokens)
    model = models.BPE(
        tokens,
        [pair for pair in merges if all(each in tokens for each in (*pair, "".join(pair)))],
        unk_token=vocabulary.named.get("unk_token"),
        fuse_unk=True,
        byte_fallback=bool(vocabulary.of_type(TokenType.BYTE)),
    )
    backend = Tokenizer(model)
    _mark_spaces(backend, known, vocabulary, [])
    return backend


def _merges_by_score(vocabulary: Vocabulary, tokens: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair that makes a piece, best pieces first."""
    pieces = {*vocabulary.of_type(TokenType.NORMAL, TokenType.USER_DEFINED)}
    scores = vocabulary.scores or ()
    found = [
        (-scores[number], number, cut, token)
        for token, number in tokens.items()
        if token in pieces
        for cut in range(1, len(token))
        if token[:cut] in tokens and token[cut:] in tokens
    ]
    return [(token[:cut], token[cut:]) for _, _, cut, token in sorted(found)]


def _unigram(known: GGUFMetadata, vocabulary: Vocabulary, source: str) -> Any:
    """SentencePiece's likeliest pieces."""
    if vocabulary.scores is None or "unk_token" not in vocabulary.named:
        raise InputError(f"the vocabulary of {source} is broken: no scores, or no unknown token")
    model = models.Unigram(
        list(zip(vocabulary.tokens, vocabulary.scores, strict=True)),
        vocabulary.tokens.index(vocabulary.named["unk_token"]),
        bool(vocabulary.of_type(TokenType.BYTE)),
    )
    backend = Tokenizer(model)
    steps: list[Any] = []
    if charsmap := known.numbers(f"{PREFIX}precompiled_charsmap"):
        steps.append(normalizers.Precompiled(bytes(number & 255 for number in charsmap)))
    if known.values.get(f"{PREFIX}remove_extra_whitespaces"):
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    _mark_spaces(backend, known, vocabulary, steps)
    return backend


def _mark_spaces(
    backend: Any, known: GGUFMetadata, vocabulary: Vocabulary, steps: list[Any]
) -> None:
    """Spaces become letters, with one before a text and behind every special token, if wanted."""
    prefixed = _prefixed(known, vocabulary)
    before = [normalizers.Prepend(SPACE)] if prefixed else []
    backend.normalizer = normalizers.Sequence([*steps, *before, normalizers.Replace(" ", SPACE)])
    after = [decoders.Strip(" ", 1, 0)] if prefixed else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )


def _add_tokens(backend: Any, known: GGUFMetadata, vocabulary: Vocabulary) -> None:
    """Tokens that are found in a text as a whole before it is split."""
    name = str(known.values.get("general.name", "")).lower()
    strips = any(part in name for part in _MODEL_NAMES)

    def added(tokens: Iterable[str], special: bool) -> list[AddedToken]:
        return [
            AddedToken(
                token,
                normalized=False,
                special=special,
                rstrip=strips and token not in _KEEP_SPACE,
            )
            for token in tokens
            if token
        ]

    special = vocabulary.special()
    backend.add_special_tokens(added(special, True))
    plain = dict.fromkeys(vocabulary.of_type(TokenType.USER_DEFINED))
    backend.add_tokens(added((token for token in plain if token not in special), False))
