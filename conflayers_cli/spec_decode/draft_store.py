"""Earlier texts, in which drafts are looked for: what is in a store changes speed alone."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock

import numpy as np
import numpy.typing as npt

from conflayers_cli.spec_decode.suffix_index import BORDER, MAX_MATCH_LENGTH, SuffixIndex

CAPACITY = 2**20
"""Tokens held by default, for 36 bytes each."""
OWNER_CAPACITY = 2**16
"""Tokens held for each of several owners, for 36 bytes each."""
MAX_OWNERS = 64
"""Owners whose texts are held: 151 MB at most, with the capacity above."""
CONTEXT = MAX_MATCH_LENGTH
"""Tokens compared where parts are looked for that are held already."""


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
        self._lock = Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self._index.nbytes

    def add(self, text: Sequence[int] | npt.NDArray[np.int32]) -> None:
        """Add a text, but for long parts of it that are held already."""
        tokens = self._usable(np.asarray(text, np.int64)[-(self.capacity - 1) :])
        with self._lock:
            for piece in self._new_pieces(tokens):
                self._index.extend(np.append(piece, np.int32(BORDER)))
                self._gained += len(piece) + 1

    def _new_pieces(self, tokens: npt.NDArray[np.int32]) -> list[npt.NDArray[np.int32]]:
        """The parts of a text that are not held, each with `CONTEXT` tokens around it, which are:
        matches at its first token need what is before it."""
        pieces, begin, at, held = [], 0, 0, 0  # of the piece from ``begin``, the first are held
        while at + CONTEXT <= len(tokens):
            end = at + CONTEXT
            length, positions = self._index.find(tokens[at:end].tolist())
            run = max(
                (self._index.agree_behind(each, tokens[end:]) for each in positions), default=0
            )
            if length < CONTEXT or (at > begin and run < CONTEXT):
                at = end
                continue
            if at > begin:
                pieces.append(tokens[begin:end])
            begin, held = end + run - CONTEXT, CONTEXT
            at = begin if run else end
        if begin + held < len(tokens):
            pieces.append(tokens[begin:])
        return pieces

    def clear(self) -> None:
        """Forget all texts."""
        with self._lock:
            self._index = SuffixIndex(self.capacity)
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


class OwnedStores:
    """A store for each owner, in memory, so that nobody drafts from another's texts.

    How fast a text comes tells what it was drafted from; so owners must not share a store. Several
    threads may use it.

    Args:
        vocabulary, capacity: as of `DraftStore`, of each owner's.
        max_owners: whose stores are held, those used last.
    """

    def __init__(
        self, vocabulary: int, capacity: int = OWNER_CAPACITY, max_owners: int = MAX_OWNERS
    ) -> None:
        self._vocabulary, self._capacity, self._max_owners = vocabulary, capacity, max_owners
        self._stores: dict[str, DraftStore] = {}
        self._lock = Lock()

    def get(self, owner: str) -> DraftStore:
        """The owner's store, for the ``store`` of a `GenerationRequest`; empty at first."""
        with self._lock:
            store = self._stores.pop(owner, None)
            if store is None:
                store = DraftStore(self._vocabulary, self._capacity)
            self._stores[owner] = store  # the last one used last
            while len(self._stores) > self._max_owners:
                del self._stores[next(iter(self._stores))]
            return store

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        with self._lock:
            return sum(store.nbytes for store in self._stores.values())
