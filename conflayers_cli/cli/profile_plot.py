"""``conflayers profile plot``: a profile as a picture."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from conflayers_cli.cli import options
from conflayers_cli.cli.terminal import emit, speaks_unicode
from conflayers_cli.errors import InputError

if TYPE_CHECKING:
    from conflayers_cli.profile.plot_data import Drawing
    from conflayers_cli.profile.schema import Profile

logger = logging.getLogger(__name__)

Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Draw into a .png, .svg or .pdf file."),
]
Dark = Annotated[bool, typer.Option("--dark", help="With --output: for a dark page.")]


def plot(file: options.ProfileArgument, output: Output = None, dark: Dark = False) -> None:
    """Draw a profile: what it leaves out, and how that was found.

    Of the tensors beside the profile: each layer's confidence under the adaptive
    threshold, proposal by proposal, and the search set by set (skipped share,
    acceptance, expected speed-up). As text, or with --output as a figure as wide
    as a paper's column (needs matplotlib: pip install 'conflayers\\[plot]').

    \b
      conflayers profile plot deep.yaml
      conflayers profile plot deep.yaml --output deep.pdf
      conflayers profile plot deep.yaml --output deep.svg --dark
    """
    from conflayers_cli.profile.plot_data import make_drawing
    from conflayers_cli.profile.schema import Profile
    from conflayers_cli.profile.tensors import read_tensors

    if dark and output is None:
        raise InputError("--dark goes with --output: a terminal has its own colours")
    form = None if output is None else _format(output)
    profile = Profile.load(file)
    drawing = make_drawing(profile, read_tensors(file, profile))
    if profile.tensors is None:
        logger.warning(
            f"note: {file} names no tensors: not how it was found, only what it skips is drawn"
        )
    elif not drawing.curves and drawing.proposals is None and drawing.alone is None:
        logger.warning(
            f"note: {profile.tensors} has nothing to draw: what the profile skips is drawn"
        )
    if output is None or form is None:
        from conflayers_cli.profile.plot_text import render_text

        lines = render_text(drawing, unicode=speaks_unicode(sys.stdout))
        emit("".join(f"{line}\n" for line in [_title(profile), *lines]))
        return
    _draw(output, form, drawing, profile, dark)


def _title(profile: Profile) -> str:
    found = profile.found_by
    return f"{profile.model.name}{f', found by {found.strategy}' if found else ''}"


def _format(output: Path) -> str:
    from conflayers_cli.profile.plot_figure import FORMATS
    from conflayers_cli.utils.files import check_target

    form = output.suffix.lower().removeprefix(".")
    if form not in FORMATS:
        allowed = ", ".join(f".{each}" for each in FORMATS)
        raise InputError(f"--output {output}: the name says the format, allowed are {allowed}")
    check_target(output)
    return form


def _draw(output: Path, form: str, drawing: Drawing, profile: Profile, dark: bool) -> None:
    from conflayers_cli.profile.plot_figure import render_figure
    from conflayers_cli.utils.files import write_atomically

    write_atomically(output, render_figure(drawing, _title(profile), form, dark=dark))
    logger.info(f"wrote {output}")
