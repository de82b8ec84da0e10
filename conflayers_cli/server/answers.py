"""The texts of one request: from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from functools import partial

from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.generation.response import GenerationResponse
from conflayers_cli.server.errors import ApiError
from conflayers_cli.server.metrics import Metrics, TextTimes
from conflayers_cli.server.scheduler import Event, Scheduler, Ticket


class Mailbox:
    """What the engine's thread has for event loops, handed over behind a step: to wake a loop up
    for each text takes the engine several per cent of its time. For that thread alone."""

    def __init__(self) -> None:
        self._posted: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}

    def post(self, loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
        """Have a loop call this, from the next `flush` on."""
        self._posted.setdefault(loop, []).append(call)

    def flush(self) -> None:
        """Hand over what was posted."""
        posted, self._posted = self._posted, {}
        for loop, calls in posted.items():
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(_call_all, calls)


def _call_all(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()


class Answers:
    """Texts being decoded for one client. To be made in the event loop, and submitted at once.

    Args:
        scheduler: decodes them.
        mailbox: what is flushed behind the scheduler's steps.
        requests: one for each text.
        metrics: where times are noted.
        deadline: when they must have ended, by `time.monotonic`.

    Raises:
        ApiError: the server is ending.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        mailbox: Mailbox,
        requests: Sequence[GenerationRequest],
        metrics: Metrics,
        deadline: float,
    ) -> None:
        self._scheduler, self._mailbox = scheduler, mailbox
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
        self._mailbox.post(self._loop, partial(self._events.put_nowait, (index, event)))

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
