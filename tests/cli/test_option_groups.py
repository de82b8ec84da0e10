"""Groups of options: declared once, taken by a command as one dataclass."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from conflayers_cli.api.options import LoadKeywords, Options
from conflayers_cli.cli.option_groups import OptionGroup, with_groups
from conflayers_cli.cli.store_options import StoreOptions
from conflayers_cli.generation.prompt_encoding import PromptOptions
from conflayers_cli.models.load_options import LoadOptions
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.spec_decode.options import DraftOptions


@dataclass(frozen=True)
class Size:
    width: int = 3
    height: int | None = None
    unit: str = "cm"


SIZE = OptionGroup(
    height=typer.Option("--high", help="How high."), width=typer.Option("--wide", help="How wide.")
)
TALL = SIZE.but(height=typer.Option("--tall", help="How tall."))
seen: list[object] = []


@with_groups
def plain(*, first: bool = False, size: Annotated[Size, SIZE], last: str = "z") -> None:
    seen[:] = [first, size, last]


@with_groups
def other(*, size: Annotated[Size, TALL] = Size(width=8, unit="m")) -> None:
    seen[:] = [size]


def run(command: object, *arguments: str) -> list[object]:
    app = typer.Typer()
    app.command()(command)  # type: ignore[type-var]
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return [*seen]


def test_a_command_gets_the_dataclass() -> None:
    assert run(plain) == [False, Size(), "z"]
    assert run(plain, "--wide", "5", "--last", "y", "--high", "2") == [False, Size(5, 2), "y"]


def test_defaults_and_options_may_be_a_commands_own() -> None:
    assert run(other) == [Size(8, None, "m")]
    assert run(other, "--tall", "4") == [Size(8, 4, "m")]


def test_options_stand_where_the_group_stands_in_its_order() -> None:
    names = [*inspect.signature(plain).parameters]
    assert names == ["first", "height", "width", "last"]


def test_parts_of_a_group() -> None:
    assert [*SIZE.only("width").options] == ["width"]
    assert [*SIZE.without("width").options] == ["height"]
    assert [*TALL.options] == ["height", "width"]


def test_one_name_for_two_options_is_refused() -> None:
    with pytest.raises(TypeError, match="width is declared twice"):

        @with_groups
        def command(*, width: int = 1, size: Annotated[Size, SIZE]) -> None: ...


def test_keywords_of_the_python_api_are_fields_of_the_same_dataclasses() -> None:
    assert LoadKeywords.__optional_keys__ == {field.name for field in fields(LoadOptions)}
    kinds = (SamplingParams, PromptOptions, DraftOptions, StoreOptions)
    names = {field.name for kind in kinds for field in fields(kind)}
    assert Options.__optional_keys__ - {"draft", "stop", "force", "lookahead"} < names
