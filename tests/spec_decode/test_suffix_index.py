"""The suffix index: token by token or at once, growing or as a ring, it finds what is there."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conflayers_cli.spec_decode import suffix_index
from conflayers_cli.spec_decode.suffix_index import (
    BORDER,
    BULK,
    MAX_MATCH_LENGTH,
    MIN_CAPACITY,
    SuffixIndex,
)

TOKENS = st.lists(st.integers(BORDER, 2), max_size=3 * MIN_CAPACITY)


def filled(
    tokens: list[int], capacity: int | None = None, sizes: tuple[int, ...] = ()
) -> SuffixIndex:
    """Given in pieces of these sizes, then at once."""
    index, begin = SuffixIndex(capacity), 0
    for size in sizes:
        index.extend(tokens[begin : begin + size])
        begin += size
    index.extend(tokens[begin:])
    return index


@given(
    tokens=TOKENS,
    ring=st.booleans(),
    sizes=st.lists(st.sampled_from([1, 7, BULK - 1, BULK, 2 * MIN_CAPACITY]), max_size=8),
    tail=st.lists(st.integers(0, 2), min_size=1, max_size=MAX_MATCH_LENGTH),
)
def test_what_is_found_is_there_however_it_came(
    tokens: list[int], ring: bool, sizes: list[int], tail: list[int]
) -> None:
    capacity = MIN_CAPACITY if ring else None
    index, other = filled(tokens, capacity), filled(tokens, capacity, (1,) * len(tokens))
    pieces = filled(tokens, capacity, tuple(sizes))
    held = tokens[-MIN_CAPACITY:] if ring else tokens
    assert index.tokens().tolist() == other.tokens().tolist() == pieces.tokens().tolist() == held
    length, positions = index.find(tail)
    assert (length, positions) == other.find(tail) == pieces.find(tail)
    assert positions == sorted(positions, reverse=True)
    assert all(at >= index.first for at in positions)
    for at in positions:
        assert tokens[at + 1 - length : at + 1] == tail[-length:]
        followed = list(itertools.takewhile(lambda t: t != BORDER, tokens[at + 1 : at + 6]))
        assert index.behind(at, 5) == followed
    if not positions:  # not even the last token is there
        assert tail[-1] not in held


def test_the_earliest_tokens_go_and_memory_stays() -> None:
    index = SuffixIndex(1024)
    index.extend([7, 8, 9, 7])
    assert index.find([8, 9]) == (2, [2])
    sizes = []
    for start in range(4):
        index.extend(np.arange(100 + 1024 * start, 1124 + 1024 * start, dtype=np.int32))
        sizes.append(index.nbytes)
    assert index.find([8, 9]) == (0, [])
    assert set(sizes) == {36 * 1024}


def test_memory_is_a_constant_a_token() -> None:
    index = filled(list(range(50_000)))
    assert index.nbytes <= 2 * 36 * 50_000


def test_a_long_context_is_found_though_short_ones_came_often_since() -> None:
    index = filled([3, 4, 5, 6, 7, 8, *[6, 0] * 500])
    assert index.find([3, 4, 5, 6]) == (4, [3])


def test_positions_begin_anew_before_they_no_longer_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suffix_index, "MAX_SIZE", 1000)
    index = SuffixIndex(MIN_CAPACITY)
    tokens = [i % 97 for i in range(5000)]
    for begin in range(0, len(tokens), 50):
        index.extend(tokens[begin : begin + 50])
        assert index.size <= 1000
    assert index.tokens().tolist() == tokens[-MIN_CAPACITY:]
    length, positions = index.find(tokens[-5:])
    assert length == 5
    assert all(index.behind(at, 1) in ([(tokens[-1] + 1) % 97], []) for at in positions)


@pytest.mark.parametrize("capacity", [0, 100, MIN_CAPACITY + 1, MIN_CAPACITY // 2])
def test_a_ring_has_a_power_of_two(capacity: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        SuffixIndex(capacity)
