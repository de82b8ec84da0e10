"""What Python callers may say about an answer, and what counts as a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypedDict, cast

from conflayers_cli.api.drafters import DraftBy, current_name
from conflayers_cli.errors import InputError
from conflayers_cli.prompts import Message, Prompt

Messages: TypeAlias = Sequence[Mapping[str, str]]
"""A chat: ``{"role": …, "content": …}`` in order."""
OnePrompt: TypeAlias = str | Messages | Prompt
ManyPrompts: TypeAlias = Sequence[str] | Sequence[Messages] | Sequence[Prompt]


class Options(TypedDict, total=False):
    """What may be said to `generate` and `stream`, as on the command line.

    ``lookahead`` is the old name of ``adaptive_draft_length``, taken for one more version.
    """

    max_new_tokens: int
    temperature: float
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float
    seed: int
    stop: str | Sequence[str]
    system: str | None
    raw: bool
    draft: DraftBy | None
    adaptive_draft_length: bool | None
    lookahead: bool | None
    tree: bool | None
    force: bool
    batch_size: int


@dataclass(frozen=True)
class Settings:
    """`Options` with their defaults.

    Attributes:
        max_new_tokens: the most tokens of an answer.
        temperature: 0 chooses greedily; the four after it are as in `Sampling`.
        seed: of the first prompt; the next one's is one more, and so on.
        stop: texts that end an answer and are not part of it.
        system: a system message, in place of the prompts' own.
        raw: prompts are given as they are, without the chat template.
        draft: who drafts; None: as the profile says, without one nobody.
        adaptive_draft_length: draft as far as it pays; None: as the profile says.
        tree: draft side candidates beside the chain; None: as the profile says.
        force: take a profile of another model of the same depth.
        batch_size: prompts decoded at once.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: str | Sequence[str] = ()
    system: str | None = None
    raw: bool = False
    draft: DraftBy | None = None
    adaptive_draft_length: bool | None = None
    tree: bool | None = None
    force: bool = False
    batch_size: int = 1

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts of ``stop``.

        Raises:
            InputError: one is empty.
        """
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if "" in stops:
            raise InputError("stop: an empty text would end every answer at once")
        return stops


def settings_of(options: Options) -> Settings:
    """Options with their defaults.

    Raises:
        TypeError: there is no such option.
        InputError: a number is too small.
    """
    given = dict(options)
    if "lookahead" in given:
        given["adaptive_draft_length"] = current_name(
            options.get("adaptive_draft_length"), options["lookahead"]
        )
        del given["lookahead"]
    if unknown := sorted(given.keys() - Settings.__dataclass_fields__.keys()):
        raise TypeError(f"unknown options: {', '.join(unknown)}")
    settings = Settings(**cast(dict[str, Any], given))
    for name in ("max_new_tokens", "batch_size"):
        if getattr(settings, name) < 1:
            raise InputError(f"{name} {getattr(settings, name)}: at least 1 is needed")
    return settings


def is_one(prompt: OnePrompt | ManyPrompts) -> bool:
    """Whether it is one prompt: a text, or a chat, which is a list of messages."""
    return isinstance(prompt, str | Prompt) or (
        len(prompt) > 0 and all(isinstance(each, Mapping) for each in prompt)
    )


def as_prompts(given: OnePrompt | ManyPrompts) -> list[Prompt]:
    """The prompts, numbered from 1.

    Raises:
        InputError: something is no prompt.
    """
    several: Iterable[object] = [given] if isinstance(given, Prompt) or is_one(given) else given
    return [_prompt(str(number), each) for number, each in enumerate(several, 1)]


def _prompt(number: str, given: object) -> Prompt:
    if isinstance(given, Prompt):
        return given
    if isinstance(given, str):
        if not given.strip():
            raise InputError(f"prompt {number} is empty")
        return Prompt(number, text=given)
    if not isinstance(given, Sequence) or not given:
        raise InputError(f"prompt {number}: is neither a text nor a chat")
    for message in given:
        known = isinstance(message, Mapping) and {"role", "content"} == message.keys()
        if not known or not all(isinstance(value, str) for value in message.values()):
            raise InputError(f'prompt {number}: messages are {{"role": TEXT, "content": TEXT}}')
    return Prompt(number, messages=tuple(Message(m["role"], m["content"]) for m in given))
