"""Typer's words for wrong usage, made into what a person needs to put it right."""

from __future__ import annotations

import re

from conflayers_cli.utils.suggest import did_you_mean

_NEAR_FLAGS = re.compile(r": (?P<word>\S+) \(Possible options: (?P<flags>[^)]*)\)$")
_NEAR_COMMAND = re.compile(r"\. Did you mean (?P<names>[^?]*)\?$")
_NO_CHOICE = re.compile(r"'(?P<word>[^']*)' is not one of (?P<known>'[^']*'(?:, '[^']*')*)$")


def with_hint(message: str) -> str:
    """The message with what was probably meant, in the same words whatever was misspelt.

    Typer's own wording differs by its version; one that is not recognised stays as it is.

    Args:
        message: of a usage error, without a full stop at its end.
    """
    # Where Typer has pydantic look at a value, it says so in front of what is wrong.
    message = message.replace(": Value error, ", ": ")
    if near := _NEAR_FLAGS.search(message):
        hint = did_you_mean(near["word"], near["flags"].split(", "))
        return f"{message[: near.start()]}: {near['word']}{hint}"
    if near := _NEAR_COMMAND.search(message):
        return f"{message[: near.start()]}; did you mean {near['names']}?"
    if choice := _NO_CHOICE.search(message):
        known = re.findall(r"'([^']*)'", choice["known"])
        return message + did_you_mean(choice["word"], known)
    return message
