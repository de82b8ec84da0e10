"""The Ray cluster that the command line names: joining it, and what each worker gets of it.

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
CONNECT_TIMEOUT_S = 5.0
PROBE_TIMEOUT_S = 60.0
"""Time for a process to join the cluster at an address."""
RELEASE_TIMEOUT_S = 5.0
"""Time after which the resources of drivers that have ended are free again."""
STORE_BYTES = 2**27
"""Ray's object store in a cluster that is started here: prompts and results go through it."""
_PROBE = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False)"


@dataclass(frozen=True)
class Cluster:
    """A cluster and the workers wanted on it.

    Attributes:
        address: a node's ``HOST:PORT``; auto: the cluster this machine belongs to, or else one that
            is started here for this run alone; local: always the latter.
        workers: how many; None: one per GPU, without GPUs one per machine.
        gpus: whether workers take a GPU each where there are any.
    """

    address: str
    workers: int | None = None
    gpus: bool = True


def parse_cluster(
    address: str | None, workers: int | None, *, device: str, device_map: str | None
) -> Cluster | None:
    """The cluster that the arguments name, None without ``address``.

    Raises InputError where they contradict each other, or Ray is not installed.
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
class WorkerResources:
    """The number of workers, and the CPUs and GPUs of each."""

    workers: int
    cpus: int
    gpus: int


def allocate_workers(
    nodes: Sequence[tuple[int, int]], workers: int | None, gpus: bool
) -> WorkerResources:
    """The most CPUs per worker with which all workers fit, each on one of ``nodes`` (CPUs, GPUs).

    ``workers`` and ``gpus`` are as in `Cluster`. Raises InputError where the cluster is too small.
    """
    with_gpu = gpus and any(node_gpus for _, node_gpus in nodes)

    def capacity(cpus: int) -> int:
        """How many workers fit with so many CPUs each."""
        return sum(min(n // cpus, node_gpus) if with_gpu else n // cpus for n, node_gpus in nodes)

    available = capacity(1)
    default = available if with_gpu else sum(1 for cpus, _ in nodes if cpus)
    wanted = default if workers is None else workers
    if not 0 < wanted <= available:
        each = "a CPU and a GPU" if with_gpu else "a CPU"
        raise InputError(
            f"workers {wanted or 1}: the cluster has room for {available}, with {each} for every "
            "one",
            names=("workers",),
        )
    largest = max(cpus for cpus, _ in nodes)
    cpus = next(count for count in range(largest, 0, -1) if capacity(count) >= wanted)
    return WorkerResources(wanted, cpus, int(with_gpu))


def warn_if_busy(resources: WorkerResources) -> None:
    """Log a warning where others use the cluster, also after `RELEASE_TIMEOUT_S`."""
    import ray

    deadline = time.monotonic() + RELEASE_TIMEOUT_S
    while True:
        free = ray.available_resources()
        idle = int(free.get("CPU", 0)) // resources.cpus
        if resources.gpus:
            idle = min(idle, int(free.get("GPU", 0)))
        if idle >= resources.workers:
            return
        if time.monotonic() >= deadline:
            break
        time.sleep(0.1)
    logger.warning(
        f"note: the cluster is at other work: {idle} of {resources.workers} workers can begin, the "
        "others when there is room"
    )


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Within: this process is a driver of the cluster; a driver before stays one."""
    # Ray's daemons would print on stdout, which is for answers, that a worker died
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
        # Ray handles signals in its own way
        for number, handler in handlers.items():
            with suppress(ValueError):  # not the main thread: Ray has left them alone, too
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
            # Ray gives its workers the lowest priority otherwise
            os.environ.setdefault("RAY_worker_niceness", "0")
            ray.init(address=LOCAL, **started, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        raise _address_error(address, last_line(error)) from error
    except Exception as error:  # a bare one where Ray's daemons don't start in time
        raise ConfLayersError(f"Ray could not be started: {last_line(error)}") from error


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise _address_error(
            address,
            "allowed is auto, local, or HOST:PORT of a cluster that this machine belongs to",
        )
    return host.strip("[]"), int(port)


def _probe(address: str) -> None:
    """Raise InputError where no Ray cluster is at the address.

    A process that can be killed tries it: Ray takes minutes where something else listens there,
    such as its dashboard.
    """
    try:
        socket.create_connection(_host_and_port(address), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        reason = error.strerror or error
        raise _address_error(
            address, f"can't be reached ({reason}): is Ray started there (ray start --head)?"
        ) from error
    try:
        probe = subprocess.run(
            [sys.executable, "-c", _PROBE, address],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=PROBE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _address_error(
            address,
            "no Ray cluster answers there (its port is 6379 by default; 8265 is its dashboard, "
            "10001 Ray Client, which is not supported)",
        ) from None
    if probe.returncode:
        raise _address_error(
            address,
            f"{last_line(probe.stderr.decode(errors='replace'))}: the cluster has to be of this "
            "version of Ray and this machine a part of it; where it asks for a token, "
            "RAY_AUTH_MODE=token is needed",
        )


def _address_error(address: str, problem: str) -> InputError:
    return InputError(f"ray {address}: {problem}", names=(f"ray {address}:",))


def node_sizes(nodes: Iterable[Any]) -> list[tuple[int, int]]:
    """(CPUs, GPUs) of the nodes that are alive, of those that Ray lists."""
    alive = (node["Resources"] for node in nodes if node["Alive"])
    return [(int(each.get("CPU", 0)), int(each.get("GPU", 0))) for each in alive]


def last_line(error: object) -> str:
    """The last line of an error's message, where tracebacks in Ray's errors name the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
