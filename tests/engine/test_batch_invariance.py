"""The least number of rows is found where there is one; where there is none nothing is promised."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
import torch
from torch import nn

from conflayers_cli.engine.batch_invariance import (
    CANDIDATES,
    NOT_INVARIANT,
    PROBED_WIDTHS,
    BatchInvariance,
    Exactness,
    probe_exactness,
    probe_min_rows,
)
from conflayers_cli.engine.graph_runner import WIDTHS


def device(kernel_of: object) -> object:
    """Logits of a device that rounds by the number of rows a pass runs, and by a row's place."""

    def logits(least: int, place: int, width: int) -> torch.Tensor:
        rows = max(width, least)
        kernel = kernel_of(rows)  # type: ignore[operator]
        exact = torch.arange(place, place + width, dtype=torch.float32)[:, None] * torch.ones(5)
        return exact + 1e-3 * kernel

    return logits


@pytest.mark.parametrize(
    ("kernel_of", "least"),
    [
        (lambda rows: 0, 1),  # one kernel for all
        (lambda rows: int(rows > 1), 2),  # single rows have another, as on a CPU
        (lambda rows: int(rows > 7), 8),
        (lambda rows: 0 if rows < 16 else 1, 16),
    ],
)
def test_it_is_found(kernel_of: object, least: int) -> None:
    assert probe_min_rows(device(kernel_of)) == BatchInvariance(least, bitwise=True)  # type: ignore[arg-type]


def test_there_may_be_none() -> None:
    """Not even passes of one number of rows agree, as where sums are made in any order."""
    runs = itertools.count()
    assert probe_min_rows(device(lambda rows: next(runs))) == NOT_INVARIANT  # type: ignore[arg-type]


def test_one_shape_for_all_is_the_last_resort() -> None:
    rule = probe_min_rows(device(lambda rows: rows))  # type: ignore[arg-type]
    assert rule == BatchInvariance(max(WIDTHS), bitwise=True)
    assert set(WIDTHS) - {1} <= set(PROBED_WIDTHS)


def test_a_rows_place_counts() -> None:
    """Kernels that round by a row's place among the others are no use, whatever their number."""

    def logits(least: int, place: int, width: int) -> torch.Tensor:
        return (
            torch.arange(width, dtype=torch.float32)[:, None].expand(-1, 3) * 0
            + (torch.arange(width)[:, None] % 4) * 1e-3
        )

    assert probe_min_rows(logits) == NOT_INVARIANT


def test_on_a_cpu_it_is_known() -> None:
    assert BatchInvariance.for_cpu(torch.float32) == NOT_INVARIANT
    assert BatchInvariance.for_cpu(torch.bfloat16) == BatchInvariance(2, bitwise=True)
    assert CANDIDATES[0] == 1


class Kernels:
    """Logits of kernels that round otherwise for fewer rows than ``least``, and their clock.

    With ``least`` 0 they round otherwise every time. A pass of one row takes a second, one of more
    rows ``seconds``.
    """

    dtype = torch.bfloat16
    device = torch.device("cpu")

    def __init__(self, least: int, seconds: Iterable[float] = (1.0,)) -> None:
        self._least, self._seconds, self._now = least, itertools.cycle(seconds), 0.0
        self._right = torch.arange(200.0).view(-1, 1)

    def modules(self) -> list[nn.Module]:
        return []

    def logits(self, rows: int, place: int, width: int) -> torch.Tensor:
        count = max(rows, width)
        self._now += 1.0 if count == 1 else next(self._seconds)
        if not self._least:
            return self._right[place : place + width] + 1e-3 * self._now
        return self._right[place : place + width] + (0.0 if count >= self._least else 1e-3)

    def clock(self) -> float:
        return self._now


@pytest.mark.parametrize(
    ("least", "seconds", "rows", "note"),
    [
        (1, 9.0, 1, None),
        (2, 1.0, 2, None),
        (2, 1.2, 2, None),
        (2, 9.0, None, "2 rows a pass, 9.0 times"),
        (8, 1.0, 8, None),
        (8, 2.0, None, "8 rows a pass, 2.0 times"),
        (0, 1.0, None, "round otherwise"),
    ],
)
def test_bits_are_promised_where_they_hold_and_are_not_too_dear(
    least: int, seconds: float, rows: int | None, note: str | None
) -> None:
    kernels = Kernels(least, [seconds])
    found = probe_exactness(kernels, kernels.logits, kernels.clock)
    if rows is not None:
        assert found == Exactness(BatchInvariance(rows, bitwise=True))
        return
    assert found.invariance == NOT_INVARIANT
    assert found.note is not None and note is not None
    assert found.note.startswith("not exact to the bit")
    assert note in found.note


def test_the_price_of_bits_is_told_by_medians() -> None:
    kernels = Kernels(2, [1.0, 1.0, 50.0])
    assert probe_exactness(kernels, kernels.logits, kernels.clock).invariance.min_rows == 2


def test_nothing_is_tried_in_float32() -> None:
    kernels = Kernels(2)
    kernels.dtype = torch.float32
    assert probe_exactness(kernels, kernels.logits, kernels.clock) == Exactness(NOT_INVARIANT)
    assert kernels.clock() == 0.0
