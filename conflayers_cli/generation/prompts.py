"""Prompt files in every accepted form → `Prompt`."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path

from conflayers_cli.errors import InputError
from conflayers_cli.generation.prompt_forms import (
    ACCEPTED,
    MAX_NAME,
    Reason,
    UnusableRowError,
    to_prompt,
)
from conflayers_cli.generation.prompt_rows import file_rows, text_rows
from conflayers_cli.generation.prompt_types import Message, Prompt, Row
from conflayers_cli.utils.json_stream import quoted
from conflayers_cli.utils.text_files import decode_text
from conflayers_cli.utils.text_stream import TextStream

__all__ = [
    "ACCEPTED",
    "MAX_NAME",
    "MAX_PROMPTS",
    "Message",
    "Prompt",
    "as_messages",
    "builtin_prompts",
    "fingerprint",
    "parse_prompts",
    "plain_text",
    "read_prompts",
    "with_system",
]

logger = logging.getLogger(__name__)

MAX_PROMPTS = 1_000_000
"""Of a file."""


def read_prompts(
    path: Path,
    *,
    column: str | None = None,
    strict: bool = False,
    limit: int | None = None,
    keep_answer: bool = False,
) -> list[Prompt]:
    """Read a prompt file: JSON lines, an array or object of JSON, CSV, TSV, Parquet, or plain text.

    Plain text has a prompt a line. ``hf:OWNER/NAME[/CONFIG][:SPLIT]`` in place of a path is a data
    set of Hugging Face. Of ``turns`` the first is taken; assistant messages at the end of a chat,
    which the model is to write, are left out. A prompt without an id is named by its line (in an
    array or a table, by its position), counted from 1. Keys that aren't known are ignored, but
    none may be repeated.

    A row that is no prompt, such as an empty conversation, is skipped, and a warning is logged that
    says how many were. The first row has to have a known form, or the column.

    Args:
        column: the key of the prompts; None: known forms are looked for.
        strict: refuse a row that would be skipped.
        limit: read no more prompts than that, and no more of the file than they need.
        keep_answer: leave the assistant's message at the end of a chat, to be continued; a row
            without one is refused.

    Raises:
        InputError: the file can't be read, holds no prompts or more than `MAX_PROMPTS`, has a row
            that is too long, or is refused for what is in a row.
    """
    return _collect(file_rows(path, column), str(path), column, strict, limit, keep_answer)


def builtin_prompts() -> list[Prompt]:
    """The prompts that come with the package (six categories, interleaved); InputError: missing."""
    name = "the built-in prompts"
    source = resources.files("conflayers_cli").joinpath("data", "prompts.jsonl")
    try:
        data = source.read_bytes()
    except OSError as error:
        raise InputError(f"{name} are missing, install conflayers again ({error})") from error
    return parse_prompts(decode_text(data, name), name, ".jsonl")


def parse_prompts(text: str, name: str, suffix: str) -> list[Prompt]:
    """The prompts in a file's text, as `read_prompts`; ``suffix`` is in lower case."""
    rows = text_rows(TextStream([text] if text else [], name), suffix)
    return _collect(rows, name, None, False, None)


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


def _collect(
    rows: Generator[Row],
    name: str,
    column: str | None,
    strict: bool,
    limit: int | None,
    keep_answer: bool = False,
) -> list[Prompt]:
    """The prompts that rows are; a warning says which are none."""
    prompts: list[Prompt] = []
    used_ids: dict[str, str] = {}
    skipped = _Skipped()
    number = 0
    # closed: a file is not left open where the rest of it isn't read
    with closing(rows):
        for number, row in enumerate(rows, 1):
            try:
                prompt = to_prompt(row, column, keep_answer=keep_answer)
            except UnusableRowError as error:
                if strict or (number == 1 and error.reason is Reason.NO_FORM):
                    raise
                skipped.add(error, row.place)
                continue
            if len(prompts) == MAX_PROMPTS:
                raise InputError(
                    f"{row.where}: is one prompt too many, allowed are {MAX_PROMPTS:,}"
                )
            if prompt.id in used_ids:
                raise InputError(
                    f"{row.where}: the id {quoted(prompt.id)} is taken by {used_ids[prompt.id]} "
                    "already (a prompt without an id is named by its number, here "
                    f"{row.number})"
                )
            used_ids[prompt.id] = row.where
            prompts.append(prompt)
            if len(prompts) == limit:
                break
    if not prompts:
        skipped.refuse(name)
        raise InputError(f"{name}: has no prompts; put one a line: plain text or {ACCEPTED}")
    if skipped.count:
        logger.warning(
            f"note: skipped {skipped.count:,} of {number:,} {'row' if number == 1 else 'rows'} of "
            f"{name}: {skipped.reasons()}"
        )
    return prompts


@dataclass
class _Skipped:
    """Rows of a file that are no prompts."""

    count: int = 0
    first_error: UnusableRowError | None = None
    by_reason: dict[Reason, int] = field(default_factory=dict)
    first_places: dict[Reason, str] = field(default_factory=dict)

    def add(self, error: UnusableRowError, place: str) -> None:
        """Count one more."""
        self.count += 1
        self.first_error = self.first_error or error
        self.by_reason[error.reason] = self.by_reason.get(error.reason, 0) + 1
        self.first_places.setdefault(error.reason, place)

    def refuse(self, name: str) -> None:
        """Raise InputError if there are any: there is nothing else in the file."""
        if self.count == 1 and self.first_error:
            raise self.first_error
        if self.count:
            raise InputError(
                f"{name}: none of its {self.count:,} rows is a prompt: {self.reasons()}"
            )

    def reasons(self) -> str:
        """How many for each reason, and where the first one is."""
        said = []
        for reason, count in self.by_reason.items():
            one, many = reason.value
            place = self.first_places[reason]
            said.append(
                f"1 {one} ({place})" if count == 1 else f"{count:,} {many} (the first at {place})"
            )
        return ", ".join(said)
