"""A profile's drawing as a matplotlib figure, a paper's column wide."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from conflayers_cli.errors import InputError
from conflayers_cli.profile.plot_data import Curve, Drawing, Proposals, Values
from conflayers_cli.utils.plotting import ORANGE, VERMILLION, WIDTH, Theme, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

FORMATS: Final = ("png", "svg", "pdf")

# In inches. Positions are given, not solved for: a solver's differ in the last digits from run to
# run, and panels about layers have to lie in line.
_LEFT, _RIGHT, _TITLE, _HEAD, _TICKS, _NAME = 0.56, 0.34, 0.2, 0.2, 0.16, 0.13
_FOOT = 0.03


_DOTS: Final[dict[str, Any]] = {"markersize": 2.6, "markeredgewidth": 0, "linestyle": "none"}

Panel = tuple[float, float, Callable[["Axes", Theme], None]]
"""Inches of its axes' height, and of what numbers and a name take below them; what draws it."""


def render_figure(drawing: Drawing, title: str, form: str, *, dark: bool = False) -> bytes:
    """The figure as a file's content, one of `FORMATS`; the same for the same profile, every time.

    Raises:
        InputError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise InputError(
            "pictures are drawn by matplotlib, which is missing: pip install 'conflayers[plot]' "
            "(without output the picture is plain text)",
            names=("output",),
        )
    theme = Theme.DARK if dark else Theme.LIGHT
    return render(form, theme, partial(_draw, drawing, title), compact=True)


def _draw(drawing: Drawing, title: str, theme: Theme) -> Figure:
    from matplotlib.figure import Figure

    panels = _panels(drawing)
    height = _TITLE + sum(_HEAD + own + below for own, below, _ in panels) + _FOOT
    figure = Figure(figsize=(WIDTH, height))
    top = height - _TITLE
    for own, below, draw in panels:
        top -= _HEAD + own
        width = WIDTH - _LEFT - _RIGHT
        box = (_LEFT / WIDTH, top / height, width / WIDTH, own / height)
        draw(figure.add_axes(box), theme)
        top -= below
    fitting = title if len(title) <= 62 else f"{title[:61]}…"  # a column's width
    figure.text(0.05 / WIDTH, 1 - 0.05 / height, fitting, fontsize=8, ha="left", va="top")
    return figure


def _panels(drawing: Drawing) -> list[Panel]:
    named = _TICKS + _NAME
    panels: list[Panel] = [(0.3, _TICKS, partial(_draw_plan, left_out=drawing.left_out))]
    if (found := drawing.proposals) is not None:
        panels.append((0.9, _TICKS, partial(_draw_proposal, found=found)))
        height = min(max(0.055 * len(found.z), 0.5), 1.6)
        panels.append((height, named, partial(_draw_heat, found=found)))
    if drawing.alone is not None:
        panels.append((0.9, named, partial(_draw_alone, alone=drawing.alone)))
    for curve in drawing.curves:
        last = curve is drawing.curves[-1]
        draw = partial(_draw_curve, curve=curve, last=last)
        panels.append((0.45, named if last else 0.04, draw))
    return panels


def _draw_plan(axes: Axes, theme: Theme, left_out: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
    from matplotlib.colors import ListedColormap

    depth = left_out.shape[1]
    colours = ListedColormap([theme.blue, theme.grid])
    axes.pcolormesh(
        np.arange(depth + 1) - 0.5,
        np.arange(3) - 0.5,
        left_out.astype(float),
        cmap=colours,
        vmin=0,
        vmax=1,
        edgecolors=theme.paper,
        linewidth=0.4 if depth <= 100 else 0,
    )
    axes.set_yticks([0, 1], ["attention", "MLP"])
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    count, of = int(left_out.sum()), f"{2 * depth} sub-layers"
    if (left_out[0] == left_out[1]).all():
        count, of = count // 2, f"{depth} layers"
    axes.set_title(f"left out while drafting (grey): {count} of {of}")


def _draw_proposal(axes: Axes, theme: Theme, found: Proposals) -> None:
    z, threshold = found.z[found.shown], found.threshold[found.shown]
    out = found.selected[found.shown]
    layers = np.arange(1, len(z) + 1)
    colour = VERMILLION if theme is Theme.LIGHT else theme.ink
    axes.step(layers, threshold, where="mid", color=colour, linewidth=0.9, label="threshold")
    kept = ~out
    axes.plot(layers[kept], z[kept], marker="o", color=theme.blue, label="kept", **_DOTS)
    axes.plot(layers[out], z[out], marker="v", color=ORANGE, label="left out", **_DOTS)
    axes.set_xlim(-0.5, len(z) + 1.5)
    axes.set_title(f"z of proposal {found.shown + 1}")
    _legend(axes)


def _draw_heat(axes: Axes, theme: Theme, found: Proposals) -> None:
    count, inner = found.confidence.shape
    scale = float(np.quantile(found.confidence, 0.98)) or 1.0
    mesh = axes.pcolormesh(
        np.arange(inner + 1) + 0.5,
        np.arange(count + 1) + 0.5,
        found.confidence,
        cmap="cividis",
        vmin=0,
        vmax=scale,
        rasterized=True,
    )
    rows, columns = np.nonzero(found.selected)
    axes.plot(
        columns + 1,
        rows + 1,
        linestyle="none",
        marker="o",
        markersize=float(np.clip(60 / max(count, inner / 2), 0.6, 1.6)),
        markeredgewidth=0.25,
        markeredgecolor="#000000",
        markerfacecolor="#ffffff",
    )
    axes.set_xlim(-0.5, inner + 1.5)
    axes.set_ylim(count + 0.5, 0.5)
    _whole_ticks(axes.yaxis)
    axes.set_xlabel("layer", labelpad=1)
    axes.set_title("confidence, proposal by proposal (dots: left out)")
    bar = axes.figure.colorbar(mesh, cax=axes.inset_axes((1.015, 0, 0.025, 1)))
    bar.outline.set_visible(False)


def _draw_alone(axes: Axes, theme: Theme, alone: Values) -> None:
    layers = np.arange(alone.shape[1])
    axes.plot(layers, alone[0], marker="o", color=theme.blue, label="attention", **_DOTS)
    axes.plot(layers, alone[1], marker="v", color=ORANGE, label="MLP", **_DOTS)
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.set_xlabel("layer", labelpad=1)
    axes.set_title("agreement, one left out")
    _percent(axes)
    _legend(axes)


def _draw_curve(axes: Axes, theme: Theme, curve: Curve, last: bool) -> None:
    sets = np.arange(1, len(curve.values) + 1)
    known = np.isfinite(curve.values)
    axes.plot(
        sets[known],
        curve.values[known],
        marker="o" if len(sets) <= 60 else "",
        markersize=2.2,
        markeredgewidth=0,
        linewidth=0.8,
        color=theme.blue,
    )
    title = curve.name
    if curve.times:
        best = int(np.nanargmax(curve.values))
        axes.axhline(1, color=theme.grid, linewidth=0.7, zorder=0)
        axes.plot(sets[best], curve.values[best], "D", color=ORANGE, markersize=3.4, zorder=3)
        title = f"{title} over vanilla, {curve.values[best]:.2f}× at best"
    else:
        _percent(axes)
    axes.set_xlim(0.5, len(sets) + 0.5)
    axes.margins(y=0.2)
    axes.set_title(title)
    _whole_ticks(axes.xaxis)
    if last:
        axes.set_xlabel("set of layers looked at", labelpad=1)
    else:
        axes.tick_params(labelbottom=False)


def _legend(axes: Axes) -> None:
    """Right above the panel, beside its title."""
    axes.legend(
        ncols=3,
        loc="lower right",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0.2,
        handlelength=1.1,
        handletextpad=0.3,
        columnspacing=0.7,
    )


def _percent(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    low, high = axes.dataLim.intervaly
    axes.yaxis.set_major_locator(MaxNLocator(nbins=3))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1 if high - low < 0.05 else 0))


def _whole_ticks(axis: Axis) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
