"""A prompt, and a row of a file before it is one."""

from __future__ import annotations

from dataclasses import dataclass

from conflayers_cli.errors import InputError


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

    def check_continued(self, which: str) -> None:
        """Raise InputError, which says ``which``, unless its last message is the assistant's."""
        last = self.messages[-1].role if self.messages else None
        if last != "assistant":
            what = f"the last is the {last}'s" if last else "this is a text"
            raise InputError(
                f"{which}: {what}, and continue_final_message goes on with a last message of the "
                "assistant",
                names=("continue_final_message",),
            )


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
