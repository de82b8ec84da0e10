"""``conflayers profile convert``: a profile rewritten as the newest schema."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from conflayers_cli.cli import options
from conflayers_cli.cli.option_groups import with_groups
from conflayers_cli.cli.terminal import emit
from conflayers_cli.errors import InputError

if TYPE_CHECKING:
    from conflayers_cli.profile.schema import Profile

logger = logging.getLogger(__name__)

Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Where it goes; never over the input."),
]
InPlace = Annotated[bool, typer.Option("--in-place", help="Replace the input.")]
To = Annotated[
    Literal["yaml", "json"],
    typer.Option(
        "--to", help="yaml, the profile, or json, for other programs (YAML readers take it, too)."
    ),
]


@with_groups
def convert(
    *,
    file: options.ProfileArgument,
    output: Output = None,
    in_place: InPlace = False,
    to: To = "yaml",
    model: options.Model = None,
    load: options.BriefLoadFlags,
) -> None:
    """Rewrite a profile as the newest schema, in the form calibrate writes.

    It goes to --output, to its own place with --in-place, else to stdout. Comments
    are not kept. What the profile lacks about its model, --model adds: sizes, a
    hash of the configuration, a sketch of the weights.

    \b
      conflayers profile convert old.yaml --output new.yaml
      conflayers profile convert old.yaml --model ./my-model --in-place
    """
    from conflayers_cli.profile.schema import Profile, check_replaceable
    from conflayers_cli.utils.files import write_atomically

    target = _target(file, output, in_place)
    if target is not None:
        check_replaceable(target)
    profile, version = Profile.load_versioned(file)
    if model is not None:
        from conflayers_cli.engine.open_model import open_model
        from conflayers_cli.profile.check import complete_profile

        profile = complete_profile(*open_model(model, load), profile, file)
    elif profile.model.lacks_sizes:
        logger.warning(
            f"note: {file}: says nothing of its model but the depth; --model MODEL adds the rest"
        )
    text = profile.to_yaml() if to == "yaml" else _as_json(profile)
    if target is None:
        emit(text)
        return
    write_atomically(target, text)
    changed = "is" if version == profile.schema_version else f"was schema {version}, is"
    logger.info(f"wrote {target}: {changed} schema {profile.schema_version}")
    if profile.tensors is not None and not target.with_name(profile.tensors).exists():
        logger.warning(
            f"note: {profile.tensors} belongs beside {target}: copy it there from {file.parent}"
        )


def _target(file: Path, output: Path | None, in_place: bool) -> Path | None:
    """Where the profile goes; None: to standard output."""
    if in_place and output is not None:
        raise InputError("--output and --in-place: give one of the two")
    if in_place:
        return file
    if output is not None and os.path.realpath(output) == os.path.realpath(file):
        raise InputError(f"--output {output}: is the input; --in-place replaces it")
    return output


def _as_json(profile: Profile) -> str:
    import json

    from conflayers_cli.utils.yaml import parse_mapping

    data = parse_mapping(profile.to_yaml(), Path("profile"), "profile")  # as it would be read
    return f"{json.dumps(data, ensure_ascii=False, indent=2)}\n"
