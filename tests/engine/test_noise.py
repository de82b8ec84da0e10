"""The counter-based exponentials: their law, their independence, one definition on all devices."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conflayers_cli.engine.noise import BLOCK, ExponentialNoise, Floats, stream_key

VOCABULARY = 1000
BLOCKS = -(-VOCABULARY // BLOCK)
CPU = torch.device("cpu")
KNOWN_KEY = 9305674593002712439
KNOWN = [
    [0.821246962507265, 0.046022073494367696, 0.23531810819517665],
    [0.276868583243869, 0.6325363581097506, 0.43305204666149616],
]


def exponentials(key: int, positions: Iterable[int], blocks: int = BLOCKS) -> Floats:
    """``[positions, tokens]``."""
    noise = ExponentialNoise(key, blocks * BLOCK)
    rows = [
        noise.log_exponentials(noise.minima(position), np.arange(blocks)).ravel()
        for position in positions
    ]
    found: Floats = np.exp(np.stack(rows))
    return found


def test_they_are_standard_exponentials() -> None:
    found = exponentials(stream_key(1, (1, 2)), range(300))
    assert scipy.stats.kstest(found.ravel(), "expon").pvalue > 1e-3
    # Each token's, each position's, and the members of a block that hold its least.
    for axis in (0, 1):
        means = (found.mean(axis=axis) - 1) * found.shape[axis] ** 0.5
        assert scipy.stats.kstest(means, "norm").pvalue > 1e-3
    least = found.reshape(300, BLOCKS, BLOCK)
    assert scipy.stats.kstest(least.min(-1).ravel() * BLOCK, "expon").pvalue > 1e-3
    counts = np.bincount(least.argmin(-1).ravel(), minlength=BLOCK)
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("what", ["positions", "tokens", "seeds", "prompts", "answers"])
def test_neighbours_have_nothing_in_common(what: str) -> None:
    """Serial test: pairs of neighbours fill the square evenly."""
    key = stream_key(7, (3, 1))
    first = exponentials(key, range(200))
    if what == "positions":
        first, second = first[:-1], first[1:]
    elif what == "tokens":
        first, second = first[:, :-1], first[:, 1:]
    else:
        others = {"seeds": (8, (3, 1)), "prompts": (7, (3, 2)), "answers": (7, (3, 1), 1)}
        second = exponentials(stream_key(*others[what]), range(200))  # type: ignore[arg-type]
    cells = [np.minimum((np.exp(-each) * 16).astype(int), 15).ravel() for each in (first, second)]
    counts = np.bincount(cells[0] * 16 + cells[1], minlength=256)
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_the_serial_test_finds_noise_used_twice() -> None:
    found = exponentials(3, range(200))
    found[1::2] = found[::2]
    cells = np.minimum((np.exp(-found) * 16).astype(int), 15)
    counts = np.bincount((cells[:-1] * 16 + cells[1:]).ravel(), minlength=256)
    assert scipy.stats.chisquare(counts).pvalue < 1e-8


@settings(max_examples=30)
@given(
    key=st.integers(0, 2**64 - 1),
    positions=st.lists(st.integers(0, 10**6), min_size=1, max_size=8),
)
def test_only_key_position_and_token_count(key: int, positions: list[int]) -> None:
    """Not what was asked for before, nor how large the vocabulary is."""
    together = exponentials(key, positions)
    for row, position in zip(together, positions, strict=True):
        assert np.array_equal(exponentials(key, [position], BLOCKS + 3)[0, : row.size], row)


@settings(max_examples=30)
@given(
    key=st.integers(0, 2**64 - 1),
    positions=st.lists(st.integers(0, 10**6), min_size=1, max_size=4),
)
def test_tensors_are_the_same_numbers(key: int, positions: list[int]) -> None:
    dense = ExponentialNoise(key, VOCABULARY).dense(positions, CPU)
    np.testing.assert_allclose(np.exp(dense.numpy()), exponentials(key, positions), rtol=1e-13)


def test_known_numbers() -> None:
    """They are part of what a seed means: a change of them changes every text."""
    assert stream_key(0, (1, 2, 3)) == KNOWN_KEY
    np.testing.assert_allclose(exponentials(KNOWN_KEY, [0, 5])[:, :3], KNOWN, rtol=1e-12)
