"""A bench as a picture: speeds by category, acceptance by position in the draft, time per token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import scipy.stats

from conflayers_cli.bench.schema import (
    SPECULATIVE,
    VANILLA,
    BenchDocument,
    PromptFigures,
    QueueFigures,
)
from conflayers_cli.bench.tables import label
from conflayers_cli.utils.plotting import GREEN, ORANGE, PURPLE, VERMILLION, WIDTH, YELLOW, Theme
from conflayers_cli.utils.statistics import MIN_RATIOS, Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ALL = "all prompts"
MAX_CATEGORIES = 24
MAX_NAME = 16
MAX_POSITIONS = 30
_ROW, _LINES, _BARS, _AROUND = 0.24, 1.25, 0.55, 0.62
"""Inches: a category's row, the lines, the bars, and the margins around a panel's data."""
_DRAFTERS = {"skip": 0, "ngram": 1}
"""Order of the drafters, so that each always looks the same."""
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def bench_figure(bench: BenchDocument, theme: Theme) -> Figure:
    """The picture of a bench; panels for which it has no figures are left out.

    To be called with the style of :mod:`conflayers_cli.utils.plotting` in force.
    """
    from matplotlib.figure import Figure

    rows = _speeds(bench)
    panels: list[tuple[float, Callable[[Axes], None]]] = [
        (_ROW * max(2, len(rows)), lambda axes: _draw_speeds(axes, bench, rows, theme))
    ]
    if any(any(part.drafted) for part in bench.speculative.by_position.values()):
        panels.append((_LINES, lambda axes: _draw_positions(axes, bench, theme)))
    if bench.token_times:
        panels.append((_BARS, lambda axes: _draw_times(axes, bench, theme)))
    heights = [height + _AROUND for height, _ in panels]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(panels), 1, height_ratios=heights)
    for number, (_, draw) in enumerate(panels):
        draw(figure.add_subplot(grid[number]))
    return figure


def _speeds(bench: BenchDocument) -> dict[str, dict[str, Interval]]:
    """Tokens per second and their intervals, by category and system; all prompts come last."""
    groups: dict[str, Sequence[PromptFigures | QueueFigures]] = {}
    names = list(bench.categories)[:MAX_CATEGORIES] if len(bench.categories) > 1 else []
    for name in names:
        groups[_short(name)] = [prompt for prompt in bench.prompts if prompt.category == name]
    groups[ALL] = bench.timed
    return {
        name: {system: speed_interval(group, system) for system in bench.arms}
        for name, group in groups.items()
    }


def speed_interval(timed: Sequence[PromptFigures | QueueFigures], system: str) -> Interval:
    """The median tokens per second of some prompts, as tables have it, with its 95 % interval.

    Both are over the prompts' own medians; with fewer than `MIN_RATIOS` prompts the interval is
    over all runs. Where queues of prompts were timed, both are over all runs.
    """
    runs = [[speed for speed in each.tokens_per_second.get(system, ()) if speed] for each in timed]
    medians = [middle for of_one in runs if (middle := Interval.of(of_one).median)]
    pooled = Interval.of([speed for of_one in runs for speed in of_one])
    if any(isinstance(each, QueueFigures) for each in timed):
        return pooled
    whole = Interval.of(medians)
    if len(medians) >= MIN_RATIOS or not whole.median or not pooled.low or not pooled.high:
        return whole
    low, high = min(pooled.low, whole.median), max(pooled.high, whole.median)
    return Interval(median=whole.median, low=low, high=high)


def _draw_speeds(
    axes: Axes, bench: BenchDocument, rows: dict[str, dict[str, Interval]], theme: Theme
) -> None:
    systems = list(bench.arms)
    step = min(0.32, 0.6 / max(1, len(systems) - 1))  # nearer to one another than to the next row
    for number, system in enumerate(systems):
        colour = _system_colour(system, number, theme)
        shift = (number - (len(systems) - 1) / 2) * step
        for row, (name, by_system) in enumerate(rows.items()):
            figure = by_system[system]
            if figure.median is None:
                continue
            y = row + shift
            if figure.low is not None and figure.high is not None:
                axes.plot([figure.low, figure.high], [y, y], color=colour, linewidth=1.4)
            axes.plot(
                [figure.median],
                [y],
                marker=_MARKERS[number % len(_MARKERS)],
                color=colour,
                markerfacecolor=theme.paper if system == VANILLA else colour,
                markersize=4,
                linestyle="none",
                label=label(system) if name == ALL else None,
            )
    if len(rows) > 1:
        axes.axhline(len(rows) - 1.5, color=theme.grid, linewidth=0.6)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(left=0)
    axes.grid(axis="x")
    axes.set_xlabel("tokens/s (median, 95 % interval)")
    _head(axes, "Decoding speed", columns=min(3, len(systems)))


def _draw_positions(axes: Axes, bench: BenchDocument, theme: Theme) -> None:
    from matplotlib.ticker import MaxNLocator

    counted = bench.speculative.by_position.items()
    drafters = {name: part for name, part in counted if any(part.drafted)}
    order = sorted(drafters, key=lambda name: _DRAFTERS.get(name, len(_DRAFTERS)))
    for number, name in enumerate(order):
        part = drafters[name]
        positions, rates, below, above = [], [], [], []
        for position, (accepted, drafted) in enumerate(
            zip(part.accepted, part.drafted, strict=True), 1
        ):
            if not drafted or position > MAX_POSITIONS:
                continue
            interval = scipy.stats.binomtest(accepted, drafted).proportion_ci(method="wilson")
            rate = 100 * accepted / drafted
            positions.append(position + (number - (len(drafters) - 1) / 2) * 0.16)
            rates.append(rate)
            below.append(max(0.0, rate - 100 * float(interval.low)))
            above.append(max(0.0, 100 * float(interval.high) - rate))
        colour = {"skip": theme.blue, "ngram": ORANGE}.get(name, (GREEN, VERMILLION)[number % 2])
        axes.errorbar(
            positions,
            rates,
            [below, above],
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=3.5,
            linewidth=1.2,
            elinewidth=0.7,
            linestyle=("-", "--", ":")[number % 3],
            color=colour,
            label=label(name),
        )
    axes.set_ylim(0, 105)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")
    axes.set_xlabel("place in the draft")
    axes.set_ylabel("accepted (%)")
    _head(axes, "Accepted drafts", columns=len(drafters))


def _draw_times(axes: Axes, bench: BenchDocument, theme: Theme) -> None:
    names, times = zip(*reversed(bench.token_times.items()), strict=True)
    drafting, verifying = zip(*times, strict=True)
    look: dict[str, Any] = {"color": ORANGE, "edgecolor": theme.paper, "hatch": "////"}
    axes.barh(names, drafting, 0.6, label="drafting", **look)
    axes.barh(names, verifying, 0.6, left=drafting, color=theme.blue, label="full passes")
    behind = {"facecolor": theme.paper, "edgecolor": "none", "pad": 0.8}
    for row, total in enumerate(map(sum, times)):
        axes.annotate(
            f"{total:.1f}",
            (total, row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            bbox=behind,
        )
    axes.set_xlim(0, max(map(sum, times)) * 1.16 or 1.0)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_xlabel("milliseconds per token")
    _head(axes, "Where a token's time goes", columns=2)


def _head(axes: Axes, title: str, columns: int) -> None:
    """A title, and the legend between it and the data."""
    handles, _ = axes.get_legend_handles_labels()
    lines = -(-len(handles) // columns)
    axes.set_title(title, pad=4 + 11 * lines)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, columnspacing=1.0)


def _system_colour(system: str, number: int, theme: Theme) -> str:
    if system == VANILLA:
        return theme.grey
    if system == SPECULATIVE:
        return theme.blue
    return (GREEN, VERMILLION, PURPLE, ORANGE, YELLOW)[number % 5]


def _short(name: str) -> str:
    shown = label(name)
    return shown if len(shown) <= MAX_NAME else f"{shown[: MAX_NAME - 1]}…"
