"""The least number of rows is found where there is one; where there is none nothing is promised."""

from __future__ import annotations

import itertools

import pytest
import torch

from conflayers_cli.engine.batch_invariance import (
    CANDIDATES,
    NOT_INVARIANT,
    PROBED_WIDTHS,
    BatchInvariance,
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
