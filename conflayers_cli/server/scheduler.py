"""Requests → the engine: a bounded queue, and one thread that decodes all texts together.

Only that thread uses the generator. Others submit and cancel; what comes of a text is delivered by
a callback, in the engine's thread. Between two steps the thread ends what was cancelled or is too
old, and begins what waits where there is room: of the owners in turns, so that nobody's many
requests keep out another's. Where there are several owners, each may hold as many places of the
queue as are left free behind it (dynamic thresholds, Choudhury and Hahne 1998): one alone gets half
of all, and who comes new always finds room.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING

from conflayers_cli.engine.argmax import LogitsError
from conflayers_cli.errors import ConfLayersError, InputError
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.generation.response import GenerationResponse
from conflayers_cli.server.errors import ApiError, log_failure

if TYPE_CHECKING:
    from conflayers_cli.generation.generator import TextGenerator

logger = logging.getLogger(__name__)

MAX_RETRY_AFTER = 120
"""Seconds."""
SMOOTHING = 0.2
"""Weight of the latest text in the mean time of a text."""

Event = GenerationResponse | ApiError


@dataclass(eq=False)
class Ticket:
    """A text that is wanted.

    Attributes:
        request: what is decoded.
        deliver: called, in the engine's thread, with every response and with the error that ends
            the text; the last one is an error or has a result.
        deadline: when it must have ended, by `time.monotonic`.
        begun: when it left the queue.
        number: the generator's, once it has begun.
    """

    request: GenerationRequest
    deliver: Callable[[Event], None]
    deadline: float = math.inf
    begun: float = 0.0
    number: int | None = field(default=None, init=False)
    over: bool = field(default=False, init=False)


class Scheduler:
    """The queue and the engine's thread.

    Args:
        generator: decodes up to ``slots`` texts at once.
        slots: texts decoded at once.
        max_waiting: texts that may wait beside them.
        shared: whether there are several owners, who share the places fairly.
        on_step: called after each step with its responses, before these are delivered, in the
            engine's thread.
        flush: called there when a round's events have been delivered.
    """

    def __init__(
        self,
        generator: TextGenerator,
        *,
        slots: int,
        max_waiting: int,
        shared: bool = False,
        on_step: Callable[[Sequence[GenerationResponse]], None] = lambda responses: None,
        flush: Callable[[], None] = lambda: None,
    ) -> None:
        self._generator = generator
        self._slots, self._on_step, self._flush = slots, on_step, flush
        self._shared = shared
        self.capacity = slots + max_waiting
        self._changed = threading.Condition()
        self._waiting: OrderedDict[str, deque[Ticket]] = OrderedDict()  # by owner
        self._running: dict[int, Ticket] = {}
        self._cancelled: list[Ticket] = []
        self._held: Counter[str] = Counter()  # texts that wait, run or are admitted, by owner
        self._stopping = False
        self._text_seconds = 1.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread behind its current step; what is not finished is told so."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether texts are being decoded, or could be."""
        return self._thread.is_alive() and not self._stopping

    @property
    def num_waiting(self) -> int:
        with self._changed:
            return sum(map(len, self._waiting.values()))

    @property
    def num_running(self) -> int:
        return len(self._running)

    @contextmanager
    def admitted(self, count: int, owner: str = "") -> Iterator[None]:
        """Within: there is room for ``count`` texts of an owner, which are being prepared.

        Raises:
            ApiError: the queue or the owner's share of it is full, it can't ever take so many, or
                the server is ending.
        """
        with self._changed:
            if not self.alive:
                raise _ending()
            self._check_room(count, owner)
            self._held[owner] += count
        try:
            yield
        finally:
            self._give_back(owner, count)

    def _check_room(self, count: int, owner: str) -> None:
        if count > self.capacity:
            raise ApiError(
                400, f"n: this server takes {self.capacity} texts at once, waiting ones included",
                param="n",
            )  # fmt: skip
        own, held = self._held[owner], self._held.total()
        left = self.capacity - held - count
        too_many = self._shared and own > 0 and own + count > left
        if left >= 0 and not too_many:
            return
        waiting = held - self.num_running
        told = f"the queue is full: {waiting} texts wait"
        if left >= 0:
            told = f"this key's share of the queue is full: {own} of its texts wait or are decoded"
        raise ApiError(
            429,
            told,
            kind="server_overloaded",
            code="queue_full",
            retry_after=self._retry_after(waiting),
        )

    def _give_back(self, owner: str, count: int) -> None:
        with self._changed:
            self._held[owner] -= count
            if not self._held[owner]:
                del self._held[owner]

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Queue texts that were `admitted`. Raises ApiError where the server is ending."""
        with self._changed:
            if not self.alive:
                raise _ending()
            for ticket in tickets:
                self._waiting.setdefault(ticket.request.owner, deque()).append(ticket)
                self._held[ticket.request.owner] += 1
            self._changed.notify()

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Decode texts no further; no-op for those that have ended."""
        with self._changed:
            self._cancelled += [ticket for ticket in tickets if not ticket.over]
            self._changed.notify()

    def _retry_after(self, waiting: int) -> int:
        seconds = math.ceil(waiting * self._text_seconds / self._slots)
        return min(max(seconds, 1), MAX_RETRY_AFTER)

    # In the engine's thread.

    def _run(self) -> None:
        try:
            self._serve()
        finally:  # whatever happens, nobody waits for ever
            self._stopping = True
            self._end_all()
            self._flush()

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._stopping or self._cancelled):
                    self._changed.wait()
                if self._stopping:
                    return
                cancelled, self._cancelled = self._cancelled, []
            for ticket in cancelled:
                self._drop(ticket)
            self._end_late()
            for ticket in self._next_tickets():
                self._begin(ticket)
            if self._running:
                self._step()
            self._flush()

    def _next_tickets(self) -> list[Ticket]:
        """As many waiting texts as there is room for, of the owners in turns."""
        taken: list[Ticket] = []
        with self._changed:
            while self._waiting and len(self._running) + len(taken) < self._slots:
                owner, tickets = self._waiting.popitem(last=False)
                taken.append(tickets.popleft())
                if tickets:
                    self._waiting[owner] = tickets  # behind the others
        return taken

    def _begin(self, ticket: Ticket) -> None:
        try:
            ticket.number = self._generator.add(ticket.request)
        except InputError as error:
            self._finish(ticket, ApiError(400, str(error), code="invalid_value"))
            return
        except Exception as error:  # noqa: BLE001 - logged, and told to the client
            log_failure(logger, "a text was not begun", error)
            self._finish(ticket, _failure("the engine failed; see the server's log"))
            return
        ticket.begun = monotonic()
        self._running[ticket.number] = ticket

    def _step(self) -> None:
        try:
            responses = self._generator.step()
            self._on_step(responses)
        except LogitsError as error:
            if error.number is None:
                self._fail_all(error)
            elif (failed := self._running.get(error.number)) is not None:
                self._drop(failed, _failure(str(error)))
            return
        except Exception as error:  # noqa: BLE001 - the server outlives it; every client is told
            self._fail_all(error)
            return
        for response in responses:
            ticket = self._running.get(response.number)
            if ticket is None:
                continue
            if response.result is None:
                ticket.deliver(response)
            else:
                del self._running[response.number]
                taken = monotonic() - ticket.begun
                self._text_seconds += SMOOTHING * (taken - self._text_seconds)
                self._finish(ticket, response)

    def _end_late(self) -> None:
        now = monotonic()
        with self._changed:
            waiting = [ticket for tickets in self._waiting.values() for ticket in tickets]
        for ticket in (*self._running.values(), *waiting):
            if ticket.deadline < now:
                self._drop(
                    ticket,
                    ApiError(
                        504,
                        "the request took longer than this server allows",
                        kind="timeout",
                        code="timeout",
                    ),
                )

    def _drop(self, ticket: Ticket, error: ApiError | None = None) -> None:
        """End a text before its end; None: its client is gone."""
        if ticket.over:
            return
        if ticket.number is not None and self._running.pop(ticket.number, None) is not None:
            self._cancel(ticket.number)
        else:
            with self._changed:
                owner = ticket.request.owner
                tickets = self._waiting.get(owner, deque())
                if ticket in tickets:
                    tickets.remove(ticket)
                if not tickets:
                    self._waiting.pop(owner, None)
        self._finish(ticket, error)

    def _cancel(self, number: int) -> None:
        try:
            self._generator.cancel(number)
        except Exception as error:  # noqa: BLE001 - the text has ended for its client all the same
            log_failure(logger, "a text was not ended cleanly", error)

    def _fail_all(self, error: Exception) -> None:
        """What went wrong is no single text's fault that is known: all running ones end."""
        told = "the engine failed; see the server's log"
        if isinstance(error, ConfLayersError):
            told = str(error)
        log_failure(logger, "a step failed", error)
        for ticket in list(self._running.values()):
            self._drop(ticket, _failure(told))

    def _end_all(self) -> None:
        with self._changed:
            left = [ticket for tickets in self._waiting.values() for ticket in tickets]
        for ticket in (*self._running.values(), *left):
            self._drop(ticket, _ending())

    def _finish(self, ticket: Ticket, event: Event | None) -> None:
        ticket.over = True
        self._give_back(ticket.request.owner, 1)
        if event is not None:
            ticket.deliver(event)


def _failure(message: str) -> ApiError:
    return ApiError(500, message, kind="server_error", code="engine_error")


def _ending() -> ApiError:
    return ApiError(
        503, "the server is ending", kind="server_error", code="shutting_down", retry_after=5
    )
