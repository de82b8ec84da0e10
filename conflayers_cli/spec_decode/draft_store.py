"""Earlier texts, in which drafts are looked for: what is in a store changes speed alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from threading import Lock

import numpy as np
import numpy.typing as npt

from conflayers_cli.spec_decode.suffix_index import BORDER, MAX_MATCH_LENGTH, SuffixIndex

CAPACITY = 2**20
"""Tokens held by default, for 36 bytes each."""
RECENT = 16
"""Texts with which a new one is compared: what it begins with as they do is held already."""


class DraftStore:
    """The latest texts, up to a number of tokens. Several threads may use it.

    Args:
        vocabulary: ids that are not below it are never drafted: they end a text like `BORDER`.
        capacity: the most tokens held, a power of two; the earliest go first.

    Raises:
        ValueError: the capacity is no power of two.
    """

    def __init__(self, vocabulary: int, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self._vocabulary = vocabulary
        self._gained = 0
        self._index = SuffixIndex(capacity)
        self._recent: deque[npt.NDArray[np.int32]] = deque(maxlen=RECENT)
        self._lock = Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self._index.nbytes + sum(each.nbytes for each in self._recent)

    def add(self, text: Sequence[int] | npt.NDArray[np.int32]) -> None:
        """Add a text, but for what it begins with as one of the last texts does."""
        tokens = self._usable(np.asarray(text, np.int64)[-(self.capacity - 1) :])
        with self._lock:
            known = max((_common(tokens, each) for each in self._recent), default=0)
            if known == len(tokens):
                return
            self._recent.append(tokens)
            # Matches at the first new token need what is before it.
            gained = tokens[max(known - MAX_MATCH_LENGTH, 0) :]
            self._index.extend(np.append(gained, np.int32(BORDER)))
            self._gained += len(gained) + 1

    def clear(self) -> None:
        """Forget all texts."""
        with self._lock:
            self._index = SuffixIndex(self.capacity)
            self._recent.clear()
            self._gained = 0

    def load(self, tokens: npt.NDArray[np.int32]) -> None:
        """Add texts as `tokens` gives them, which do not count as gained."""
        with self._lock:
            self._index.extend(self._usable(tokens[-self.capacity :]))

    def take_gained(self) -> npt.NDArray[np.int32]:
        """What was added since the last call, in order, as far as it is held."""
        with self._lock:
            held, gained = self._index.tokens(), self._gained
            self._gained = 0
        return held[len(held) - min(gained, len(held)) :]

    def find(self, tail: Sequence[int], count: int) -> tuple[int, list[list[int]]]:
        """(tokens at the end of ``tail`` that agree at most, up to ``count`` ≥ 1 tokens that
        followed wherever so many do, the latest first); (0, []): nothing followed anywhere.
        """
        with self._lock:
            length, positions = self._index.find(tail)
            found = [self._index.behind(at, count) for at in positions]
        found = [tokens for tokens in found if tokens]
        return (length, found) if found else (0, [])

    def _usable(self, tokens: npt.NDArray[np.integer]) -> npt.NDArray[np.int32]:
        known = (tokens >= 0) & (tokens < self._vocabulary)
        return np.where(known, tokens, BORDER).astype(np.int32)

    def tokens(self) -> npt.NDArray[np.int32]:
        """All tokens held, in order, each text with `BORDER` behind it: int32 ``[T]``."""
        with self._lock:
            return self._index.tokens()


def _common(one: npt.NDArray[np.int32], other: npt.NDArray[np.int32]) -> int:
    """How many tokens two texts begin with alike."""
    size = min(len(one), len(other))
    differing = np.flatnonzero(one[:size] != other[:size])
    return int(differing[0]) if len(differing) else size
