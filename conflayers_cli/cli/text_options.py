"""Options about texts: what ends them, what is left in them, what the chat template is given."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from conflayers_cli.cli.option_groups import OptionGroup
from conflayers_cli.cli.options import utf8
from conflayers_cli.errors import InputError

logger = logging.getLogger(__name__)

_ESCAPED = re.compile(r"\\[nrt]")
_prompts_option = partial(typer.Option, rich_help_panel="Prompts", show_default=False)


@dataclass(frozen=True)
class TextOptions:
    """Options about texts, each as its flag says."""

    stop: list[str] | None = None
    stop_escape: bool = False
    keep_special_tokens: bool = False
    template_arg: list[str] | None = None
    tools: Path | None = None
    documents: Path | None = None

    def read_stops(self) -> list[str] | None:
        """The stop strings as they are meant: see `read_stops`."""
        return read_stops(self.stop, self.stop_escape)

    def read_template(self) -> dict[str, Any] | None:
        """The chat template's arguments: see `read_template`."""
        return read_template(self.template_arg, self.tools, self.documents)


TEXT = OptionGroup(
    stop=typer.Option(
        "--stop",
        metavar="TEXT",
        help="End before this text; may be given repeatedly.",
        callback=utf8,
    ),
    stop_escape=typer.Option(
        "--stop-escape", help="Take \\n, \\t, \\\\ and \\uXXXX in --stop as JSON does."
    ),
    keep_special_tokens=typer.Option(
        "--keep-special-tokens",
        help="Leave special tokens in the text (marks of tool calls or thinking), but for the one "
        "that ends it.",
    ),
    template_arg=_prompts_option(
        "--template-arg",
        metavar="NAME=VALUE",
        help="An argument of the chat template, as enable_thinking=false; JSON, or else a text. "
        "May be given repeatedly.",
    ),
    tools=_prompts_option(
        "--tools",
        metavar="FILE",
        help="Tools that the chat template tells the model of: a JSON list.",
    ),
    documents=_prompts_option(
        "--documents",
        metavar="FILE",
        help="Documents for the chat template: a JSON list of objects.",
    ),
)
TextFlags = Annotated[TextOptions, TEXT]


def read_stops(stops: list[str] | None, escape: bool) -> list[str] | None:
    """The stop strings as they are meant; ``escape``: backslashes are those of JSON.

    Raises:
        InputError: one is empty, or has a backslash that means nothing.
    """
    if escape and not stops:
        raise InputError("--stop-escape goes with --stop")
    found = [_unescaped(stop) for stop in stops or ()] if escape else list(stops or ())
    if "" in found:
        raise InputError("--stop: an empty text would end every answer at once")
    for stop in found if not escape else ():
        if _ESCAPED.search(stop):
            logger.warning(
                f"note: --stop {stop!r} has a backslash and a letter: --stop-escape takes them for "
                "a line end and the like"
            )
    return found if stops is not None else None


def _unescaped(stop: str) -> str:
    try:
        quoted = re.sub(r'(?<!\\)"', r'\\"', stop)
        found: str = json.loads(f'"{quoted}"', strict=False)
    except ValueError:
        raise InputError(
            f"--stop {stop!r}: a backslash that means nothing; \\\\ stands for one"
        ) from None
    return found


def read_template(
    arguments: Sequence[str] | None, tools: Path | None, documents: Path | None
) -> dict[str, Any] | None:
    """The chat template's arguments; None: there are none.

    Raises:
        InputError: an argument without a name, or one given twice; a file that holds no list.
    """
    found: dict[str, Any] = {}
    for given in arguments or ():
        name, equals, value = given.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"--template-arg {given!r}: is not NAME=VALUE")
        if name in found:
            raise InputError(f"--template-arg {name}: is given twice")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = value
    for name, file in (("tools", tools), ("documents", documents)):
        if file is None:
            continue
        if name in found:
            raise InputError(f"--template-arg {name} and --{name}: give one of the two")
        found[name] = _read_list(file, name)
    return found or None


def _read_list(file: Path, name: str) -> list[Any]:
    from conflayers_cli.utils.text_files import read_text

    try:
        items = json.loads(read_text(file))
    except RecursionError:
        raise InputError(f"{file}: is nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{file}: is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise InputError(f"{file}: --{name} takes a JSON list of objects")
    return items
