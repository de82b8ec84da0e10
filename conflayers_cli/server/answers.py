"""The texts of one request: from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from functools import partial

from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.generation.response import GenerationResponse
from conflayers_cli.server.errors import ApiError
from conflayers_cli.server.metrics import Metrics, TextTimes
from conflayers_cli.server.scheduler import Event, Scheduler, Ticket


class Answers:
    """Texts being decoded for one client. To be made in the event loop, and submitted at once.

    Args:
        scheduler: decodes them.
        requests: one for each text.
        metrics: where times are noted.
        deadline: when they must have ended, by `time.monotonic`.

    Raises:
        ApiError: the server is ending.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        requests: Sequence[GenerationRequest],
        metrics: Metrics,
        deadline: float,
    ) -> None:
        self._scheduler = scheduler
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._left = len(requests)
        self._times = [TextTimes(metrics) for _ in requests]
        self._tickets = [
            Ticket(request, partial(self._deliver, index), deadline)
            for index, request in enumerate(requests)
        ]
        scheduler.submit(self._tickets)

    def _deliver(self, index: int, event: Event) -> None:
        """Called in the engine's thread."""
        if isinstance(event, GenerationResponse):
            self._times[index].note()
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

    async def next(self, seconds: float | None = None) -> tuple[int, GenerationResponse] | None:
        """(text, what came of it), as soon as it comes; None: nothing did within ``seconds``.

        Raises:
            ApiError: a text can't go on; the others are ended.
        """
        try:
            async with asyncio.timeout(seconds):
                index, event = await self._events.get()
        except TimeoutError:
            return None
        if isinstance(event, ApiError):
            self.cancel()
            raise event
        if event.result is not None:
            self._left -= 1
        return index, event

    async def __aiter__(self) -> AsyncIterator[tuple[int, GenerationResponse]]:
        while not self.over:
            if (found := await self.next()) is not None:
                yield found

    @property
    def over(self) -> bool:
        """Whether all texts have come to their ends."""
        return not self._left

    def cancel(self) -> None:
        """End what has not ended: nobody reads it."""
        self._scheduler.cancel(self._tickets)
