"""Work spread over the machines of a Ray cluster: a model in each worker, shares of work to all.

Ray does the distributing: its actors are the workers, its `ActorPool` gives each the next share
when it is done with one, and an actor that dies is started again elsewhere if need be, with the
share it was at (``max_restarts``, ``max_task_retries``). Here is what is asked of Ray, and how a
failure there becomes one line here. Ray is an extra: it is imported once it is needed.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from conflayers_cli.engine.parallel import world
from conflayers_cli.errors import ConfLayersError, InputError

AUTO, LOCAL = "auto", "local"
RETRIES = 3
"""A share is begun so many times again when its worker dies: after that it is what kills it."""
POLLED_S = 1.0
"""Every so often workers that were late are looked for, and nodes that are gone."""
CONNECTED_S, ANSWERED_S = 5.0, 60.0
"""An address must take a connection within the former, and turn out to be Ray's in the latter."""
FREED_S = 5.0
"""What others used on the cluster is free again in so long a time after they have ended."""
STORE_BYTES = 2**27
"""Of Ray's object store, where a cluster is started here: prompts go through it, and answers."""
_PROBE = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False)"


@dataclass(frozen=True)
class Cluster:
    """Where the work is to be done.

    Attributes:
        address: a node's ``HOST:PORT``; auto: the cluster this machine belongs to, or else one that
            is started here for this run alone; local: always the latter.
        workers: how many; None: one per GPU, without GPUs one per machine.
        gpus: whether workers take a GPU each where there are any.
    """

    address: str
    workers: int | None = None
    gpus: bool = True


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


def cluster_of(
    address: str | None, workers: int | None, *, device: str, device_map: str | None
) -> Cluster | None:
    """The cluster that the command line names; None: it names none.

    Raises:
        InputError: flags that contradict each other, or Ray is not installed.
    """
    if address is None:
        if workers is not None:
            raise InputError("--workers goes with --ray auto or --ray HOST:PORT")
        return None
    if world().size > 1:
        raise InputError(
            "--ray gives every worker the whole model, torchrun a part of every layer: use one"
        )
    if device_map is not None:
        raise InputError(
            "--ray gives every worker the whole model on one device: leave --device-map out "
            "(torchrun is for models larger than one)"
        )
    if device.startswith("cuda:"):
        raise InputError(f"--device {device}: Ray gives every worker a GPU: leave it out")
    if address not in (AUTO, LOCAL):
        _host_and_port(address)
    if find_spec("ray") is None:
        raise InputError("--ray needs Ray: pip install 'conflayers[ray]' on every machine")
    return Cluster(address, workers, gpus=device != "cpu")


@dataclass(frozen=True)
class Room:
    """What the workers of a cluster get: so many of them, with so many CPUs and GPUs each."""

    workers: int
    cpus: int
    gpus: int


def room_for(nodes: Sequence[tuple[int, int]], workers: int | None, gpus: bool) -> Room:
    """The room for workers on the nodes of a cluster.

    As many CPUs go to each worker as leave room for all: threads of one worker are on one node.

    Args:
        nodes: (CPUs, GPUs) of each.
        workers: how many; None: one per GPU, without GPUs one per node.
        gpus: whether workers take a GPU each where there are any.

    Raises:
        InputError: there is no room for so many.
    """
    with_gpu = gpus and any(node_gpus for _, node_gpus in nodes)

    def slots(cpus: int) -> int:
        held = ((node // cpus, node_gpus) for node, node_gpus in nodes)
        return sum(min(by_cpu, by_gpu) if with_gpu else by_cpu for by_cpu, by_gpu in held)

    most = slots(1)
    usual = most if with_gpu else sum(1 for cpus, _ in nodes if cpus)
    wanted = usual if workers is None else workers
    if not 0 < wanted <= most:
        each = "a CPU and a GPU" if with_gpu else "a CPU"
        raise InputError(
            f"--workers {wanted or 1}: the cluster has room for {most}, with {each} for every one"
        )
    largest = max(cpus for cpus, _ in nodes)
    cpus = next(count for count in range(largest, 0, -1) if slots(count) >= wanted)
    return Room(wanted, cpus, int(with_gpu))


@dataclass(frozen=True)
class _Failure:
    """What a worker can't do, and which error says so; a restarted one could not do it either."""

    told: str
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
            return _Failure(str(error), isinstance(error, InputError), socket.gethostname())
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
        tell: told what the user should know.
        several_nodes: whether a failure has to say where it was.
        like: where all must be like, for results that are compared; None: what differs is told.

    Attributes:
        places: what those that have come so far run on.
    """

    def __init__(
        self,
        room: Room,
        opening: Sequence[Any],
        hands: Sequence[Any],
        tell: Callable[[str], None],
        several_nodes: bool,
        like: Place | None = None,
    ) -> None:
        self.room = room
        self.places: list[Place] = []
        self._opening = opening
        dtype = None if like is None else like.dtype
        self._coming = {hand.do.remote(opening, [], dtype): hand for hand in hands}
        self._here: list[Any] = []
        self._tell = tell
        self._told: set[str] = set()
        self._several_nodes = several_nodes
        self._like = like

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
                    self._tell_lost()
                else:
                    (value,) = self._checked(outcome).value
                    yield value
                self._join(pool, 0)

    def gather(self) -> None:
        """Wait for all workers.

        Raises:
            InputError, ConfLayersError: as :meth:`results`.
        """
        while self._coming:
            self._join(None, None)

    def _begin(self, actor: Any, share: Any) -> Any:
        return actor.do.remote(self._opening, [share], self._dtype)

    @property
    def _dtype(self) -> str | None:
        """The first worker's: where each is to find out by itself, they might not agree."""
        if self._like is not None:
            return self._like.dtype
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
                if pool is not None:
                    pool.push(actor)
                timeout = 0

    def _checked(self, outcome: _Outcome | _Failure) -> _Outcome:
        if isinstance(outcome, _Failure):
            where = f"on {outcome.host}: " if self._several_nodes else ""
            kind = InputError if outcome.of_input else ConfLayersError
            raise kind(f"{where}{outcome.told}")
        self._compare(outcome.place)
        for note in outcome.notes:
            self._tell_once(note)
        if outcome.revived:
            self._tell_once("note: a worker died; what it was at was done again")
        return outcome

    def _tell_once(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            self._tell(message)

    def _compare(self, place: Place) -> None:
        if self._like is not None and not place.is_like(self._like):
            raise InputError(
                f"a worker runs on {place}, this process on {self._like}: what they find out can't "
                "be compared"
            )
        first = self.places[0] if self.places else place
        # Found in another dtype, it is going to open its model anew for its first share.
        if self._like is None and not replace(place, dtype=first.dtype).is_like(first):
            self._tell_once(
                f"note: workers differ ({first}; {place}): where two tokens are as good as equal, "
                "texts may depend on which one decodes them"
            )

    def _tell_lost(self) -> None:
        import ray

        try:
            room_for(_sizes(ray.nodes()), self.room.workers, bool(self.room.gpus))
        except InputError:
            self._tell_once(
                f"note: the cluster has lost a machine and has no room for {self.room.workers} "
                "workers any more: what the missing ones were at waits until there is"
            )


@contextmanager
def crew_of(
    cluster: Cluster, opening: Opening, tell: Callable[[str], None], like: Place | None = None
) -> Iterator[Crew]:
    """Within: workers on the cluster, each opened by ``opening``; behind it they are gone.

    Args:
        cluster: where.
        opening: is sent to every worker by value (cloudpickle).
        tell: told what the user should know.
        like: as for `Crew`.

    Raises:
        InputError: the cluster can't be reached, or has no room for the workers.
    """
    with _connected(cluster.address):
        import ray

        nodes = [node for node in ray.nodes() if node["Alive"]]
        room = room_for(_sizes(nodes), cluster.workers, cluster.gpus)
        _tell_busy(room, tell)
        actor = ray.remote(max_restarts=-1, max_task_retries=RETRIES)(_Hand)
        kind = actor.options(num_cpus=room.cpus, num_gpus=room.gpus)
        kept = [ray.put(opening)]
        hands = [kind.remote(str(Path.cwd())) for _ in range(room.workers)]
        try:
            yield Crew(room, kept, hands, tell, len(nodes) > 1, like)
        finally:
            for hand in hands:
                ray.kill(hand)


def _tell_busy(room: Room, tell: Callable[[str], None]) -> None:
    """Say so where others use the cluster; those that have just ended have a moment to go."""
    import ray

    deadline = time.monotonic() + FREED_S
    while True:
        free = ray.available_resources()
        idle = int(free.get("CPU", 0)) // room.cpus
        if room.gpus:
            idle = min(idle, int(free.get("GPU", 0)))
        if idle >= room.workers:
            return
        if time.monotonic() >= deadline:
            break
        time.sleep(0.1)
    tell(
        f"note: the cluster is at other work: {idle} of {room.workers} workers can begin, the "
        "others when there is room"
    )


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """Within: this process is a driver of the cluster; one that it was before it stays."""
    # What Ray's daemons say of a worker that died would go to stdout, which is the answer's.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".*")
    import ray

    if ray.is_initialized():
        yield
        return
    if address == AUTO:
        address = os.environ.get("RAY_ADDRESS") or AUTO
    if address not in (AUTO, LOCAL):
        _probe(address)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _connect(address)
        # Ray has its own way of dying by a signal.
        for number, handler in handlers.items():
            with suppress(ValueError):  # not in the main thread, where Ray leaves them alone, too
                signal.signal(number, handler)
        yield
    finally:
        ray.shutdown()


def _connect(address: str) -> None:
    import logging

    import ray

    quiet: dict[str, Any] = {"logging_level": logging.CRITICAL, "log_to_driver": False}
    started = {"include_dashboard": False, "object_store_memory": STORE_BYTES}
    try:
        if address == AUTO:
            with suppress(ConnectionError):  # there is none
                ray.init(address=AUTO, **quiet)
                return
        if address in (AUTO, LOCAL):
            # Ray's way is to let workers stand back behind everything else that a machine does.
            os.environ.setdefault("RAY_worker_niceness", "0")
            ray.init(address=LOCAL, **started, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"--ray {address}: {_last_line(error)}") from error
    except Exception as error:  # Ray raises bare ones where its daemons don't come up in time
        raise ConfLayersError(f"Ray could not be started: {_last_line(error)}") from error


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(
            f"--ray {address}: allowed is auto, local, or HOST:PORT of a cluster that this machine "
            "belongs to"
        )
    return host.strip("[]"), int(port)


def _probe(address: str) -> None:
    """Raise InputError where no Ray cluster is at the address, which Ray takes minutes to say.

    What listens there may be something else, Ray's dashboard for one: a process of its own looks,
    which can be given up.
    """
    try:
        socket.create_connection(_host_and_port(address), CONNECTED_S).close()
    except OSError as error:
        raise InputError(
            f"--ray {address}: can't be reached ({error.strerror or error}): is Ray started there "
            "(ray start --head)?"
        ) from error
    try:
        looked = subprocess.run(
            [sys.executable, "-c", _PROBE, address],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=ANSWERED_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise InputError(
            f"--ray {address}: no Ray cluster answers there (its port is 6379 by default; 8265 is "
            "its dashboard, 10001 Ray Client, which is not supported)"
        ) from None
    if looked.returncode:
        told = looked.stderr.decode(errors="replace").strip()
        raise InputError(f"--ray {address}: {_last_line(told) or 'this machine can not join it'}")


@contextmanager
def _failures_told() -> Iterator[None]:
    """Within: what Ray raises becomes one line."""
    from ray.exceptions import RayActorError, RayError

    try:
        yield
    except RayActorError as error:
        raise ConfLayersError(
            f"a worker could not be started, or died {RETRIES + 1} times over the same work: "
            f"{_last_line(error)}"
        ) from error
    except RayError as error:
        raise ConfLayersError(f"a worker failed: {_last_line(error)}") from error


def _sizes(nodes: Iterable[Any]) -> list[tuple[int, int]]:
    """(CPUs, GPUs) of the nodes that are there, as Ray names them."""
    alive = (node["Resources"] for node in nodes if node["Alive"])
    return [(int(each.get("CPU", 0)), int(each.get("GPU", 0))) for each in alive]


def _last_line(error: object) -> str:
    """Where Ray, and a traceback in its errors, say what it was."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
