"""A Ray cluster: which one is meant, how this process joins it, and what room there is in it.

Ray is an extra: it is imported once it is needed.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from conflayers_cli.errors import ConfLayersError, InputError
from conflayers_cli.utils.distributed import world

logger = logging.getLogger(__name__)

AUTO, LOCAL = "auto", "local"
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


def cluster_of(
    address: str | None, workers: int | None, *, device: str, device_map: str | None
) -> Cluster | None:
    """The cluster that the command line names; None: it names none.

    Raises:
        InputError: flags that contradict each other, or Ray is not installed.
    """
    if address is None:
        if workers is not None:
            raise InputError(
                "workers goes with ray auto or ray HOST:PORT",
                names=("workers", "ray auto", "ray HOST:PORT"),
            )
        return None
    if world().size > 1:
        raise InputError(
            "ray gives every worker the whole model, torchrun a part of every layer: use one",
            names=("ray",),
        )
    if device_map is not None:
        raise InputError(
            "ray gives every worker the whole model on one device: leave device_map out "
            "(torchrun is for models larger than one)",
            names=("ray", "device_map"),
        )
    if device.startswith("cuda:"):
        raise InputError(
            f"device {device}: Ray gives every worker a GPU: leave it out", names=("device",)
        )
    if address not in (AUTO, LOCAL):
        _host_and_port(address)
    if find_spec("ray") is None:
        raise InputError(
            "ray needs Ray: pip install 'conflayers[ray]' on every machine", names=("ray needs",)
        )
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
            f"workers {wanted or 1}: the cluster has room for {most}, with {each} for every one",
            names=("workers",),
        )
    largest = max(cpus for cpus, _ in nodes)
    cpus = next(count for count in range(largest, 0, -1) if slots(count) >= wanted)
    return Room(wanted, cpus, int(with_gpu))


def warn_if_busy(room: Room) -> None:
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
    logger.warning(
        f"note: the cluster is at other work: {idle} of {room.workers} workers can begin, the "
        "others when there is room"
    )


@contextmanager
def connected(address: str) -> Iterator[None]:
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
        raise InputError(
            f"ray {address}: {last_line(error)}", names=(f"ray {address}:",)
        ) from error
    except Exception as error:  # Ray raises bare ones where its daemons don't come up in time
        raise ConfLayersError(f"Ray could not be started: {last_line(error)}") from error


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(
            f"ray {address}: allowed is auto, local, or HOST:PORT of a cluster that this machine "
            "belongs to",
            names=(f"ray {address}:",),
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
            f"ray {address}: can't be reached ({error.strerror or error}): is Ray started there "
            "(ray start --head)?",
            names=(f"ray {address}:",),
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
            f"ray {address}: no Ray cluster answers there (its port is 6379 by default; 8265 is "
            "its dashboard, 10001 Ray Client, which is not supported)",
            names=(f"ray {address}:",),
        ) from None
    if looked.returncode:
        told = looked.stderr.decode(errors="replace").strip()
        raise InputError(
            f"ray {address}: {last_line(told)}: the cluster has to be of this version of Ray and "
            "this machine a part of it; where it asks for a token, RAY_AUTH_MODE=token is needed",
            names=(f"ray {address}:",),
        )


def sizes_of(nodes: Iterable[Any]) -> list[tuple[int, int]]:
    """(CPUs, GPUs) of the nodes that are there, as Ray names them."""
    alive = (node["Resources"] for node in nodes if node["Alive"])
    return [(int(each.get("CPU", 0)), int(each.get("GPU", 0))) for each in alive]


def last_line(error: object) -> str:
    """Where Ray, and a traceback in its errors, say what it was."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
