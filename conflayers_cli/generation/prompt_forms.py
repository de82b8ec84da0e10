"""The forms that a row of a prompt file may have → `Prompt`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from enum import Enum

from conflayers_cli.errors import InputError
from conflayers_cli.generation.prompt_types import Message, Prompt, Row
from conflayers_cli.utils.json_stream import quoted

ACCEPTED = (
    '{"prompt": TEXT}, {"messages": [{"role", "content"}, …]}, {"turns": [TEXT, …]}, '
    '{"conversations": [{"from", "value"}, …]}'
)
MAX_NAME = 256
"""Characters of an id or a category: they are shown in tables and error messages."""
MAX_COLUMNS_SHOWN = 160
"""Characters of the columns' names in an error."""

_CHATS = ("messages", "conversations")
_FORMS = ("prompt", "messages", "turns", "conversations")
_FIELDS = ("instruction", "question", "article")
"""Forms of single data sets, looked for where none of the others is."""
FORMS = frozenset({*_FORMS, *_FIELDS})

_ROLE_KEYS = ("role", "content")
_SPEAKER_KEYS = ("from", "value")
_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
_SPEAKERS = {"system": "system", "human": "user", "user": "user"} | dict.fromkeys(
    ("gpt", "assistant", "chatgpt", "bot"), "assistant"
)


class Reason(Enum):
    """Why a row is no prompt: said of one row, and of several."""

    EMPTY = "empty conversation", "empty conversations"
    SPEAKER = "with an unknown speaker", "with an unknown speaker"
    NOTHING_ASKED = "with nothing of the user to answer", "with nothing of the user to answer"
    NO_TEXT = "without usable text", "without usable text"
    NO_FORM = "of no known form", "of no known form"


class UnusableRowError(InputError):
    """A row that is no prompt, and may be left out of a file where others are."""

    def __init__(self, message: object = "", reason: Reason = Reason.NO_TEXT) -> None:
        # "column" is the argument of `read_prompts`, and --prompt-column on the command line
        super().__init__(message, names=("column NAME",))
        self.reason = reason


def to_prompt(row: Row, column: str | None = None, *, keep_answer: bool = False) -> Prompt:
    """The prompt that a row is.

    Args:
        column: the key of the prompt's text (or chat); None: whichever form is known.
        keep_answer: it is a chat of which the last message, the assistant's, is to be continued;
            otherwise messages of the assistant at the end are answers, which are left out.

    Raises:
        UnusableRowError: it is no prompt.
        InputError: it is one with a fault, such as a bad id, or could be read as two.
    """
    value, where = row.value, row.where
    if not isinstance(value, dict):
        raise UnusableRowError(
            f"{where}: is {_kind(value)}, not an object; accepted are {ACCEPTED}", Reason.NO_FORM
        )
    form = _find_form(value, where) if column is None else _find_column(value, column, where)
    identity, category = _id(value, str(row.number), where), _category(value, where)
    body = _body(value, form, where, column is not None, keep_answer)
    text, messages = (body, None) if isinstance(body, str) else (None, body)
    prompt = Prompt(identity, messages, text, category)
    if keep_answer:
        prompt.check_continued(where)
    try:  # JSON can spell half a surrogate pair, but no tokenizer can take it
        json.dumps(asdict(prompt), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        code = f"\\u{ord(error.object[error.start]):04x}"
        raise InputError(f"{where}: has {code}, half a surrogate pair, which is no text") from None
    return prompt


def _find_form(value: Mapping[str, object], where: str) -> str:
    """The key of the form that a row has."""
    for group in (_FORMS, _FIELDS):
        # tables have a key for every column, many of them without a value
        forms = [key for key in group if not _is_missing(value.get(key))]
        if "prompt" in forms and "messages" in forms:
            forms.remove("prompt")  # UltraChat, no_robots: the first message once more
        if len(forms) > 1:
            raise InputError(
                f"{where}: has {' and '.join(forms)}; keep one of them, or say which: column NAME",
                names=("column NAME",),
            )
        if forms:
            return forms[0]
    for key in (*_FORMS, *_FIELDS):
        if key in value:
            return key
    raise UnusableRowError(
        f"{where}: is no known form (keys: {_columns(value)}); give column NAME, the key of the "
        f"prompt; accepted are {ACCEPTED}",
        Reason.NO_FORM,
    )


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value)


def _find_column(value: Mapping[str, object], column: str, where: str) -> str:
    if column not in value:
        raise UnusableRowError(
            f"{where}: has no column {quoted(column)}; give column NAME as one of its keys: "
            f"{_columns(value)}",
            Reason.NO_FORM,
        )
    return column


def _columns(value: Mapping[str, object]) -> str:
    """Keys of a row, as many as an error can take."""
    shown = ""
    for key in value:
        more = f", {quoted(key)}" if shown else quoted(key)
        if len(shown) + len(more) > MAX_COLUMNS_SHOWN:
            return f"{shown}, …"
        shown += more
    return shown or "none"


def _body(
    value: Mapping[str, object], form: str, where: str, is_column: bool, keep_answer: bool
) -> str | tuple[Message, ...]:
    """The text or the chat under a row's key."""
    body = value[form]
    if form in _CHATS and not (is_column and isinstance(body, str)):
        return _chat(body, form, where, keep_answer)
    if form == "turns" and not is_column:
        return _first_turn(body, form, where)
    if isinstance(body, list) and (is_column or form == "prompt"):
        # TRL's prompts are chats, those of MT-bench turns
        chat = bool(body) and isinstance(body[0], dict)
        if chat:
            return _chat(body, form, where, keep_answer)
        return _first_turn(body, form, where)
    text = _text(body, form, where)
    extra = value.get("input") if form == "instruction" and not is_column else None
    if extra is None or (isinstance(extra, str) and not extra.strip()):
        return text
    return f"{text}\n\n{_text(extra, 'input', where)}"


def _id(value: Mapping[str, object], default: str, where: str) -> str:
    for key in ("id", "question_id"):
        identity = value.get(key)
        if identity is None:
            continue
        if isinstance(identity, bool) or not isinstance(identity, str | int) or identity == "":
            raise InputError(f"{where}: {key} is {_kind(identity)}, not a text or a whole number")
        return _short_enough(str(identity), key, where)
    return default


def _category(value: Mapping[str, object], where: str) -> str | None:
    category = value.get("category")
    if category is not None and not isinstance(category, str):
        raise InputError(f"{where}: category is {_kind(category)}, not a text")
    return _short_enough(category, "category", where) if category else None


def _short_enough(name: str, key: str, where: str) -> str:
    if len(name) > MAX_NAME:
        raise InputError(
            f"{where}: {key} has {len(name):,} characters, allowed are {MAX_NAME}: {quoted(name)}"
        )
    return name


def _text(value: object, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise UnusableRowError(f"{where}: {key} is {_kind(value)}, not a text")
    if not value.strip():
        raise UnusableRowError(f"{where}: {key} is empty")
    return value


def _first_turn(value: object, form: str, where: str) -> str:
    if not isinstance(value, list) or not value:
        raise UnusableRowError(
            f"{where}: {form} is {_kind(value)}, not a list of texts",
            Reason.EMPTY if value == [] else Reason.NO_TEXT,
        )
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, str):
            raise UnusableRowError(f"{where}: turn {number} is {_kind(turn)}, not a text")
    return _text(value[0], "turn 1", where)


def _chat(value: object, form: str, where: str, keep_answer: bool) -> tuple[Message, ...]:
    """The messages up to what the model is to answer, or with ``keep_answer`` all."""
    if not isinstance(value, list) or not value:
        raise UnusableRowError(
            f"{where}: {form} is {_kind(value)}, not a list of messages",
            Reason.EMPTY if value == [] else Reason.NO_TEXT,
        )
    messages = [_message(item, n, form, where) for n, item in enumerate(value, 1)]
    if keep_answer:
        return tuple(messages)
    while messages and messages[-1].role == "assistant":
        messages.pop()
    if not messages or messages[-1].role != "user":
        raise UnusableRowError(
            f"{where}: {form} must end with a message of the user "
            "(those of the assistant after it are left out)",
            Reason.NOTHING_ASKED,
        )
    return tuple(messages)


def _message(item: object, number: int, form: str, where: str) -> Message:
    what = f"message {number}"
    if not isinstance(item, dict):
        raise UnusableRowError(f"{where}: {what} is {_kind(item)}, not an object")
    keys, others = _ROLE_KEYS, _SPEAKER_KEYS
    if form == "conversations":
        keys, others = others, keys
    if keys[0] not in item and all(key in item for key in others):
        keys = others
    for key in keys:
        if key not in item:
            raise UnusableRowError(f'{where}: {what} has no "{key}"; it needs {" and ".join(keys)}')
    roles, speaker = _ROLES if keys == _ROLE_KEYS else _SPEAKERS, item[keys[0]]
    role = roles.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        shown = quoted(speaker) if isinstance(speaker, str) else _kind(speaker)
        raise UnusableRowError(
            f"{where}: {keys[0]} of {what} is {shown}, allowed are {', '.join(roles)}",
            Reason.SPEAKER,
        )
    content = _joined(item[keys[1]], f"{keys[1]} of {what}", where)
    # an empty system message or answer says something, an empty question doesn't
    return Message(
        role, _text(content, f"{keys[1]} of {what}", where) if role == "user" else content
    )


def _joined(value: object, what: str, where: str) -> str:
    """A content: a text, or a list of text parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise UnusableRowError(
            f"{where}: {what} is {_kind(value)}, not a text or a list of text parts"
        )
    texts: list[str] = []
    for part in value:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise UnusableRowError(
                f'{where}: {what} has a part other than {{"type": "text", "text": TEXT}}, '
                "and only text is supported"
            )
        texts.append(text)
    return "".join(texts)


def _kind(value: object) -> str:
    """What a value of a row is, in words."""
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number"}
    if isinstance(value, str | list):
        return f"{'a' if value else 'an empty'} {'text' if isinstance(value, str) else 'list'}"
    return names.get(type(value), "an object")
