"""A model's tokenizer, read from its files, and the tokens that end a text."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from conflayers_cli.errors import InputError
from conflayers_cli.models.source import ModelSource, unreadable


def read_tokenizer(origin: ModelSource, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer. Refuses one that brings code of its own."""
    try:
        if origin.gguf is None and not trust_remote_code:
            told = get_tokenizer_config(origin.place, **origin.arguments)
            if told.get("auto_map"):
                raise InputError(
                    f"{origin.source} brings Python code of its own (auto_map in "
                    "tokenizer_config.json): trust_remote_code lets it run",
                    names=("trust_remote_code lets",),
                )
        return AutoTokenizer.from_pretrained(
            origin.place, trust_remote_code=trust_remote_code, **origin.arguments
        )
    except InputError:
        raise
    except Exception as error:  # the tokenizers package raises bare ones
        raise unreadable(origin, "tokenizer", error) from error


def end_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str
) -> frozenset[int]:
    """All ids that end a text, by the generation config, the config and the tokenizer."""
    text = model.config.get_text_config()
    ends: list[Any] = []
    for holder in (model.generation_config, model.config, text, tokenizer):
        named = getattr(holder, "eos_token_id", None)
        own = named if isinstance(named, list | tuple) else [named]
        if not all(end is None or isinstance(end, int) for end in own):
            raise InputError(
                f"{source} is broken: its end token (eos_token_id) is {str(named)[:60]!r}"
            )
        ends.extend(own)
    return frozenset(i for i in ends if isinstance(i, int) and 0 <= i < text.vocab_size)
