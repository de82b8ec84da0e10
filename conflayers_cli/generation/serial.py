"""Requests decoded one after the other; the interface is that of `Batch`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TypeAlias

from conflayers_cli.engine.argmax import LogitsError
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.generation.sequence import Sequence, Step, check_request
from conflayers_cli.spec_decode.proposer import Proposer

BeginGeneration: TypeAlias = Callable[..., Generation]
"""Begins to decode a request: `Generation` on a decoder, `PrefixCache.begin`, or another.

Called with the request and the keywords ``proposer`` and ``end_tokens``.
"""


class SerialQueue:
    """A queue of requests decoded one at a time; arguments and errors as `Batch`.

    ``cache_bytes`` is of the request decoded last.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        begin: BeginGeneration,
        proposer: Proposer | None,
        end_tokens: frozenset[int],
    ) -> None:
        self._decoder = decoder
        self._begin = begin
        self._proposer = proposer
        self._end_tokens = end_tokens
        self._waiting: deque[tuple[int, GenerationRequest]] = deque()
        self._running: tuple[int, Generation] | None = None
        self._ended: dict[int, Generation] = {}
        self.added = 0
        self.cache_bytes = 0

    def add(self, request: GenerationRequest) -> int:
        """Queue a request; returns its number, counted from 0; InputError: it can't be decoded."""
        check_request(self._decoder, request)
        self._waiting.append((self.added, request))
        self.added += 1
        return self.added - 1

    def cancel(self, number: int) -> None:
        """Decode a request no further; no-op where it has ended already."""
        self._waiting = deque(each for each in self._waiting if each[0] != number)
        if self._running is not None and self._running[0] == number:
            self._end()

    def pop(self, number: int) -> Sequence | None:
        """Remove a request and return its sequence; None: it was never begun."""
        return self._ended.pop(number, None)

    def release(self) -> None:
        """No-op: memory is freed with each request."""

    def step(self) -> list[tuple[int, Step]]:
        """One pass for the first request that has not ended."""
        if self._running is None:
            if not self._waiting:
                return []
            number, request = self._waiting.popleft()
            begun = self._begin(request, proposer=self._proposer, end_tokens=self._end_tokens)
            self._running = number, begun
        number, generation = self._running
        try:
            step = generation.step()
        except LogitsError as error:
            error.number = number
            raise
        if generation.finish is not None:
            self._end()
        return [(number, step)]

    def _end(self) -> None:
        if self._running is not None:
            number, generation = self._running
            self.cache_bytes = generation.cache.bytes
            self._ended[number], self._running = generation, None
