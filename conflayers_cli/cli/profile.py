"""``conflayers profile``: read, check, compare, draw and rewrite profiles."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from conflayers_cli.cli import options
from conflayers_cli.cli.profile_convert import convert
from conflayers_cli.cli.profile_diff import diff
from conflayers_cli.cli.profile_plot import plot
from conflayers_cli.cli.profile_validate import validate
from conflayers_cli.cli.terminal import emit, emit_json, speaks_unicode
from conflayers_cli.errors import InputError

if TYPE_CHECKING:
    from conflayers_cli.profile.schema import Profile

HELP = """Read, check, compare, draw and rewrite profiles.

A profile is a small YAML file that people keep under version control:

\b
  conflayers profile show deep.yaml
  conflayers profile validate profiles/*.yaml
  conflayers profile diff old.yaml new.yaml
  conflayers profile plot deep.yaml --output deep.pdf
  conflayers profile convert old.yaml --output new.yaml
"""


app = typer.Typer(
    name="profile",
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["--help", "-h"]},
)


@app.command(name="show")
def show(file: options.ProfileArgument, json: options.Json = False) -> None:
    """Say what a profile says, for people.

    The picture has one sign for each layer. Figures are shown with the device that
    they were measured on: elsewhere they mean little.

    \b
      conflayers profile show deep.yaml
      conflayers profile show deep.yaml --json
    """
    from conflayers_cli.profile.describe import ASCII, UNICODE, description
    from conflayers_cli.profile.schema import Profile

    profile, version = Profile.load_versioned(file)
    if json:
        emit_json(_document(file, profile, version))
        return
    lines = description(
        profile,
        title=f"{file} (schema {version})",
        tensors=_state_of_tensors(file, profile),
        signs=UNICODE if speaks_unicode(sys.stdout) else ASCII,
    )
    emit("".join(f"{line}\n" for line in lines))


@app.command(name="schema")
def schema() -> None:
    """Print the JSON Schema of a profile.

    An editor that knows it completes and checks profiles while they are written.
    For the YAML language server (VS Code, Neovim, …), keep it as a file and begin
    a profile with a line that names it:

    \b
      conflayers profile schema > profile.schema.json
      # yaml-language-server: $schema=profile.schema.json

    or map it to file names by the setting yaml.schemas. What one schema can't
    say, that layers lie within the model's depth for one, `profile validate` does.
    """
    from conflayers_cli.profile.json_schema import packaged_schema

    emit(packaged_schema())


for _command in (validate, diff, plot, convert):
    app.command(name=_command.__name__)(_command)


def _document(file: Path, profile: Profile, version: int) -> dict[str, Any]:
    from conflayers_cli.profile.describe import figures_of, in_short, picture

    depth = profile.model.depth
    return {
        "schema_version": 1,
        "path": str(file),
        "profile_schema_version": version,
        "skipped": in_short(profile.plan, depth),
        "picture": picture(profile.plan, depth),
        "figures_of": figures_of(profile),
        "tensors": _state_of_tensors(file, profile),
        "profile": profile.model_dump(mode="json"),
    }


def _state_of_tensors(file: Path, profile: Profile) -> str | None:
    """The tensors' file and whether it is the one; None: none is named."""
    if profile.tensors is None:
        return None
    from conflayers_cli.profile.tensors import read_tensors

    try:
        read_tensors(file, profile)
    except InputError as error:
        return f"{profile.tensors}: {str(error).removeprefix(f'{file}: ')}"
    checked = "hash as written" if profile.tensors_sha256 else "no hash to compare"
    return f"{profile.tensors} ({checked})"
