"""``conflayers profile diff``: what differs between two profiles."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from conflayers_cli.cli import options
from conflayers_cli.cli.terminal import emit, emit_json

if TYPE_CHECKING:
    from conflayers_cli.profile.diff import Difference
    from conflayers_cli.profile.schema import Profile

DIFFERENT = 1
First = Annotated[Path, typer.Argument(metavar="A", help="A profile.", show_default=False)]
Second = Annotated[Path, typer.Argument(metavar="B", help="Another one.", show_default=False)]


def diff(one: First, other: Second, json: options.Json = False) -> None:
    """Show what differs between two profiles, key by key.

    What changes drafting comes first; how, when and where the profiles were found
    comes apart. Exit code: 0 they say the same, 1 they differ, 2 an error.

    \b
      conflayers profile diff old.yaml new.yaml
      git show HEAD:deep.yaml > was.yaml; conflayers profile diff was.yaml deep.yaml
    """
    from conflayers_cli.profile.diff import differences
    from conflayers_cli.profile.schema import Profile

    profiles = Profile.load(one), Profile.load(other)
    found = differences(*profiles)
    if json:
        emit_json(_document(one, other, profiles, found))
    elif found:
        emit("".join(f"{line}\n" for line in _lines(one, other, profiles, found)))
    if found:
        raise typer.Exit(DIFFERENT)


def _lines(
    one: Path, other: Path, profiles: tuple[Profile, Profile], found: tuple[Difference, ...]
) -> list[str]:
    lines = [f"--- {one}", f"+++ {other}"]
    parts = (
        ("changes drafting:", [each for each in found if each.changes_drafting]),
        ("says how, when and where it was found:", [e for e in found if not e.changes_drafting]),
    )
    weights = False
    for title, part in parts:
        if part:
            lines.append(title)
        for each in part:
            if not each.key.startswith("model.sketch."):
                lines.append(f"  {each.key}: {_change(each)}")
            elif not weights:  # once for all its numbers
                weights = True
                lines.append(f"  model.sketch: {_weights(profiles)}")
    return lines


def _change(each: Difference) -> str:
    if each.added is None or each.removed is None:
        return f"{_shown(each.before)} → {_shown(each.after)}"
    signs = (("+", each.added), ("−", each.removed))
    return ", ".join(f"{sign} {' '.join(map(str, layers))}" for sign, layers in signs if layers)


def _shown(value: Any) -> str:
    from conflayers_cli.utils.yaml import format_value

    if value is None:
        return "–"
    return str(value) if isinstance(value, str | list) else format_value(value)


def _weights(profiles: tuple[Profile, Profile]) -> str:
    one, other = (profile.model.sketch for profile in profiles)
    if one is None or other is None:
        return "none → there is one" if one is None else "there is one → none"
    distance = one.distance(other)
    if distance is None:
        return "not to be compared"
    verdict = "other weights" if one.differs(other) else "the same weights but for rounding"
    return f"{distance:.2%} apart ({verdict})"


def _document(
    one: Path, other: Path, profiles: tuple[Profile, Profile], found: tuple[Difference, ...]
) -> dict[str, Any]:
    sketches = [profile.model.sketch for profile in profiles]
    distance = sketches[0].distance(sketches[1]) if sketches[0] and sketches[1] else None
    return {
        "schema_version": 1,
        "before": str(one),
        "after": str(other),
        "equal": not found,
        "weights_distance": distance,
        "differences": [asdict(each) for each in found],
    }
