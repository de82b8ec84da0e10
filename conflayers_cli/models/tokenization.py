"""Messages and texts → token ids."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from conflayers_cli.errors import InputError
from conflayers_cli.models.chat_template import TEMPLATE_ERRORS, bounded_template
from conflayers_cli.utils.error_text import first_line

if TYPE_CHECKING:
    from conflayers_cli.models.loaded_model import LoadedModel

logger = logging.getLogger(__name__)

CHUNK = 1 << 18
"""Characters tokenised at once where a long text's tokens are counted."""
MAX_CHUNKS = 8
_CHARACTERS_PER_TOKEN = 16
"""Shorter texts, by the context's tokens, are tokenised at once."""


class TooLongError(InputError):
    """A text has more tokens than the context, how many is unknown; ``reason`` has no subject."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the prompt {reason}")
        self.reason = reason


def encode(
    loaded: LoadedModel,
    messages: list[dict[str, str]] | None,
    text: str | None,
    template: Mapping[str, Any] | None = None,
    *,
    continue_final: bool = False,
) -> list[int]:
    """Token ids of a conversation (by the chat template, up to the answer) or of a plain text.

    Exactly one of ``messages`` and ``text`` is given; ``template``: arguments of the chat template;
    ``continue_final``: the last message is the beginning of the answer.

    Raises:
        TooLongError: there are far more tokens than the model's context.
        InputError: the model has no chat template, the template refuses the messages, or there are
            no tokens, or unknown ones.
    """
    if (messages is None) == (text is None):
        raise ValueError("encode takes either messages or text")
    if messages is None:
        return _ids(loaded, text or "", special=True)
    if not loaded.has_chat_template:
        raise InputError(
            f"{loaded.name} has no chat template: give plain text (raw)", names=("raw)",)
        )
    try:
        made = render_chat(loaded.tokenizer, messages, template, continue_final=continue_final)
    except InputError as error:
        raise InputError(
            f"the chat template of {loaded.name} refuses the messages: {error}"
        ) from error
    return made if isinstance(made, list) else _ids(loaded, made, special=False)


def _ids(loaded: LoadedModel, text: str, *, special: bool) -> list[int]:
    ids = encode_text(
        loaded.tokenizer,
        text,
        special=special,
        vocabulary=loaded.model.config.get_text_config().vocab_size,
        context=loaded.context_length,
        name=loaded.name,
    )
    if not ids:
        raise InputError("the prompt is empty: it gives no tokens")
    first = getattr(loaded.tokenizer, "bos_token_id", None)
    if special and first is not None and ids[:2] == [first, first]:
        logger.warning(
            f"note: the prompt spells the token {loaded.tokenizer.bos_token} that the tokenizer "
            "puts before a text: it is there once"
        )
        del ids[0]
    return ids


def render_chat(
    tokenizer: Any,
    messages: list[dict[str, str]],
    template: Mapping[str, Any] | None = None,
    *,
    continue_final: bool = False,
) -> str | list[int]:
    """A conversation by the chat template, up to the answer, or to where the last message ends.

    Token ids from tokenizers that make them without a text. As everywhere in transformers, what
    reads like a special token in a message becomes one: ``<|im_end|>`` may be meant.

    Raises:
        InputError: the template refuses the messages, does not end, or takes too much memory.
    """
    own = type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template
    try:
        with bounded_template():
            made: str | list[int] = tokenizer.apply_chat_template(
                messages,
                **(template or {}),
                add_generation_prompt=not continue_final,
                continue_final_message=continue_final,
                tokenize=own,
                return_dict=False,
            )
    except MemoryError:
        raise InputError("it takes too much memory") from None
    except TEMPLATE_ERRORS as error:
        if continue_final and "final message does not appear" in str(error):
            raise InputError("it alters the last one, which can't be continued then") from error
        raise InputError(first_line(error)) from error
    return made


def encode_text(
    tokenizer: Any, text: str, *, special: bool, vocabulary: int, context: int | None, name: str
) -> list[int]:
    """Token ids of a text.

    A text that is far too long is refused by its beginning: where that has twice as many tokens as
    the context, the whole has more than the context: what follows changes tokens at the cut only.
    (A bound by the longest token fails where an unknown word is one token.)

    Args:
        special: add the tokenizer's special tokens for a text.
        vocabulary, context: how many tokens the model knows, and takes; None: any number.
        name: the model's, for errors.

    Raises:
        TooLongError: it has far more tokens than ``context``.
        InputError: it can't be tokenised, or has tokens that the model doesn't know.
    """
    if context is not None:
        length = _CHARACTERS_PER_TOKEN * context
        while length < len(text):
            if len(_tokenised(tokenizer, text[:length], special)) > 2 * context:
                raise TooLongError(
                    f"is too long: {len(text):,} characters, over {2 * context:,} tokens, and "
                    f"{name} takes {context:,}, the answer included"
                )
            length *= 4
    ids = _tokenised(tokenizer, text, special)
    if ids and max(ids) >= vocabulary:
        raise InputError(
            f"the tokenizer of {name} gives the token {max(ids):,}, and the model knows "
            f"{vocabulary:,}: they don't belong together"
        )
    return ids


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256, in hex, of which token has which id; also of added ones."""
    known = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def plain_tokens(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text of any length, without special ones; InputError: there are none."""
    chunks = (text[i : i + CHUNK] for i in range(0, len(text), CHUNK))
    return [token for chunk in chunks for token in _tokenised(tokenizer, chunk, False)]


def count_tokens(tokenizer: Any, text: str) -> int:
    """The number of a text's tokens, give or take one per `CHUNK`.

    For more than `MAX_CHUNKS` chunks it is estimated from so many.
    """
    count = -(-len(text) // CHUNK)
    used = min(count, MAX_CHUNKS)
    chosen = [i * count // used for i in range(used)]
    chunks = [text[i * CHUNK : (i + 1) * CHUNK] for i in chosen]
    tokens = sum(len(_tokenised(tokenizer, chunk, False)) for chunk in chunks)
    return tokens if count <= MAX_CHUNKS else round(tokens * len(text) / sum(map(len, chunks)))


def _tokenised(tokenizer: Any, text: str, special: bool) -> list[int]:
    try:  # verbose tokenizers print their own limit on stderr
        ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    except Exception as error:  # the tokenizers package raises bare ones
        raise InputError(f"the text can't be tokenised: {first_line(error)}") from error
    return [int(i) for i in ids]
