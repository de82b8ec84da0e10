"""uvicorn's server, with an end to everything: clients that stall, and requests that outlast
the time they get after SIGTERM."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Callable
from time import monotonic
from typing import Any

import uvicorn

from conflayers_cli.server.options import ServerOptions

MAX_INTERVAL = 1.0
"""Seconds between two looks at the connections."""
FAREWELL = 2.0
"""Seconds in which clients can read how their requests have ended, once the server is."""


class BoundedServer(uvicorn.Server):
    """uvicorn's server; a client may keep it waiting for ``read_timeout`` seconds.

    That long at most a request's head may take, nothing may be asked, or what was sent may lie
    unread; and that long behind the request's deadline the answer must have been taken.

    Args:
        config: uvicorn's.
        options: the limits.
        end_requests: ends what runs, so that every client is told; it may take a while.
    """

    def __init__(
        self, config: uvicorn.Config, options: ServerOptions, end_requests: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._options, self._end_requests = options, end_requests
        self._watching: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._watching = asyncio.create_task(self._watch())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._end_after_drain())
        try:
            await super().shutdown(sockets)
        finally:
            for task in (ending, self._watching):
                if task is not None:
                    task.cancel()

    async def _end_after_drain(self) -> None:
        await asyncio.sleep(self._options.drain)
        await asyncio.to_thread(self._end_requests)
        await asyncio.sleep(FAREWELL)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await asyncio.sleep(FAREWELL)
        for task in list(self.server_state.tasks):
            task.cancel()

    async def _watch(self) -> None:
        """Cut connections whose clients keep the server waiting for too long."""
        patience = self._options.read_timeout
        waiting: dict[Any, tuple[Any, float]] = {}  # by connection: its request, since when
        while True:
            await asyncio.sleep(min(patience / 4, MAX_INTERVAL))
            now, before, waiting = monotonic(), waiting, {}
            for connection in list(self.server_state.connections):
                if _waits_for_client(connection):
                    request, since = before.get(connection, (connection.cycle, now))
                    if request is not connection.cycle:
                        since = now
                    waiting[connection] = connection.cycle, since
                    if now - since > patience:
                        connection.transport.abort()
                if now > _deadline(connection) + patience:
                    connection.transport.abort()


def _waits_for_client(connection: Any) -> bool:
    """Whether no request of a connection is being answered, or what is sent is not taken."""
    cycle = connection.cycle
    if connection.transport.get_write_buffer_size():
        return True
    return cycle is None or bool(cycle.response_complete)


def _deadline(connection: Any) -> float:
    """When the request that is being answered must have been, by `time.monotonic`."""
    cycle = connection.cycle
    if cycle is None or cycle.response_complete:
        return math.inf
    return float(cycle.scope["state"].get("deadline", math.inf))
