"""A prompt, and a row of a file before it is one."""

from __future__ import annotations

from dataclasses import dataclass


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


@dataclass(frozen=True)
class Row:
    """What is one prompt in a file.

    Attributes:
        number: names the prompt if it has no id.
        where: the file and the place in it, for errors.
        place: the place alone, such as ``line 14``.
        value: what is there, an object if all is well.
    """

    number: int
    where: str
    place: str
    value: object
