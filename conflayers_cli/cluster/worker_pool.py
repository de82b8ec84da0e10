"""Worker processes on a Ray cluster: each opens its own model, and shares of work go to all.

Workers are Ray actors; `ActorPool` gives each the next share when it is done with one. An actor
that dies is started again, on another node if need be, and repeats its share (``max_restarts``,
``max_task_retries``). Ray is an extra: it is imported once it is needed.
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
    WorkerResources,
    allocate_workers,
    connected,
    last_line,
    node_sizes,
    warn_if_busy,
)
from conflayers_cli.errors import ConfLayersError, InputError

logger = logging.getLogger(__name__)

RETRIES = 3
"""How many times a share is begun again when its worker dies."""
POLL_S = 1.0
"""How often late workers and lost nodes are looked for."""


@dataclass(frozen=True)
class WorkerInfo:
    """Where a worker runs: workers that are equal but for the host give the same text."""

    host: str
    device: str
    dtype: str
    torch: str

    def __str__(self) -> str:
        return f"{self.host}: {self.device}, {self.dtype}, torch {self.torch}"


class Worker(Protocol):
    """A model that does shares of work. ``notes`` are for the user."""

    @property
    def info(self) -> WorkerInfo: ...

    @property
    def notes(self) -> Sequence[str]: ...

    def __call__(self, share: Any) -> Any: ...


WorkerFactory = Callable[[str | None], Worker]
"""Makes a worker in its own process, in a given dtype or, for None, in the one it chooses."""


@dataclass(frozen=True)
class _Failure:
    """An error that would also end a restarted worker, and the host it happened on."""

    error: ConfLayersError
    host: str


@dataclass(frozen=True)
class _ShareResult:
    """A share's result, and whether its worker was restarted after another's death."""

    info: WorkerInfo
    notes: tuple[str, ...]
    value: Any
    restarted: bool


class _Actor:
    """Opens its worker when the first share comes, in the driver's ``folder``."""

    def __init__(self, folder: str) -> None:
        self._worker: Worker | None = None
        self._opened_in: str | None = None
        with suppress(OSError):  # another machine may lack it
            os.chdir(folder)

    def run(
        self, factory: Sequence[Any], shares: Sequence[Any], dtype: str | None
    ) -> _ShareResult | _Failure:
        """Do some shares in a dtype, or in any for None; without shares only open the worker."""
        import ray

        try:
            worker = self._open(factory, dtype)
            value = [worker(share) for share in shares]
        except ConfLayersError as error:  # some subclasses can't be pickled
            kind = InputError if isinstance(error, InputError) else ConfLayersError
            return _Failure(kind(str(error), names=error.names), socket.gethostname())
        restarted = bool(ray.get_runtime_context().was_current_actor_reconstructed)
        return _ShareResult(worker.info, tuple(worker.notes), value, restarted)

    def _open(self, factory: Sequence[Any], dtype: str | None) -> Worker:
        import ray

        worker = self._worker
        if worker is None or dtype not in (None, self._opened_in, worker.info.dtype):
            make: WorkerFactory = ray.get(factory[0])
            worker = self._worker = None  # two models might not fit
            worker = self._worker = make(dtype)
            self._opened_in = dtype
        return worker


class WorkerPool:
    """Workers on a cluster, each with its own model; see :func:`open_worker_pool`.

    Args:
        factory: the `WorkerFactory`'s Ray reference, in a list, so that it is not sent with each
            share.
        actors: Ray's handles.
        several_nodes: whether an error has to name its host.

    Attributes:
        workers: those that are ready so far.
    """

    def __init__(
        self,
        resources: WorkerResources,
        factory: Sequence[Any],
        actors: Sequence[Any],
        several_nodes: bool,
    ) -> None:
        self.resources = resources
        self.workers: list[WorkerInfo] = []
        self._factory = factory
        self._opening = {actor.run.remote(factory, [], None): actor for actor in actors}
        self._ready: list[Any] = []
        self._warned: set[str] = set()
        self._several_nodes = several_nodes

    def results(self, shares: Iterable[Any]) -> Iterator[Any]:
        """Each share's result as soon as it is done, in any order.

        Shares are begun in their order. Late workers join when they are ready.

        Raises:
            InputError: a worker refused its model or a share.
            ConfLayersError: a worker failed otherwise, or a share's worker died over and over.
        """
        from ray.util import ActorPool

        pool = ActorPool(self._ready)
        for share in shares:
            pool.submit(self._begin, share)
        if not self._ready:
            self._join(pool, None)
        with _ray_errors():
            while pool.has_next():
                try:
                    outcome = pool.get_next_unordered(timeout=POLL_S)
                except TimeoutError:
                    self._warn_of_lost_nodes()
                else:
                    (value,) = self._checked(outcome).value
                    yield value
                self._join(pool, 0)

    def _begin(self, actor: Any, share: Any) -> Any:
        # in the first worker's dtype: machines might choose different ones
        dtype = self.workers[0].dtype if self.workers else None
        return actor.run.remote(self._factory, [share], dtype)

    def _join(self, pool: Any, timeout: float | None) -> None:
        """Add the workers that have become ready; waits ``timeout`` seconds for the first one."""
        import ray

        with _ray_errors():
            while self._opening:
                ready, _ = ray.wait(list(self._opening), num_returns=1, timeout=timeout)
                if not ready:
                    return
                actor = self._opening.pop(ready[0])
                self.workers.append(self._checked(ray.get(ready[0])).info)
                self._ready.append(actor)
                pool.push(actor)
                timeout = 0

    def _checked(self, outcome: _ShareResult | _Failure) -> _ShareResult:
        if isinstance(outcome, _Failure):
            where = f"on {outcome.host}: " if self._several_nodes else ""
            error = outcome.error
            raise type(error)(f"{where}{error}", names=error.names)
        self._compare(outcome.info)
        for note in outcome.notes:
            self._warn_once(note)
        if outcome.restarted:
            self._warn_once("note: a worker died; what it was at was done again")
        return outcome

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)

    def _compare(self, info: WorkerInfo) -> None:
        first = self.workers[0] if self.workers else info
        # one in another dtype opens its model anew for its first share
        if replace(info, host=first.host, dtype=first.dtype) != first:
            self._warn_once(
                f"note: workers differ ({first}; {info}): where two tokens are as good as equal, "
                "texts may depend on which one decodes them"
            )

    def _warn_of_lost_nodes(self) -> None:
        import ray

        count = self.resources.workers
        try:
            allocate_workers(node_sizes(ray.nodes()), count, bool(self.resources.gpus))
        except InputError:
            self._warn_once(
                f"note: the cluster has lost a machine and has no room for {count} workers any "
                "more: what the missing ones were at waits until there is"
            )


@contextmanager
def open_worker_pool(cluster: Cluster, factory: WorkerFactory) -> Iterator[WorkerPool]:
    """Within: workers on the cluster, which end with the block.

    ``factory`` is sent to every worker by value (cloudpickle). Raises InputError where the cluster
    can't be reached or is too small.
    """
    with connected(cluster.address):
        import ray

        nodes = [node for node in ray.nodes() if node["Alive"]]
        resources = allocate_workers(node_sizes(nodes), cluster.workers, cluster.gpus)
        warn_if_busy(resources)
        actor = ray.remote(max_restarts=-1, max_task_retries=RETRIES)(_Actor)
        kind = actor.options(num_cpus=resources.cpus, num_gpus=resources.gpus)
        stored = [ray.put(factory)]
        actors = [kind.remote(str(Path.cwd())) for _ in range(resources.workers)]
        try:
            yield WorkerPool(resources, stored, actors, len(nodes) > 1)
        finally:
            for each in actors:
                ray.kill(each)


@contextmanager
def _ray_errors() -> Iterator[None]:
    """Within: Ray's errors become ConfLayersErrors of one line."""
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
