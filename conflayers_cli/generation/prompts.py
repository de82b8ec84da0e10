"""Prompt files in every accepted form → `Prompt`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from itertools import count
from pathlib import Path

from conflayers_cli.errors import InputError
from conflayers_cli.utils.text_files import decode_text, read_text

ACCEPTED = (
    '{"prompt": TEXT}, {"messages": [{"role", "content"}, …]}, {"turns": [TEXT, …]}, '
    '{"conversations": [{"from", "value"}, …]}'
)

MAX_PROMPTS = 1_000_000
"""Of a file."""
MAX_NAME = 256
"""Characters of an id or a category: they are shown in tables and error messages."""

_FORMS = ("prompt", "messages", "turns", "conversations")
_JSON_SUFFIXES = frozenset({".jsonl", ".json", ".jsonlines", ".ndjson"})
_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
_SPEAKERS = {"system": "system", "human": "user", "user": "user"} | dict.fromkeys(
    ("gpt", "assistant", "chatgpt", "bot"), "assistant"
)


@dataclass(frozen=True)
class Message:
    """One message of a chat. ``role`` is ``system``, ``user`` or ``assistant``."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """One prompt: either a chat (``messages``) or a ``text``, else a ValueError."""

    id: str
    messages: tuple[Message, ...] | None = None
    text: str | None = None
    category: str | None = None

    def __post_init__(self) -> None:
        if (self.messages is None) == (self.text is None):
            raise ValueError("a prompt has either messages or a text")


def read_prompts(path: Path) -> list[Prompt]:
    """Read a prompt file: JSONL, a ``.json`` file with one array, or text with a prompt a line.

    Every line is checked before any prompt is returned. Unknown keys are ignored, but none may be
    repeated. Of ``turns`` the first is taken; assistant messages at the end of a chat, which the
    model is to write, are left out. A prompt without an id is named by its line (in an array, by
    its position), counted from 1.

    Raises:
        InputError: the file can't be read, is larger than `MAX_BYTES`, holds no prompts or more
            than `MAX_PROMPTS`, or one of its lines is not a prompt.
    """
    return parse_prompts(read_text(path), str(path), path.suffix.lower())


def builtin_prompts() -> list[Prompt]:
    """The prompts that come with the package (six categories, interleaved); InputError: missing."""
    name = "the built-in prompts"
    source = resources.files("conflayers_cli").joinpath("data", "prompts.jsonl")
    try:
        data = source.read_bytes()
    except OSError as error:
        raise InputError(f"{name} are missing, install conflayers again ({error})") from error
    return parse_prompts(decode_text(data, name), name, ".jsonl")


def fingerprint(prompts: Iterable[Prompt]) -> str:
    """SHA-256, in hex, of texts and messages in order; ids and categories don't count."""
    content: list[object] = [
        [asdict(message) for message in prompt.messages] if prompt.messages else prompt.text
        for prompt in prompts
    ]
    canonical = json.dumps(content, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def as_messages(prompt: Prompt, system: str | None = None) -> list[dict[str, str]]:
    """The prompt as a chat template takes it, by `with_system`."""
    return [asdict(message) for message in with_system(prompt, system)]


def plain_text(prompt: Prompt, system: str | None = None) -> str:
    """The prompt without a chat template: its messages joined by blank lines."""
    return "\n\n".join(message.content for message in with_system(prompt, system))


def with_system(prompt: Prompt, system: str | None) -> tuple[Message, ...]:
    """The prompt's messages (a text is the user's) behind ``system``, which replaces its own."""
    messages = prompt.messages or (Message("user", prompt.text or ""),)
    if system is None:
        return messages
    rest = messages[1:] if messages[0].role == "system" else messages
    return (Message("system", system), *rest)


def parse_prompts(text: str, name: str, suffix: str) -> list[Prompt]:
    """The prompts in a file's text, as `read_prompts`; ``suffix`` is in lower case."""
    prompts: list[Prompt] = []
    used_ids: dict[str, str] = {}
    for number, where, value in _records(text, name, suffix):
        if len(prompts) == MAX_PROMPTS:
            raise InputError(f"{where}: is one prompt too many, allowed are {MAX_PROMPTS:,}")
        prompt = _prompt(value, str(number), where)
        if prompt.id in used_ids:
            raise InputError(
                f"{where}: the id {_quoted(prompt.id)} is taken by {used_ids[prompt.id]} already "
                f"(a prompt without an id is named by its number, here {number})"
            )
        used_ids[prompt.id] = where
        prompts.append(prompt)
    if not prompts:
        raise InputError(f"{name}: has no prompts; put one a line: plain text or {ACCEPTED}")
    return prompts


def _records(text: str, name: str, suffix: str) -> Iterator[tuple[int, str, object]]:
    """Number, location for error messages, and decoded value of every prompt in a file."""
    if suffix == ".json" and text.lstrip().startswith("["):
        items = _decode_json(text, name, 1)
        if isinstance(items, list):
            for number, item in enumerate(items, 1):
                yield number, f"{name}: item {number}", item
        return
    as_json = True if suffix in _JSON_SUFFIXES else None
    for number, line in _lines(text):
        if as_json is None:
            as_json = _is_json_object(line)  # the first line says what the others are
        value = _decode_json(line, name, number) if as_json else {"prompt": line}
        yield number, f"{name}:{number}", value


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Number and content of every line that is not blank.

    One by one: a list of all would take fifty times the memory of a file of blank lines.
    """
    start = 0
    for number in count(1):
        # not splitlines(): it also splits at characters that JSON allows in strings, U+2028 for one
        end = text.find("\n", start)
        line = text[start : end if end >= 0 else None].removesuffix("\r")
        if line.strip():
            yield number, line
        if end < 0:
            return
        start = end + 1


def _is_json_object(line: str) -> bool:
    if not line.lstrip().startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except RecursionError:
        return True  # JSON all the same; reading it will say what is wrong
    except ValueError:
        return False


def _decode_json(text: str, name: str, first_line: int) -> object:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        # Python takes the last of repeated keys, other readers the first.
        found: dict[str, object] = {}
        for key, value in pairs:
            if key in found:
                raise InputError(
                    f"{name}:{first_line}: has the key {_quoted(key)} twice in one object"
                )
            found[key] = value
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        problem = f"{error.msg[:1].lower()}{error.msg[1:]} (column {error.colno})"
        raise InputError(
            f"{name}:{line}: is not valid JSON: {problem}; every line is one of {ACCEPTED}"
        ) from None
    except RecursionError:
        raise InputError(f"{name}:{first_line}: is nested too deeply") from None
    except ValueError:  # Python's limit on the digits of a number
        raise InputError(f"{name}:{first_line}: has a number with too many digits") from None


def _prompt(value: object, default_id: str, where: str) -> Prompt:
    if not isinstance(value, dict):
        raise InputError(f"{where}: is {_kind(value)}, not an object; accepted are {ACCEPTED}")
    forms = [form for form in _FORMS if form in value]
    if not forms:
        keys = ", ".join(_quoted(key) for key in list(value)[:3]) or "none"
        keys += ", …" if len(value) > 3 else ""
        raise InputError(f"{where}: is no known form (keys: {keys}); accepted are {ACCEPTED}")
    if len(forms) > 1:
        raise InputError(f"{where}: has {' and '.join(forms)}; keep one of them")
    form, body = forms[0], value[forms[0]]
    identity, category = _id(value, default_id, where), _category(value, where)
    text, messages = None, None
    if form == "messages":
        messages = _chat(body, form, ("role", "content"), _ROLES, where)
    elif form == "conversations":
        messages = _chat(body, form, ("from", "value"), _SPEAKERS, where)
    else:
        text = _text(body, form, where) if form == "prompt" else _first_turn(body, where)
    prompt = Prompt(identity, messages, text, category)
    try:  # JSON can spell half a surrogate pair, but no tokenizer can take it
        json.dumps(asdict(prompt), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        code = f"\\u{ord(error.object[error.start]):04x}"
        raise InputError(f"{where}: has {code}, half a surrogate pair, which is no text") from None
    return prompt


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
            f"{where}: {key} has {len(name):,} characters, allowed are {MAX_NAME}: {_quoted(name)}"
        )
    return name


def _text(value: object, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: {key} is {_kind(value)}, not a text")
    if not value.strip():
        raise InputError(f"{where}: {key} is empty")
    return value


def _first_turn(value: object, where: str) -> str:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: turns is {_kind(value)}, not a list of texts")
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, str):
            raise InputError(f"{where}: turn {number} is {_kind(turn)}, not a text")
    return _text(value[0], "turn 1", where)


def _chat(
    value: object, form: str, keys: tuple[str, str], roles: Mapping[str, str], where: str
) -> tuple[Message, ...]:
    """The messages up to what the model is to answer."""
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: {form} is {_kind(value)}, not a list of messages")
    messages = [_message(item, n, keys, roles, where) for n, item in enumerate(value, 1)]
    while messages and messages[-1].role == "assistant":
        messages.pop()
    if not messages or messages[-1].role != "user":
        raise InputError(
            f"{where}: {form} must end with a message of the user "
            "(those of the assistant after it are left out)"
        )
    return tuple(messages)


def _message(
    item: object, number: int, keys: tuple[str, str], roles: Mapping[str, str], where: str
) -> Message:
    what = f"message {number}"
    if not isinstance(item, dict):
        raise InputError(f"{where}: {what} is {_kind(item)}, not an object")
    for key in keys:
        if key not in item:
            raise InputError(f'{where}: {what} has no "{key}"; it needs {" and ".join(keys)}')
    speaker = item[keys[0]]
    role = roles.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        shown = _quoted(speaker) if isinstance(speaker, str) else _kind(speaker)
        raise InputError(f"{where}: {keys[0]} of {what} is {shown}, allowed are {', '.join(roles)}")
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
        raise InputError(f"{where}: {what} is {_kind(value)}, not a text or a list of text parts")
    texts: list[str] = []
    for part in value:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise InputError(
                f'{where}: {what} has a part other than {{"type": "text", "text": TEXT}}, '
                "and only text is supported"
            )
        texts.append(text)
    return "".join(texts)


def _kind(value: object) -> str:
    """What a JSON value is, in words."""
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number"}
    if isinstance(value, str | list):
        return f"{'a' if value else 'an empty'} {'text' if isinstance(value, str) else 'list'}"
    return names.get(type(value), "an object")


def _quoted(value: object) -> str:
    """A JSON value in one short line of ASCII."""
    shown = json.dumps(value)
    return shown if len(shown) <= 60 else f"{shown[:59]}…"
