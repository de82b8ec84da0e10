"""Keys and values of earlier texts, for prompts that begin as they do: turns of chats, system
prompts.

A text is found again by its tokens, so whatever a chat template makes of earlier turns is right.
What is kept belongs to an owner and is given to nobody else: how long a prompt takes to read would
tell others what was asked before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.utils.out_of_memory import OutOfMemoryError

MIN_TOKENS = 16
"""Shorter texts are read as quickly as they are looked for."""


@dataclass(frozen=True, eq=False)
class StoredPrefix:
    """A text of an owner, int32 ``[T]``, and its keys and values, one sequence of T slots."""

    owner: str
    tokens: npt.NDArray[np.int32]
    cache: KVCache


class PrefixStore:
    """Texts read before, the least recently used dropped first.

    Args:
        decoder: the model.
        max_bytes: of all keys and values kept.
    """

    def __init__(self, decoder: Decoder, max_bytes: int) -> None:
        self._decoder = decoder
        self._max_bytes = max_bytes
        self._entries: list[StoredPrefix] = []  # the most recently used is the last

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(entry.cache.bytes for entry in self._entries)

    def find(self, owner: str, prompt: tuple[int, ...]) -> tuple[KVCache | None, int]:
        """(the keys and values of the owner's text that shares most with the prompt, how many
        tokens it shares); None and 0 where no text shares `MIN_TOKENS`."""
        wanted = np.array(prompt, np.int32)
        best, length = None, MIN_TOKENS - 1
        for entry in self._entries:
            if entry.owner == owner and (shared := _shared(entry.tokens, wanted)) > length:
                best, length = entry, shared
        if best is None:
            return None, 0
        self._entries.remove(best)
        self._entries.append(best)
        return best.cache, length

    def fill(
        self, cache: KVCache, row: int, request: GenerationRequest, beside: Sequence[list[int]]
    ) -> int:
        """Copy what is known of a prompt to a row of a batch; returns how many tokens that is.

        ``beside``: what the rows before it hold of the same owner.
        """
        stored, length = self.find(request.owner, tuple(request.prompt))
        wanted, source = np.array(request.prompt, np.int32), None
        for other, tokens in enumerate(beside):
            if tokens and (shared := _shared(np.array(tokens, np.int32), wanted)) > length:
                source, length = other, shared
        # The last token is run in any case: it decides the first new one.
        length = min(length, len(request.prompt) - 1)
        if source is not None:
            cache.copy_sequence(source, row, length)
        elif stored is not None:
            cache.view(row, row + 1).copy_from(stored, length)
        return length

    def add(self, owner: str, tokens: list[int], cache: KVCache) -> None:
        """Keep a text, whose keys and values ``cache``, of this sequence alone, holds.

        Texts that it begins with are dropped, as are old ones for want of room; nothing is kept
        where memory is short.
        """
        own = np.array(tokens, np.int32)
        if len(own) < MIN_TOKENS:
            return
        for entry in list(self._entries):
            if entry.owner == owner:
                shared = _shared(entry.tokens, own)
                if shared == len(own):
                    return  # it is there, or a longer one
                if shared == len(entry.tokens):
                    self._entries.remove(entry)
        needed = self._decoder.kv_bytes_per_slot * len(own)
        if needed > self._max_bytes:
            return
        try:
            copy = self._decoder.new_cache(len(own))
        except OutOfMemoryError:
            self._entries.clear()
            return
        copy.copy_from(cache, len(own))
        self._entries.append(StoredPrefix(owner, own, copy))
        while self._entries and self.bytes > self._max_bytes:
            del self._entries[0]


def _shared(one: npt.NDArray[np.int32], other: npt.NDArray[np.int32]) -> int:
    """How many tokens two texts share from the beginning on."""
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    return int(differs.argmax()) if differs.any() else length
