"""One model on the processes of a torchrun, and how they take the same decisions.

Every process, a rank, runs the same program on its part of each layer's weights (tensor parallelism
of transformers), and a rank that took another decision than the others would wait for them for
ever. So what leaves the model, and what depends on time, files or standard input, is rank 0's:
`broadcast_rank0`, `run_on_rank0`. Rank 0 prints for all; an error is printed by the first rank that
meets it.

Without torchrun nothing here does anything. torch is imported only when needed, as the command line
asks for `world` before it does any work.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

from conflayers_cli.errors import ConfLayersError, InputError

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others, one of which may convert or download a model."""
EXIT_TIMEOUT = timedelta(seconds=30)
"""The same at the end, where all come at about the same time."""
FAILED_EXIT_TIMEOUT = timedelta(seconds=3)
"""The same after an error, where others may never come."""

_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_STDOUT, _STDERR = 1, 2


@dataclass(frozen=True)
class World:
    """This process among those that torchrun started; ``size`` 1: torchrun started none.

    ``local_rank`` and ``local_size`` count those of this machine.
    """

    size: int = 1
    rank: int = 0
    local_rank: int = 0
    local_size: int = 1


def world() -> World:
    """What torchrun's environment variables say.

    Raises:
        InputError: they contradict each other.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":  # asked many times per step
        return World()
    found = {name: os.environ.get(name) for name in _NEEDED}
    if None in found.values():
        return World()
    try:
        size, rank, local_rank = (int(found[n] or "") for n in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or local_rank + 1)
    except ValueError:
        size = rank = local_rank = local_size = -1
    if not (0 <= rank < size and 0 <= local_rank < local_size):
        values = " ".join(f"{name}={found[name]}" for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        raise InputError(f"the environment names no process that torchrun started: {values}")
    return World(size, rank, local_rank, local_size)


def is_rank0() -> bool:
    """Whether this is the process that writes files; a single process is."""
    return world().rank == 0


def join_ranks() -> None:
    """Join the process group of all ranks, once.

    Raises:
        InputError: there are more processes here than CUDA devices.
        ConfLayersError: the others did not come.
    """
    here = world()
    if here.size == 1:
        return
    import torch
    from torch import distributed

    if distributed.is_initialized():
        return
    device = None
    if torch.cuda.is_available():  # then transformers runs on it, whatever else there is
        count = torch.cuda.device_count()
        if here.local_size > count:
            raise InputError(
                f"torchrun started {here.local_size} processes for {count} CUDA "
                f"device{'s' if count > 1 else ''}: --nproc-per-node {count} at the most"
            )
        device = torch.device("cuda", here.local_rank)
        torch.cuda.set_device(device)
    try:
        with _silenced(_STDOUT, _STDERR):  # gloo prints on stdout
            distributed.init_process_group(
                "gloo" if device is None else "nccl", timeout=TIMEOUT, device_id=device
            )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfLayersError(f"the {here.size} processes did not meet: {reason}") from error


def broadcast_rank0(value: T) -> T:
    """Rank 0's value, on all ranks; a collective call.

    A tensor on the model's device, of one shape on all ranks, is overwritten in place on the others
    without synchronisation. Other values are pickled.
    """
    if world().size == 1:
        return value
    import torch
    from torch import distributed

    join_ranks()
    home = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    with torch.inference_mode():
        if isinstance(value, torch.Tensor) and value.device.type == home:
            shared = value.contiguous()
            distributed.broadcast(shared, 0)
            return cast(T, shared)
        if isinstance(value, float):  # perhaps several times per step
            number = torch.tensor([value], dtype=torch.float64, device=home)
            distributed.broadcast(number, 0)
            return cast(T, number.item())
    held: list[Any] = [value]
    distributed.broadcast_object_list(held, 0)
    return cast(T, held[0])


def run_on_rank0(work: Callable[[], T]) -> T:
    """The result of ``work`` on rank 0, or the ConfLayersError it raises there, on all ranks."""
    if world().size == 1:
        return work()
    given: T | None = None
    failure: ConfLayersError | None = None
    if is_rank0():
        try:
            given = work()
        except ConfLayersError as error:
            failure = error
    given, failure = broadcast_rank0((given, failure))
    if failure is not None:
        raise failure
    return cast(T, given)


class RankOutput:
    """Keeps all ranks but rank 0 silent, except for the first error; made before any output."""

    def __init__(self) -> None:
        try:
            here = world()
        except InputError:  # reported by the next caller of `world`
            here = World()
        self._rank, self._size = here.rank, here.size
        self._stderr: int | None = None
        if self._rank:
            with suppress(OSError):  # closed by the caller
                self._stderr = os.dup(_STDERR)
            _redirect((_STDOUT, _STDERR), None)

    @contextmanager
    def failure_output(self) -> Iterator[None]:
        """Within: output to stderr is seen from the first rank that comes here alone.

        Before the ranks have joined it is rank 0's: they are all at the same point.
        """
        store = self._store()
        if store is None:
            yield
            return
        first = False
        with suppress(RuntimeError):  # rank 0 has ended, and the store with it
            first = store.add("conflayers/failures", 1) == 1
            if first:
                store.set("conflayers/failed", str(self._rank))
        if first and self._rank == 0:
            yield
        elif first and self._stderr is not None:
            _redirect((_STDERR,), self._stderr)
            try:
                yield
            finally:
                _redirect((_STDERR,), None)
        else:
            with _silenced(_STDERR):
                yield

    def common_exit_code(self, code: int) -> int:
        """The exit code of all ranks: that of the first that failed, if any.

        Waits a while for the others, so that none is cut off while another ends well.
        """
        store = self._store()
        if store is None:
            return code
        with _silenced(_STDOUT, _STDERR):  # torch prints at length which rank is missing
            try:
                ended = [f"conflayers/ended/{rank}" for rank in range(self._size)]
                store.set(ended[self._rank], str(code))
                store.wait(ended, FAILED_EXIT_TIMEOUT if code else EXIT_TIMEOUT)
                codes = [int(store.get(key)) for key in ended]
                code = codes[0] or max(codes)
                if code and store.check(["conflayers/failed"]):
                    code = codes[int(store.get("conflayers/failed"))]
                left = [f"conflayers/left/{rank}" for rank in range(self._size)]
                store.set(left[self._rank], "")
                if self._rank == 0:  # the store may be a thread of this process: it ends last
                    with suppress(RuntimeError):
                        store.wait(left, FAILED_EXIT_TIMEOUT)
                from torch import distributed

                distributed.destroy_process_group()
            except RuntimeError:  # a rank is missing and prints its error
                return code or ConfLayersError.exit_code
        return code

    def _store(self) -> Any:
        """The ranks' key-value store; None before they have joined."""
        torch = sys.modules.get("torch")  # not imported for this
        if self._size == 1 or torch is None or not torch.distributed.is_initialized():
            return None
        return torch.distributed.distributed_c10d._get_default_store()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):
            stream.flush()


def _redirect(streams: Sequence[int], target: int | None) -> None:
    """Flush, then redirect file descriptors to another one or, for None, to nowhere."""
    _flush()
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in streams:
            os.dup2(nowhere if target is None else target, stream)
        os.close(nowhere)


@contextmanager
def _silenced(*streams: int) -> Iterator[None]:
    """Within: what is written to these file descriptors is dropped."""
    kept: dict[int, int] = {}
    for stream in streams:
        with suppress(OSError):  # one that is closed
            kept[stream] = os.dup(stream)
    _redirect(list(kept), None)
    try:
        yield
    finally:
        _flush()
        for stream, copy in kept.items():
            os.dup2(copy, stream)
            os.close(copy)
