"""The style of plots, one column wide and legible to the colour-blind, and writing them to files.

Colours are those of Okabe and Ito, "Color Universal Design" (2008).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conflayers_cli.errors import InputError
from conflayers_cli.utils.files import check_target, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 3.4
"""Inches, a column of a two-column page."""
SUFFIXES = (".png", ".svg", ".pdf")
DPI = 300

ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"


class Theme(Enum):
    """A light or a dark page, and its colours."""

    LIGHT = "light"
    DARK = "dark"

    @property
    def paper(self) -> str:
        """The page's own colour."""
        return self._either("#FFFFFF", "#14171C")

    @property
    def ink(self) -> str:
        """Text and axes."""
        return self._either("#1A1A1A", "#ECECEC")

    @property
    def grey(self) -> str:
        """What something is compared with."""
        return self._either("#6E6E6E", "#A8A8A8")

    @property
    def grid(self) -> str:
        """Grid lines and the background."""
        return self._either("#DDDDDD", "#34383E")

    @property
    def blue(self) -> str:
        """The subject of a plot; the darker blue can't be seen on a dark page."""
        return self._either(BLUE, SKY)

    def _either(self, light: str, dark: str) -> str:
        return light if self is Theme.LIGHT else dark


def check_plot(path: Path) -> None:
    """Raise InputError for an unknown format, a path that can't be written, or no matplotlib."""
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(
            f"plot {path}: the name must end with {', '.join(SUFFIXES)}", names=(f"plot {path}:",)
        )
    check_target(path)
    if find_spec("matplotlib") is None:
        raise InputError(
            "plot needs matplotlib: pip install matplotlib (this package's extra `plot`)",
            names=("plot needs",),
        )


def save_plot(path: Path, theme: Theme, draw: Callable[[Theme], Figure]) -> None:
    """Draw a plot and write it in the format of the path's suffix; errors as `check_plot`."""
    check_plot(path)
    write_atomically(path, render(path.suffix.lower()[1:], theme, draw))


def render(
    form: str, theme: Theme, draw: Callable[[Theme], Figure], *, compact: bool = False
) -> bytes:
    """A plot as a file's content: the same figures give the same bytes, without a date.

    Args:
        form: ``png``, ``svg`` or ``pdf``.
        draw: makes the figure, with matplotlib's settings in force.
        compact: smaller letters, for many panels in a column.
    """
    import matplotlib as mpl

    dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(form, {})
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter that the font lacks is drawn as a box
        with mpl.rc_context({**_style(theme), **(_COMPACT if compact else {})}):
            draw(theme).savefig(content, format=form, dpi=DPI, metadata=dated)
    return content.getvalue()


_COMPACT = {
    **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize"), 7.0),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 6.5),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 2.0),
    "axes.titlepad": 3.0,
    "axes.titleweight": "normal",
}


def _style(theme: Theme) -> dict[str, Any]:
    """matplotlib's settings, on top of its defaults instead of a user's matplotlibrc."""
    import matplotlib as mpl

    ink = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), theme.ink
    )
    paper = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), theme.paper)
    sizes = dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize"), 8.0)
    small = dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 7.0)
    return {
        **{key: value for key, value in mpl.rcParamsDefault.items() if "backend" not in key},
        **ink,
        **paper,
        **sizes,
        **small,
        "text.parse_math": False,  # a "$" in a name is a "$"
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.linewidth": 0.6,
        "grid.color": theme.grid,
        "grid.linewidth": 0.6,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "hatch.linewidth": 0.6,
        "legend.frameon": False,
        "legend.handlelength": 1.4,
        "legend.borderpad": 0.0,
        "pdf.fonttype": 42,
        "svg.hashsalt": "conflayers",
    }
