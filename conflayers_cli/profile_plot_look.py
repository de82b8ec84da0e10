"""How figures look: colours and sizes, for light and dark pages.

Colours are Okabe and Ito's ("Color Universal Design", 2008) and matplotlib's cividis, which people
with any colour vision can tell apart, and which differ in lightness, too. Text has 6.5 points or
more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_BLUE, _SKY, _ORANGE, _VERMILLION = "#0072B2", "#56B4E9", "#E69F00", "#D55E00"


@dataclass(frozen=True)
class Look:
    """The colours of a light or dark figure."""

    paper: str
    ink: str
    faint: str
    main: str
    out: str
    line: str


LIGHT = Look("#ffffff", "#222222", "#d9d9d9", _BLUE, _ORANGE, _VERMILLION)
DARK = Look("#14171c", "#e6e6e6", "#3a3f47", _SKY, _ORANGE, "#ffffff")


def style(look: Look) -> dict[str, Any]:
    """matplotlib's settings for a look."""
    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    papers = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    return {
        **dict.fromkeys(inks, look.ink),
        **dict.fromkeys(papers, look.paper),
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same everywhere
        "font.size": 7,
        "axes.labelsize": 7,
        "axes.titlesize": 7,
        "axes.titlelocation": "left",
        "axes.titlepad": 3,
        "xtick.labelsize": 6.5,
        "ytick.labelsize": 6.5,
        "legend.fontsize": 6.5,
        "axes.linewidth": 0.6,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "xtick.major.size": 2,
        "ytick.major.size": 2,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "conflayers",
        "svg.fonttype": "path",
        "pdf.fonttype": 42,
    }
