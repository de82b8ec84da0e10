"""A profile's drawing in plain characters, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from conflayers_cli.profile.plot_data import Curve, Drawing, Proposals, Values

LABEL = 11
HEIGHT = 8
"""Lines of the columns of one proposal."""
MAX_ROWS = 20
"""Proposals shown; of more, evenly spaced ones."""
MAX_COLUMNS = 72
"""Sets shown side by side; of more, the best of each group."""

_BARS = " ▁▂▃▄▅▆▇█"
_ASCII_BARS = " ._-=+*%#"


def render_text(drawing: Drawing, *, unicode: bool = True) -> list[str]:
    """The drawing, top to bottom, a column for each layer; ``unicode``: with block characters."""
    signs = _Signs(unicode)
    lines = _plan(drawing, signs)
    if drawing.proposals is not None:
        lines += ["", *_proposal(drawing.proposals, signs), "", *_heat(drawing.proposals, signs)]
    if drawing.alone is not None:
        lines += ["", *_alone(drawing.alone, signs)]
    if drawing.curves:
        lines += ["", *_search(drawing.curves, signs)]
    return [line.rstrip() for line in lines]


class _Signs:
    """The characters that pictures are made of."""

    def __init__(self, unicode: bool) -> None:
        self.bars = _BARS if unicode else _ASCII_BARS
        self.runs, self.skipped, self.light, self.line = "█·░─" if unicode else "#.:-"
        self.dash = "–" if unicode else "-"

    def bar(self, share: float) -> str:
        """A column of ``share`` of full height; NaN is blank."""
        if not np.isfinite(share):
            return " "
        return self.bars[1 + round(min(max(share, 0.0), 1.0) * (len(self.bars) - 2))]


def _labelled(label: str, text: str) -> str:
    return f"{label:<{LABEL}}{text}"


def _ruler(count: int, first: int = 0) -> str:
    """Numbers under every tenth column."""
    begin = -first % 10
    numbers = "".join(f"{number:<10}" for number in range(first + begin, first + count, 10))
    return f"{' ' * begin}{numbers}".rstrip()


def _plan(drawing: Drawing, signs: _Signs) -> list[str]:
    rows = zip(("attention", "MLP"), drawing.left_out, strict=True)
    lines = [f"layers ({signs.runs} runs while drafting, {signs.skipped} left out)"]
    for name, row in rows:
        lines.append(_labelled(name, "".join(signs.skipped if out else signs.runs for out in row)))
    return [*lines, _labelled("", _ruler(drawing.left_out.shape[1]))]


def _proposal(found: Proposals, signs: _Signs) -> list[str]:
    """One proposal: columns up to each layer's confidence, and the threshold across them."""
    z, threshold = found.z[found.shown], found.threshold[found.shown]
    low, high = min(z.min(), threshold.min()), max(z.max(), threshold.max())
    span = max(high - low, 1e-9)
    heights = np.rint((z - low) / span * (HEIGHT - 1)).astype(int)
    levels = np.rint((threshold - low) / span * (HEIGHT - 1)).astype(int)
    lines = [
        f"confidence of proposal {found.shown + 1} of {len(found.z)} (standardised; {signs.runs} "
        f"kept, {signs.light} left out, {signs.line} adaptive threshold)"
    ]
    for row in reversed(range(HEIGHT)):
        cells = ""
        for k, out in enumerate(found.selected[found.shown]):
            column = (signs.light if out else signs.runs) if heights[k] >= row else " "
            cells += signs.line if levels[k] == row else column
        label = f"{low + row / (HEIGHT - 1) * span:+.1f}" if row in (0, HEIGHT - 1) else ""
        lines.append(_labelled(f"{label:>9}", f" {cells}"))
    return [*lines, _labelled("", f" {_ruler(len(z), first=1)}")]


def _heat(found: Proposals, signs: _Signs) -> list[str]:
    """Every proposal's confidence, a row each."""
    count = len(found.z)
    shown = min(count, MAX_ROWS)
    scale = np.quantile(found.confidence, 0.95) or 1.0
    lines = [
        f"confidence by proposal ({signs.bars[1]} none … {signs.bars[-1]} {scale:.2g} and more, "
        f"{signs.skipped} left out)"
    ]
    for row in (round(k * (count - 1) / max(shown - 1, 1)) for k in range(shown)):
        cells = "".join(
            signs.skipped if out else signs.bar(value / scale)
            for value, out in zip(found.confidence[row], found.selected[row], strict=True)
        )
        lines.append(_labelled(f"{row + 1:>9}", f" {cells}"))
    return [*lines, _labelled("", f" {_ruler(found.z.shape[1], first=1)}")]


def _alone(alone: Values, signs: _Signs) -> list[str]:
    known = alone[np.isfinite(alone)]
    if not len(known):
        return []
    low, high = float(known.min()), float(known.max())
    lines = [
        "agreement with a sub-layer alone left out "
        f"({signs.bars[1]} {low:.0%} … {signs.bars[-1]} {high:.0%})"
    ]
    for name, row in zip(("attention", "MLP"), alone, strict=True):
        scaled = (row - low) / max(high - low, 1e-9)
        lines.append(_labelled(name, "".join(signs.bar(value) for value in scaled)))
    return [*lines, _labelled("", _ruler(alone.shape[1]))]


def _search(curves: Sequence[Curve], signs: _Signs) -> list[str]:
    """A row for each figure, a column for each set."""
    count = max(len(curve.values) for curve in curves)
    lines = [f"the search, {count} set{'s' if count > 1 else ''} from left to right"]
    for curve in curves:
        low, high = float(curve.known.min()), float(curve.known.max())
        parts = np.array_split(curve.values, min(len(curve.values), MAX_COLUMNS))
        values = np.array([np.fmax.reduce(part) for part in parts])
        # one value all along is drawn in full height
        scaled = (values - low) / (high - low) if high > low else values - low + 1
        bars = "".join(signs.bar(value) for value in scaled)
        ends = dict.fromkeys(f"{v:.2f}×" if curve.times else f"{v:.0%}" for v in (low, high))
        lines.append(f"{curve.name:<18} {bars}  {signs.dash.join(ends)}")
    return lines
