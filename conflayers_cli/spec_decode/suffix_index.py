"""Where the end of a text occurred before, and what followed: an index of constant size a token.

A table for each size of context leads from the context's hash to its latest position, and each
position leads to the one before, as in compressors of the LZ77 kind. What a hash leads to is
compared token by token, so a collision costs time and nothing else. A suffix automaton finds the
same, and more occurrences of short contexts, for some ten times the memory in Python;
`benchmarks/drafter_study.py` measures that nothing is won by those.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

SIZES = (8, 4, 2, 1)
"""Tokens of the contexts indexed, falling, each half of the one before. The longest match is
searched among the positions of the first size that has any."""
MAX_POSITIONS = 8
"""Positions looked at for a context, the latest ones."""
MAX_STEPS = 4 * MAX_POSITIONS
"""Positions followed from a hash, those of other contexts among them."""
MAX_MATCH_LENGTH = 32
"""Tokens compared: a longer match is no better."""
BORDER = -1
"""Between two texts: no token."""
MIN_CAPACITY = 256
BULK = 64
"""Tokens from which on an update is computed by numpy."""
FACTOR = 0x9E3779B1
"""Odd; of the polynomial that hashes a context, modulo 2^32."""
MASK = 0xFFFFFFFF
POWERS = tuple(pow(FACTOR, power, 1 << 32) for power in range(SIZES[0]))
MAX_SIZE = 2**31 - 2**24
"""Positions that fit, with those of one more update."""


class SuffixIndex:
    """Texts behind one another, and where their contexts occur.

    Args:
        capacity: the most tokens held, a power of two: later ones take the place of the earliest.
            None: all are held.

    Attributes:
        size: tokens seen, those among them that are held no longer.

    Raises:
        ValueError: the capacity is no power of two.
    """

    def __init__(self, capacity: int | None = None) -> None:
        if capacity is not None and (capacity < MIN_CAPACITY or capacity & (capacity - 1)):
            raise ValueError(f"a power of two of at least {MIN_CAPACITY} is needed, not {capacity}")
        self._limit = capacity
        self.size = 0
        self._allocate(MIN_CAPACITY)

    def _allocate(self, capacity: int) -> None:
        self._capacity = capacity
        self._tokens = _zeros(capacity)
        # Positions count from 1 in these: 0 is none.
        self._latest = [_zeros(capacity) for _ in SIZES]
        self._before = [_zeros(capacity) for _ in SIZES]
        self._shift = 33 - capacity.bit_length()
        self.size = 0

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        arrays = (self._tokens, *self._latest, *self._before)
        return sum(each.itemsize * len(each) for each in arrays)

    @property
    def first(self) -> int:
        """The earliest position held."""
        return max(self.size - self._capacity, 0)

    def tokens(self) -> npt.NDArray[np.int32]:
        """All that is held, in order, int32 ``[size - first]``."""
        positions = np.arange(self.first, self.size) & (self._capacity - 1)
        held: npt.NDArray[np.int32] = np.frombuffer(self._tokens, np.int32)[positions]
        return held

    def extend(self, tokens: Sequence[int] | npt.NDArray[np.int32]) -> None:
        """Append tokens (int32), which may be `BORDER`, and index the contexts that they end."""
        wanted = self.size + len(tokens)
        if (wanted > self._capacity and self._capacity != self._limit) or wanted > MAX_SIZE:
            self._renew(len(tokens))
        if len(tokens) < BULK:
            for token in tokens:
                self._append(int(token))
            return
        given = np.asarray(tokens, np.int32)
        for begin in range(0, len(given), self._capacity // 2):
            self._append_all(given[begin : begin + self._capacity // 2])

    def _renew(self, more: int) -> None:
        """Positions from 0 again, in tables that have room for more, as far as allowed."""
        held = self.tokens()
        capacity = self._capacity
        while capacity < len(held) + more and capacity != self._limit:
            capacity *= 2
        self._allocate(capacity)
        for begin in range(0, len(held), capacity // 2):
            self._append_all(held[begin : begin + capacity // 2])

    def _append(self, token: int) -> None:
        size, mask, tokens = self.size, self._capacity - 1, self._tokens
        at = size & mask
        tokens[at] = token
        count = min(size + 1, SIZES[0], self._capacity)
        recent = [tokens[(size - i) & mask] for i in range(count)]
        shift = self._shift
        for number, hashed in enumerate(hashes(recent), 1):
            latest, slot = self._latest[-number], hashed >> shift
            self._before[-number][at] = latest[slot]
            latest[slot] = size + 1
        self.size = size + 1

    def _append_all(self, tokens: npt.NDArray[np.int32]) -> None:
        """The same for up to half the capacity at once."""
        mask, known = self._capacity - 1, min(self.size, SIZES[0] - 1)
        held = np.frombuffer(self._tokens, np.int32)
        earlier = held[np.arange(self.size - known, self.size) & mask]
        positions = np.arange(self.size, self.size + len(tokens))
        held[positions & mask] = tokens
        whole = np.concatenate([earlier, tokens]).astype(np.uint32) + np.uint32(1)
        for number in range(len(SIZES) - 1, -1, -1):
            size = SIZES[number]
            if size > 1:
                half = size // 2
                whole[half:] += whole[:-half] * np.uint32(POWERS[half])
            mixed = (whole * np.uint32(FACTOR)) >> np.uint32(self._shift)
            begin = max(size - 1 - self.size, 0)  # contexts that would begin before the first token
            self._link(number, mixed[known + begin :], positions[begin:])
        self.size += len(tokens)

    def _link(
        self, number: int, slots: npt.NDArray[np.uint32], positions: npt.NDArray[np.int64]
    ) -> None:
        """Put positions, ascending, at the heads of the chains of their contexts."""
        latest, before = (
            np.frombuffer(each[number], np.int32) for each in (self._latest, self._before)
        )
        order = np.argsort(slots, kind="stable")
        slots, positions = slots[order], positions[order]
        previous = np.empty(len(slots), np.int32)
        previous[1:] = positions[:-1] + 1
        opens = np.ones(len(slots), bool)
        opens[1:] = slots[1:] != slots[:-1]
        previous[opens] = latest[slots[opens]]
        before[positions & (self._capacity - 1)] = previous
        closes = np.roll(opens, -1)
        latest[slots[closes]] = positions[closes] + 1

    def find(self, tail: Sequence[int]) -> tuple[int, list[int]]:
        """(tokens that agree, the positions where so many do, the latest first); (0, []): nowhere.

        ``tail``: what is looked for the end of, at most `MAX_MATCH_LENGTH` tokens of it.
        """
        back = tail[: -MAX_MATCH_LENGTH - 1 : -1]
        known = hashes(back[: SIZES[0]])
        tokens, mask, first, shift = self._tokens, self._capacity - 1, self.first, self._shift
        for number in range(len(SIZES) - len(known), len(SIZES)):
            size, before = SIZES[number], self._before[number]
            at = self._latest[number][known[len(SIZES) - 1 - number] >> shift] - 1
            longest, best, seen, steps = 0, list[int](), 0, MAX_STEPS
            while at >= first and seen < MAX_POSITIONS and steps:
                bound, length = min(len(back), at + 1 - first), 0
                while length < bound and tokens[(at - length) & mask] == back[length]:
                    length += 1
                if length >= size:
                    seen += 1
                    if length > longest:
                        longest, best = length, [at]
                    elif length == longest:
                        best.append(at)
                at = before[at & mask] - 1
                steps -= 1
            if best:
                return longest, best
        return 0, []

    def agree_behind(self, at: int, tokens: npt.NDArray[np.int32]) -> int:
        """How many tokens behind a position are the first of ``tokens``, int32 ``[T]``."""
        count = min(len(tokens), self.size - 1 - at)
        positions = np.arange(at + 1, at + 1 + count) & (self._capacity - 1)
        differing = np.flatnonzero(
            np.frombuffer(self._tokens, np.int32)[positions] != tokens[:count]
        )
        return int(differing[0]) if len(differing) else count

    def behind(self, at: int, count: int) -> list[int]:
        """Up to ``count`` tokens behind a position, to the end of its text."""
        mask, end = self._capacity - 1, min(at + 1 + count, self.size)
        found = [self._tokens[i & mask] for i in range(at + 1, end)]
        return found[: found.index(BORDER)] if BORDER in found else found


def hashes(recent: Sequence[int]) -> list[int]:
    """32-bit hashes of the contexts that end with the first of ``recent`` tokens, the latest first;
    by size, rising, as far as there are tokens."""
    found, total = [], 0
    for size, token in enumerate(recent, 1):
        total += (token + 1) * POWERS[size - 1]
        if size in SIZES:
            found.append((total * FACTOR) & MASK)
    return found


def _zeros(count: int) -> array[int]:
    return array("i", bytes(4 * count))
