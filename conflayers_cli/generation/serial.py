"""Requests decoded one after the other, each by a loop of its own; the interface is a batch's."""

from __future__ import annotations

from collections import deque
from typing import Protocol

from conflayers_cli.engine.argmax import LogitsError
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.generation.sequence import Sequence, Step, check_request
from conflayers_cli.spec_decode.proposer import Proposer


class Begin(Protocol):
    """Begins to decode a request: `Generation` on a decoder, `PrefixCache.begin`, or another."""

    def __call__(
        self,
        request: GenerationRequest,
        /,
        *,
        drafter: Proposer | None,
        end_tokens: frozenset[int],
    ) -> Generation: ...


class SerialQueue:
    """A queue of requests; one at a time is decoded, with all that drafters of one text can do.

    Args:
        decoder: the model.
        begin: begins to decode a request.
        drafter: drafts for them; None decodes vanilla.
        end_tokens: ids that end an output.

    Attributes:
        added: how many requests there were.
        cache_bytes: memory of keys and values of the request decoded last.

    Raises:
        InputError, LogitsError: as `Batch`.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        begin: Begin,
        drafter: Proposer | None,
        end_tokens: frozenset[int],
    ) -> None:
        self._decoder = decoder
        self._begin = begin
        self._drafter = drafter
        self._end_tokens = end_tokens
        self._waiting: deque[tuple[int, GenerationRequest]] = deque()
        self._running: tuple[int, Generation] | None = None
        self._ended: dict[int, Generation] = {}
        self.added = 0
        self.cache_bytes = 0

    def add(self, request: GenerationRequest) -> int:
        """Queue a request; returns its number, counted from 0."""
        check_request(self._decoder, request)
        self._waiting.append((self.added, request))
        self.added += 1
        return self.added - 1

    def cancel(self, number: int) -> None:
        """Decode a request no further. Nothing where it has ended already."""
        self._waiting = deque(each for each in self._waiting if each[0] != number)
        if self._running is not None and self._running[0] == number:
            self._end()

    def pop(self, number: int) -> Sequence | None:
        """What came of a request, which is forgotten here; None: it was never begun."""
        return self._ended.pop(number, None)

    def step(self) -> list[tuple[int, Step]]:
        """What is decided next of the first request that has not ended; nothing if all have."""
        if self._running is None:
            if not self._waiting:
                return []
            number, request = self._waiting.popleft()
            begun = self._begin(request, drafter=self._drafter, end_tokens=self._end_tokens)
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
