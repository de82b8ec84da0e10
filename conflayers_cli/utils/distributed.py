"""One model on several processes: who is who, and how they stay of one mind.

Under torchrun every process, a rank, runs the same program. transformers gives each a part of every
layer's weights (tensor parallelism), and they sum or gather what comes out. A pass is a joint work:
a rank that took another decision than the others, drafted one token more, say, would wait for them
for ever. So what decides is rank 0's: what leaves the model, and whatever depends on time, files or
standard input, goes through `agreed` or `on_first`. All else is a function of it.

Rank 0 speaks for all: the others' output goes nowhere, and a failure is told by the first rank that
meets it.

Without torchrun nothing here does anything. torch is imported only once there is use for it: the
command line asks this module before it knows whether there is any work.
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
"""A rank waits so long for the others: one may have to convert or to download a model."""
FAREWELL = timedelta(seconds=30)
"""The same at the end, where all come at about the same time."""
FAREWELL_FAILED = timedelta(seconds=3)
"""The same behind a failure, after which others may never come."""

_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_STDOUT, _STDERR = 1, 2


@dataclass(frozen=True)
class World:
    """The processes that torchrun started, and which of them this is.

    Attributes:
        size: how many there are; 1: torchrun has not started any.
        rank: this one's number.
        local_rank: its number among those of this machine.
        local_size: how many this machine has.
    """

    size: int = 1
    rank: int = 0
    local_rank: int = 0
    local_size: int = 1


def world() -> World:
    """What torchrun says in the environment.

    Raises:
        InputError: it says what can't be.
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
        told = " ".join(f"{name}={found[name]}" for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        raise InputError(f"the environment names no process that torchrun started: {told}")
    return World(size, rank, local_rank, local_size)


def is_first() -> bool:
    """Whether this process is the one that writes files; alone it is."""
    return world().rank == 0


def begin() -> None:
    """Meet the other ranks, unless that has happened, or there are none.

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
        with _sent_nowhere(_STDOUT, _STDERR):  # gloo says on stdout whom it has met
            distributed.init_process_group(
                "gloo" if device is None else "nccl", timeout=TIMEOUT, device_id=device
            )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfLayersError(f"the {here.size} processes did not meet: {reason}") from error


def agreed(value: T) -> T:
    """Rank 0's value, on all ranks; all must ask for it at the same point.

    A tensor on the device of the model is overwritten in place on the other ranks, and must have
    the same shape on all; nothing waits for it. Other values are pickled. The value itself where
    there is one process.
    """
    if world().size == 1:
        return value
    import torch
    from torch import distributed

    begin()
    home = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    with torch.inference_mode():
        if isinstance(value, torch.Tensor) and value.device.type == home:
            shared = value.contiguous()
            distributed.broadcast(shared, 0)
            return cast(T, shared)
        if isinstance(value, float):  # a clock's, perhaps several times per step
            number = torch.tensor([value], dtype=torch.float64, device=home)
            distributed.broadcast(number, 0)
            return cast(T, number.item())
    held: list[Any] = [value]
    distributed.broadcast_object_list(held, 0)
    return cast(T, held[0])


def on_first(work: Callable[[], T]) -> T:
    """What the work gives on rank 0, or the error it ends with there, on all ranks.

    Raises:
        ConfLayersError: rank 0's.
    """
    if world().size == 1:
        return work()
    given: T | None = None
    failure: ConfLayersError | None = None
    if is_first():
        try:
            given = work()
        except ConfLayersError as error:
            failure = error
    given, failure = agreed((given, failure))
    if failure is not None:
        raise failure
    return cast(T, given)


class Voice:
    """What this rank says: rank 0 speaks, the others are silent but for a failure of their own.

    Made once, before anything is said; from then on the streams of the other ranks lead nowhere.
    """

    def __init__(self) -> None:
        try:
            here = world()
        except InputError:  # told by whoever asks next, as other user errors are
            here = World()
        self._rank, self._size = here.rank, here.size
        self._stderr: int | None = None
        if self._rank:
            with suppress(OSError):  # closed by the caller: there is nothing to be silent with
                self._stderr = os.dup(_STDERR)
            _redirect((_STDOUT, _STDERR), None)

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Within: what is said is heard from the first rank that fails, and from no other.

        Before the ranks have met they are all at the same point, and rank 0 speaks.
        """
        store = self._store()
        if store is None:
            yield
            return
        claimed = False
        with suppress(RuntimeError):  # rank 0 has ended, and the store with it
            claimed = store.add("conflayers/failures", 1) == 1
            if claimed:
                store.set("conflayers/failed", str(self._rank))
        if claimed and self._rank == 0:
            yield
        elif claimed and self._stderr is not None:
            _redirect((_STDERR,), self._stderr)
            try:
                yield
            finally:
                _flush()
                _redirect((_STDERR,), None)
        else:
            with _sent_nowhere(_STDERR):
                yield

    def ended(self, code: int) -> int:
        """The exit code of all ranks: that of the first that failed, where one did.

        Waits for the others a while, so that none is cut off while another ends well.
        """
        store = self._store()
        if store is None:
            return code
        with _sent_nowhere(_STDOUT, _STDERR):  # torch tells at length whom it misses
            try:
                code = self._agreed_code(store, code)
                self._leave(store)
            except RuntimeError:  # somebody did not come: its failure is on its way to the user
                return code or ConfLayersError.exit_code
        return code

    def _agreed_code(self, store: Any, code: int) -> int:
        store.set(self._key("ended", self._rank), str(code))
        everyone = [self._key("ended", rank) for rank in range(self._size)]
        store.wait(everyone, FAREWELL_FAILED if code else FAREWELL)
        codes = [int(store.get(key)) for key in everyone]
        if any(codes) and store.check(["conflayers/failed"]):
            return codes[int(store.get("conflayers/failed"))]
        return codes[0] or max(codes)

    def _leave(self, store: Any) -> None:
        from torch import distributed

        store.set(self._key("left", self._rank), "")
        if self._rank == 0:  # the store may be this process's own: it goes last
            everyone = [self._key("left", rank) for rank in range(self._size)]
            with suppress(RuntimeError):
                store.wait(everyone, FAREWELL_FAILED)
        distributed.destroy_process_group()

    @staticmethod
    def _key(what: str, rank: int) -> str:
        return f"conflayers/{what}/{rank}"

    def _store(self) -> Any:
        """Where ranks leave messages; None where they have not met."""
        torch = sys.modules.get("torch")  # not imported for this
        if self._size == 1 or torch is None or not torch.distributed.is_initialized():
            return None
        return torch.distributed.distributed_c10d._get_default_store()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):
            stream.flush()


def _redirect(streams: Sequence[int], target: int | None) -> None:
    """Lead file descriptors elsewhere, so that libraries' own messages go there, too."""
    _flush()
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in streams:
            os.dup2(nowhere if target is None else target, stream)
        os.close(nowhere)


@contextmanager
def _sent_nowhere(*streams: int) -> Iterator[None]:
    """Within: what is written to these file descriptors is lost."""
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
