"""How text is split before a byte-level vocabulary's merges, by the names that llama.cpp gives to
ways of splitting (``tokenizer.ggml.pre``).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from tokenizers import Regex, pre_tokenizers

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_LINES = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES
_CASED = tuple(rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]{more}" for more in "*+")
_TEKKEN = f"{_CASED[0]}[{_LOWER}]+|{_CASED[1]}[{_LOWER}]*" + r"|\p{N}" + _LINES
_GPT4O = (
    f"{_CASED[0]}[{_LOWER}]+{_CONTRACTIONS}?|{_CASED[1]}[{_LOWER}]*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}" + _LINES
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_THREE_DIGITS = "[0-9][0-9][0-9]"

Splits = tuple[str, ...]
PRE_TOKENIZERS: Mapping[str, Splits] = MappingProxyType(
    dict.fromkeys(
        (
            *("gpt-2", "phi-2", "mpt", "olmo", "jina-es", "jina-de", "gigachat", "mellum"),
            *("a.x-4.0", "modern-bert", "roberta-bpe"),
        ),
        (_GPT2,),
    )
    | dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        (r"\p{N}", _GPT2),
    )
    | dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "smaug-bpe", "dbrx"), (_LLAMA3,))
    | dict.fromkeys(("falcon-h1", "pixtral", "midm-2.0", "lfm2", "chatglm-bpe"), (_LLAMA3,))
    | dict.fromkeys(("qwen2", "stablelm2", "megrez", "deepseek-r1-qwen", "kormo"), (_QWEN2,))
    | dict.fromkeys(("tekken",), (_TEKKEN,))
    | dict.fromkeys(("gpt-4o", "llama4", "kanana2"), (_GPT4O,))
    | {
        "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", _THREE_DIGITS),
        "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, _THREE_DIGITS),
        "bloom": (r" ?[^(\s|.,!?…。，、।۔،)]+",),
    }
)
"""The regular expressions that split a text, one behind the other."""
WHOLE_WORDS = frozenset(
    {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"}
    | {"tekken"}
)
"""Ways whose pieces become a token of their own without merges where the vocabulary has one, and
whose texts begin with a special token unless the file says otherwise."""


def pre_tokenizer(splits: Splits) -> Any:
    """A pre-tokenizer of the tokenizers package."""
    return pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(split), "isolated") for split in splits),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
