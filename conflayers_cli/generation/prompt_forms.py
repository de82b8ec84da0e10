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

_CHATS = ("messages", "conversations", "conversation")
_FORMS = ("prompt", "messages", "turns", *_CHATS[1:])
_FIELDS = ("instruction", "question", "article")
"""Forms of single data sets, looked for where none of the others is."""
FORMS = frozenset({*_FORMS, *_FIELDS})
_SYSTEM = ("system", "system_prompt")
_HISTORY = "history"
_BATCH_ID, _REQUESTS = "custom_id", ("body", "params")
"""Of the files that OpenAI's and Anthropic's batch interfaces take."""
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_IDS = ("id", "question_id")
NAMES = frozenset({*_IDS, "category"})
"""Keys beside a prompt that name it."""
_BESIDE = ("input", "context", "passage", _HISTORY, *_SYSTEM, *_MEDIA, _BATCH_ID, *_REQUESTS)
KEYS = FORMS | NAMES | {*_BESIDE}
"""All that is looked for in a row."""

_ROLE_KEYS = ("role", "content")
_SPEAKER_KEYS = ("from", "value")
_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "developer": "system"}
_SPEAKERS = {"system": "system", "human": "user", "user": "user"} | dict.fromkeys(
    ("gpt", "assistant", "chatgpt", "bot"), "assistant"
)


class Reason(Enum):
    """Why a row is no prompt: said of one row, and of several."""

    EMPTY = "empty conversation", "empty conversations"
    SPEAKER = "with an unknown speaker", "with an unknown speaker"
    NOTHING_ASKED = "with nothing of the user to answer", "with nothing of the user to answer"
    NO_TEXT = "without usable text", "without usable text"
    MEDIA = "with images or sound", "with images or sound"
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
    where = row.where
    if not isinstance(row.value, dict):
        raise UnusableRowError(
            f"{where}: is {_kind(row.value)}, not an object; accepted are {ACCEPTED}",
            Reason.NO_FORM,
        )
    value = _request(row.value) if column is None else row.value
    form = _find_form(value, where) if column is None else _find_column(value, column, where)
    identity, category = _id(value, str(row.number), where), _category(value, where)
    body = _body(value, form, where, column is not None, keep_answer)
    before = () if column is not None else _before(value, form, where)
    messages = (Message("user", body),) if isinstance(body, str) else body
    if before and messages[0].role == "system":
        before = ()
    chat = bool(before) or not isinstance(body, str)
    text = body if isinstance(body, str) and not chat else None
    prompt = Prompt(identity, (*before, *messages) if chat else None, text, category)
    if keep_answer:
        prompt.check_continued(where)
    try:  # JSON can spell half a surrogate pair, but no tokenizer can take it
        json.dumps(asdict(prompt), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        code = f"\\u{ord(error.object[error.start]):04x}"
        raise InputError(f"{where}: has {code}, half a surrogate pair, which is no text") from None
    return prompt


def _request(value: Mapping[str, object]) -> Mapping[str, object]:
    """What a row of a batch file asks for, by the row's id; other rows as they are."""
    for key in _REQUESTS:
        inner = value.get(key)
        if _BATCH_ID in value and isinstance(inner, dict):
            return {**inner, "id": value[_BATCH_ID]}
    return value


def _before(value: Mapping[str, object], form: str, where: str) -> tuple[Message, ...]:
    """The messages that a row has beside its prompt: a system message, and Alpaca's history."""
    for key in _MEDIA:
        if not _is_missing(value.get(key)) and value[key] != []:
            raise UnusableRowError(
                f"{where}: has {key}, and only text is read; give column NAME to take the text "
                "alone",
                Reason.MEDIA,
            )
    own = next((key for key in _SYSTEM if not _is_missing(value.get(key))), None)
    system = "" if own is None else _joined(value[own], own, where)
    before = [Message("system", system)] if system.strip() else []
    history = value.get(_HISTORY) if form == "instruction" else None
    if history is not None and not isinstance(history, list):
        raise UnusableRowError(f"{where}: {_HISTORY} is {_kind(history)}, not a list of turns")
    for number, turn in enumerate(history or (), 1):
        if not isinstance(turn, list) or len(turn) != 2:
            raise UnusableRowError(
                f"{where}: turn {number} of {_HISTORY} is not a list of a question and its answer"
            )
        question, answer = (_text(part, f"turn {number} of {_HISTORY}", where) for part in turn)
        before += [Message("user", question), Message("assistant", answer)]
    return tuple(before)


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
    if form in _CHATS and not is_column:
        body = _unquoted(body)
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
    return text if is_column else _with_context(text, value, form, where)


def _with_context(text: str, value: Mapping[str, object], form: str, where: str) -> str:
    """A text with what it is about: Alpaca's input, Dolly's context, SQuAD's, BoolQ's passage."""
    extra = value.get("input") if form == "instruction" else None
    if extra is not None and not (isinstance(extra, str) and not extra.strip()):
        return f"{text}\n\n{_text(extra, 'input', where)}"
    if form not in ("instruction", "question"):
        return text
    about = next((c for key in ("context", "passage") if _is_text(c := value.get(key))), None)
    if about is None:
        return text
    return f"{about}\n\n{text}" if form == "question" else f"{text}\n\n{about}"


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _unquoted(value: object) -> object:
    """A chat that is in a table as JSON; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _id(value: Mapping[str, object], default: str, where: str) -> str:
    for key in _IDS:
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
    asked = list(value)
    while not keep_answer and asked and _is_answer(asked[-1], form):
        asked.pop()
    messages = [_message(item, n, form, where) for n, item in enumerate(asked, 1)]
    if keep_answer:
        return tuple(messages)
    if not messages or messages[-1].role != "user":
        raise UnusableRowError(
            f"{where}: {form} must end with a message of the user "
            "(those of the assistant after it are left out)",
            Reason.NOTHING_ASKED,
        )
    return tuple(messages)


def _keys(item: Mapping[str, object], form: str) -> tuple[tuple[str, str], Mapping[str, str]]:
    """The keys of a message, and the roles that the first of them may name."""
    keys, others = _ROLE_KEYS, _SPEAKER_KEYS
    if form == "conversations":
        keys, others = others, keys
    if keys[0] not in item and all(key in item for key in others):
        keys = others
    return keys, _ROLES if keys == _ROLE_KEYS else _SPEAKERS


def _is_answer(item: object, form: str) -> bool:
    """Whether a message is the assistant's; at the end of a chat it need not be a text."""
    if not isinstance(item, dict):
        return False
    (key, _), roles = _keys(item, form)
    speaker = item.get(key)
    return isinstance(speaker, str) and roles.get(speaker) == "assistant"


def _message(item: object, number: int, form: str, where: str) -> Message:
    what = f"message {number}"
    if not isinstance(item, dict):
        raise UnusableRowError(f"{where}: {what} is {_kind(item)}, not an object")
    keys, roles = _keys(item, form)
    for key in keys:
        if key not in item:
            raise UnusableRowError(f'{where}: {what} has no "{key}"; it needs {" and ".join(keys)}')
    speaker = item[keys[0]]
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
    names[dict] = "an object"
    if isinstance(value, str | list):
        return f"{'a' if value else 'an empty'} {'text' if isinstance(value, str) else 'list'}"
    return names.get(type(value), f"of the type {type(value).__name__}")  # of Parquet
