"""Messages and texts → token ids: however long, and by tokenizers that may not be the model's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from conflayers_cli.errors import InputError
from conflayers_cli.models.chat_template import REFUSALS, bounded
from conflayers_cli.utils.error_text import first_line

if TYPE_CHECKING:
    from conflayers_cli.models.loaded_model import LoadedModel

PIECE = 1 << 18
"""Characters tokenised at once where a long text's tokens are only counted."""
PIECES = 8
_CHARACTERS = 16
"""Per token of the context: a text with fewer is tokenised at once."""


class TooLongError(InputError):
    """A text has more tokens than the model takes; how many is not known.

    ``told`` says it without naming the text.
    """

    def __init__(self, told: str) -> None:
        super().__init__(f"the prompt {told}")
        self.told = told


def encode(
    loaded: LoadedModel, messages: list[dict[str, str]] | None, text: str | None
) -> list[int]:
    """The token ids of a conversation (by the chat template, up to the answer) or of a plain text.

    Raises:
        TooLongError: there are far more tokens than the model's context has room for.
        InputError: the model has no chat template, the template refuses the messages, no tokens
            come out, or some that the model doesn't know.
        ValueError: not exactly one of ``messages`` and ``text`` is given.
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
        made = render(loaded.tokenizer, messages)
    except InputError as error:
        raise InputError(
            f"the chat template of {loaded.name} refuses the messages: {error}"
        ) from error
    return made if isinstance(made, list) else _ids(loaded, made, special=False)


def _ids(loaded: LoadedModel, text: str, *, special: bool) -> list[int]:
    ids = token_ids(
        loaded.tokenizer,
        text,
        special=special,
        vocabulary=loaded.model.config.get_text_config().vocab_size,
        context=loaded.context_length,
        name=loaded.name,
    )
    if not ids:
        raise InputError("the prompt is empty: it gives no tokens")
    return ids


def render(tokenizer: Any, messages: list[dict[str, str]]) -> str | list[int]:
    """A conversation by the chat template, up to the answer.

    Token ids where the tokenizer is one of those that make them without a text. The template is run
    within bounds (see :mod:`.chat_template`). What reads like a special token in a message becomes
    one, as everywhere in transformers: messages are the user's, and ``<|im_end|>`` may be meant.

    Raises:
        InputError: the template refuses the messages, does not end, or takes too much memory.
    """
    own = type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template
    try:
        with bounded():
            made: str | list[int] = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=own, return_dict=False
            )
    except MemoryError:
        raise InputError("it takes too much memory") from None
    except REFUSALS as error:
        raise InputError(first_line(error)) from error
    return made


def token_ids(
    tokenizer: Any, text: str, *, special: bool, vocabulary: int, context: int | None, name: str
) -> list[int]:
    """The token ids of a text.

    A text that is far too long is refused by its beginning: where that has twice as many tokens as
    the context, the whole has more than the context, too, for what follows can change tokens at the
    cut only. A bound by the length of a tokenizer's longest token would not hold where a word that
    it doesn't know is one token.

    Args:
        special: put the tokens before and behind it that the tokenizer has for a text.
        vocabulary: how many tokens the model knows.
        context: how many it takes; None: any number.
        name: the model's, for the error.

    Raises:
        TooLongError: it has far more tokens than ``context``.
        InputError: it can't be tokenised, or has tokens that the model doesn't know.
    """
    if context is not None:
        length = _CHARACTERS * context
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


def count_tokens(tokenizer: Any, text: str) -> int:
    """How many tokens a text has; of one longer than `PIECES` of `PIECE` an estimate from so many.

    Each piece may count a token more than the whole does there.
    """
    count = -(-len(text) // PIECE)
    taken = range(count) if count <= PIECES else [i * count // PIECES for i in range(PIECES)]
    pieces = [text[i * PIECE : (i + 1) * PIECE] for i in taken]
    tokens = sum(len(_tokenised(tokenizer, piece, False)) for piece in pieces)
    return tokens if count <= PIECES else round(tokens * len(text) / sum(map(len, pieces)))


def _tokenised(tokenizer: Any, text: str, special: bool) -> list[int]:
    try:  # not verbose: the tokenizer's own idea of a limit is no matter, and goes to stderr
        ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    except Exception as error:  # the tokenizers package raises bare ones
        raise InputError(f"the text can't be tokenised: {first_line(error)}") from error
    return [int(i) for i in ids]
