"""Names of arguments in errors and notes of the library, made into flags."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from conflayers_cli.errors import ConfLayersError

OTHERWISE: Mapping[str, str] = MappingProxyType(
    {"compiled": "--compile", "column": "--prompt-column"}
)
"""Flags that are not just the argument's name with hyphens."""

_NAME = re.compile(r"([a-z_][a-z0-9_]*)(=False)?")


def in_flags(error: ConfLayersError) -> str:
    """An error's message with flags in place of arguments' names."""
    return with_flags(str(error), error.names)


def with_flags(message: str, names: Iterable[str]) -> str:
    """A message with flags in place of arguments' names; ``names`` as of `ConfLayersError`."""
    for name in sorted(set(names), key=len, reverse=True):
        pattern = rf"(?<![\w./\\-]){re.escape(name)}(?![\w/\\]|[.-]\w)"
        message = re.sub(pattern, lambda found: _flagged(found[0]), message)
    return message


def _flagged(phrase: str) -> str:
    """A name and the words behind it: ``dtype float32`` → ``--dtype float32``."""
    found = _NAME.match(phrase)
    if found is None:
        return phrase
    name, off = found.groups()
    flag = OTHERWISE.get(name, f"--{name.replace('_', '-')}")
    return (flag.replace("--", "--no-", 1) if off else flag) + phrase[found.end() :]
