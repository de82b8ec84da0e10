"""Typer's usage errors with a hint at what was meant."""

from __future__ import annotations

import re

from conflayers_cli.utils.error_text import did_you_mean

_NEAR_FLAGS = re.compile(r": (?P<word>\S+) \(Possible options: (?P<flags>[^)]*)\)$")
_NEAR_COMMAND = re.compile(r"\. Did you mean (?P<names>[^?]*)\?$")
_NO_CHOICE = re.compile(r"'(?P<word>[^']*)' is not one of (?P<known>'[^']*'(?:, '[^']*')*)$")


def with_hint(message: str) -> str:
    """A usage error's message, without a full stop, with what was probably meant.

    Typer's wording differs by version; an unknown one is returned as it is.
    """
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
