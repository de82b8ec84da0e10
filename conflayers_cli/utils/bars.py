"""Bars of Unicode's block characters."""

from __future__ import annotations

from collections.abc import Iterable

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_HEIGHTS = "▁▂▃▄▅▆▇█"


def horizontal_bar(share: float, width: int) -> str:
    """A bar of ``share``, from 0 to 1, of ``width`` characters, to an eighth of one."""
    eighths = round(min(1.0, max(0.0, share)) * width * 8)
    full, rest = divmod(eighths, 8)
    return "█" * full + (_EIGHTHS[rest] if rest else "")


def vertical_bars(shares: Iterable[float | None]) -> str:
    """An upright bar for each share from 0 to 1; a blank for None."""
    return "".join(
        " " if share is None else _HEIGHTS[min(7, int(min(1.0, max(0.0, share)) * 8))]
        for share in shares
    )
