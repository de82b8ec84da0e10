"""Tables on terminals that are too narrow for them."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

_UNBOUNDED = 10_000
"""Columns enough for any table."""


def fitting(part: RenderableType, console: Console) -> RenderableType:
    """A table that would have to cut words, as a list of its rows; all else as it is."""
    if not isinstance(part, Table):
        return part
    unbounded = console.options.update(width=_UNBOUNDED)
    if console.measure(part, options=unbounded).minimum <= console.width:
        return part
    return Text("\n").join(Text(line) for line in _rows(part))


def _rows(table: Table) -> Iterator[str]:
    """The first cell of each row, and under it the others with their columns' heads."""
    heads = [_plain(column.header) for column in table.columns]
    cells = [[_plain(cell) for cell in column.cells] for column in table.columns]
    for first, *others in zip(*cells, strict=True):
        yield f"{heads[0]} {first}".strip()
        yield from (f"  {head}: {cell}" for head, cell in zip(heads[1:], others, strict=True))
        yield ""


def _plain(cell: RenderableType) -> str:
    return cell.plain if isinstance(cell, Text) else str(cell)
