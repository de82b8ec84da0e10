"""Work spread over the machines of a Ray cluster: a model in each worker, shares of work to all.

Ray does the distributing: its actors are the workers, its `ActorPool` gives each the next share
when it is done with one, and an actor that dies is started again elsewhere if need be, with the
share it was at (``max_restarts``, ``max_task_retries``). Here is what is asked of Ray, and how a
failure there becomes one line here. Ray is an extra: it is imported once it is needed.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from conflayers_cli.cluster.ray_cluster import (
    Cluster,
    Room,
    connected,
    last_line,
    room_for,
    sizes_of,
    warn_if_busy,
)
from conflayers_cli.errors import ConfLayersError, InputError

logger = logging.getLogger(__name__)

RETRIES = 3
"""A share is begun so many times again when its worker dies: after that it is what kills it."""
POLLED_S = 1.0
"""Every so often workers that were late are looked for, and nodes that are gone."""


@dataclass(frozen=True)
class Place:
    """What a worker runs on: what is the same gives the same text.

    Attributes:
        host: the machine's name.
        device: its processor or GPU, by its maker's name.
        dtype: the model's, such as ``bfloat16``.
        torch: PyTorch's version.
    """

    host: str
    device: str
    dtype: str
    torch: str

    def is_like(self, other: Place) -> bool:
        """Whether both come to the same."""
        return replace(self, host=other.host) == other

    def __str__(self) -> str:
        return f"{self.host}: {self.device}, {self.dtype}, torch {self.torch}"


class Worker(Protocol):
    """A model that does shares of work. ``notes`` are for the user."""

    @property
    def place(self) -> Place: ...

    @property
    def notes(self) -> Sequence[str]: ...

    def __call__(self, share: Any) -> Any: ...


Opening = Callable[[str | None], Worker]
"""Makes a worker where it is to work, in the dtype that is given, if one is."""


@dataclass(frozen=True)
class _Failure:
    """What a worker can't do, and which error says so; a restarted one could not do it either."""

    told: str
    names: tuple[str, ...]
    of_input: bool
    host: str


@dataclass(frozen=True)
class _Outcome:
    """What a share came to, and whether its worker was started again after another's death."""

    place: Place
    notes: tuple[str, ...]
    value: Any
    revived: bool


class _Hand:
    """The actor: opens its worker when the first share comes, after a restart as well.

    Args:
        folder: the command's own: a relative path means the same here.
    """

    def __init__(self, folder: str) -> None:
        self._worker: Worker | None = None
        self._opened_in: str | None = None
        with suppress(OSError):  # another machine may lack it
            os.chdir(folder)

    def do(
        self, opening: Sequence[Any], shares: Sequence[Any], dtype: str | None
    ) -> _Outcome | _Failure:
        """Do some of the work, none of it to be made ready only.

        Args:
            opening: where Ray keeps what makes the worker.
            shares: of the work.
            dtype: the one to do it in; None: whichever.
        """
        import ray

        try:
            worker = self._at_hand(opening, dtype)
            value = [worker(share) for share in shares]
        except ConfLayersError as error:
            of_input = isinstance(error, InputError)
            return _Failure(str(error), error.names, of_input, socket.gethostname())
        revived = bool(ray.get_runtime_context().was_current_actor_reconstructed)
        return _Outcome(worker.place, tuple(worker.notes), value, revived)

    def _at_hand(self, opening: Sequence[Any], dtype: str | None) -> Worker:
        import ray

        worker = self._worker
        if worker is None or dtype not in (None, self._opened_in, worker.place.dtype):
            make: Opening = ray.get(opening[0])
            worker = self._worker = None  # two models might not fit
            worker = self._worker = make(dtype)
            self._opened_in = dtype
        return worker


class Crew:
    """Workers on a cluster, each with its own model; use :func:`crew_of`.

    Args:
        room: what they get.
        opening: where Ray keeps what makes a worker, in a list: so it is not sent with each share.
        hands: the actors.
        several_nodes: whether a failure has to say where it was.

    Attributes:
        places: what those that have come so far run on.
    """

    def __init__(
        self,
        room: Room,
        opening: Sequence[Any],
        hands: Sequence[Any],
        several_nodes: bool,
    ) -> None:
        self.room = room
        self.places: list[Place] = []
        self._opening = opening
        self._coming = {hand.do.remote(opening, [], None): hand for hand in hands}
        self._here: list[Any] = []
        self._warned: set[str] = set()
        self._several_nodes = several_nodes

    def results(self, shares: Iterable[Any]) -> Iterator[Any]:
        """What each share came to, as soon as it is there, in whatever order that is.

        Shares are begun in their order. Workers that are late join in when they come.

        Raises:
            InputError: a worker can't be made ready, or a share be done, for what it was given.
            ConfLayersError: the same for other reasons, or a share's worker died over and over.
        """
        from ray.util import ActorPool

        pool = ActorPool(self._here)
        for share in shares:
            pool.submit(self._begin, share)
        if not self._here:
            self._join(pool, None)
        with _failures_told():
            while pool.has_next():
                try:
                    outcome = pool.get_next_unordered(timeout=POLLED_S)
                except TimeoutError:
                    self._warn_of_lost()
                else:
                    (value,) = self._checked(outcome).value
                    yield value
                self._join(pool, 0)

    def _begin(self, actor: Any, share: Any) -> Any:
        return actor.do.remote(self._opening, [share], self._dtype)

    @property
    def _dtype(self) -> str | None:
        """The first worker's: where each is to find out by itself, they might not agree."""
        return self.places[0].dtype if self.places else None

    def _join(self, pool: Any, timeout: float | None) -> None:
        """Have those take part that have become ready; within the timeout the first one does."""
        import ray

        with _failures_told():
            while self._coming:
                ready, _ = ray.wait(list(self._coming), num_returns=1, timeout=timeout)
                if not ready:
                    return
                actor = self._coming.pop(ready[0])
                place = self._checked(ray.get(ready[0])).place
                self.places.append(place)
                self._here.append(actor)
                pool.push(actor)
                timeout = 0

    def _checked(self, outcome: _Outcome | _Failure) -> _Outcome:
        if isinstance(outcome, _Failure):
            where = f"on {outcome.host}: " if self._several_nodes else ""
            kind = InputError if outcome.of_input else ConfLayersError
            raise kind(f"{where}{outcome.told}", names=outcome.names)
        self._compare(outcome.place)
        for note in outcome.notes:
            self._warn_once(note)
        if outcome.revived:
            self._warn_once("note: a worker died; what it was at was done again")
        return outcome

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)

    def _compare(self, place: Place) -> None:
        first = self.places[0] if self.places else place
        # Found in another dtype, it is going to open its model anew for its first share.
        if not replace(place, dtype=first.dtype).is_like(first):
            self._warn_once(
                f"note: workers differ ({first}; {place}): where two tokens are as good as equal, "
                "texts may depend on which one decodes them"
            )

    def _warn_of_lost(self) -> None:
        import ray

        try:
            room_for(sizes_of(ray.nodes()), self.room.workers, bool(self.room.gpus))
        except InputError:
            self._warn_once(
                f"note: the cluster has lost a machine and has no room for {self.room.workers} "
                "workers any more: what the missing ones were at waits until there is"
            )


@contextmanager
def crew_of(cluster: Cluster, opening: Opening) -> Iterator[Crew]:
    """Within: workers on the cluster, each opened by ``opening``; behind it they are gone.

    Args:
        cluster: where.
        opening: is sent to every worker by value (cloudpickle).

    Raises:
        InputError: the cluster can't be reached, or has no room for the workers.
    """
    with connected(cluster.address):
        import ray

        nodes = [node for node in ray.nodes() if node["Alive"]]
        room = room_for(sizes_of(nodes), cluster.workers, cluster.gpus)
        warn_if_busy(room)
        actor = ray.remote(max_restarts=-1, max_task_retries=RETRIES)(_Hand)
        kind = actor.options(num_cpus=room.cpus, num_gpus=room.gpus)
        kept = [ray.put(opening)]
        hands = [kind.remote(str(Path.cwd())) for _ in range(room.workers)]
        try:
            yield Crew(room, kept, hands, len(nodes) > 1)
        finally:
            for hand in hands:
                ray.kill(hand)


@contextmanager
def _failures_told() -> Iterator[None]:
    """Within: what Ray raises becomes one line."""
    from ray.exceptions import RayActorError, RayError

    try:
        yield
    except RayActorError as error:
        raise ConfLayersError(
            f"a worker could not be started, or died {RETRIES + 1} times over the same work: "
            f"{last_line(error)}"
        ) from error
    except RayError as error:
        raise ConfLayersError(f"a worker failed: {last_line(error)}") from error
