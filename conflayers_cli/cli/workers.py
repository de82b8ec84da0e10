"""Prompts answered by the workers of a Ray cluster, each as one process would answer it."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from conflayers_cli.cli.answering import Done, Facts, Prepare
from conflayers_cli.cli.terminal import note, notes_to
from conflayers_cli.distributed import Cluster, Crew, Place, crew_of

BATCHES = 4
"""Times ``--batch-size`` prompts in a share: the rows of one that ends are filled from it."""


class Answerer:
    """A machine that answers shares of the prompts.

    Args:
        prepare: makes it and encodes all prompts, so that what is wrong with one is told at once.
        dtype: which the model is loaded in; None: as the command line says.

    Attributes:
        notes: what there was to say of that.
        place: what it runs on.
    """

    def __init__(self, prepare: Prepare, dtype: str | None) -> None:
        import torch

        from conflayers_cli.environment import device_name

        self.notes: list[str] = []
        with notes_to(self.notes.append):
            self._machine, self._prompts = prepare(dtype)
        loaded = self._machine.loaded
        self.place = Place(
            host=socket.gethostname(),
            device=device_name(loaded.device),
            dtype=str(loaded.dtype).removeprefix("torch."),
            torch=torch.__version__,
        )

    def __call__(self, share: tuple[int, int]) -> tuple[Sequence[Done], Facts]:
        """The answers to the prompts from one number to before another, and the machine's facts."""
        begin, end = share
        with notes_to(self.notes.append):
            dones = list(self._machine.dones(self._prompts, begin, end))
        return dones, self._machine.facts()


@contextmanager
def answering_workers(
    prepare: Prepare, cluster: Cluster, begin: int, end: int, batch_size: int
) -> Iterator[tuple[Iterator[Done], Callable[[], Facts]]]:
    """Within: the answers to the prompts from number ``begin`` to before ``end``, as they are done,
    and behind the last one what there is to say of the workers.

    Args:
        prepare: goes to every worker.
        cluster: whose workers they are.
        begin, end: as said.
        batch_size: prompts that a worker decodes at once.

    Raises:
        InputError: as `crew_of`.
    """
    size = batch_size * BATCHES if batch_size > 1 else 1
    shares = [(first, min(first + size, end)) for first in range(begin, end, size)]
    started = time.perf_counter()
    with crew_of(cluster, partial(Answerer, prepare), note) as crew:
        facts: list[Facts] = []
        yield _dones(crew, shares, started, facts), lambda: facts[-1]


def _dones(
    crew: Crew, shares: Sequence[tuple[int, int]], started: float, facts: list[Facts]
) -> Iterator[Done]:
    """The answers; the facts that come with the last of them are left in ``facts``."""
    for dones, latest in crew.results(shares):
        yield from dones
        facts[:] = [_of_all(latest, crew, time.perf_counter() - started)]


def _of_all(latest: Facts, crew: Crew, seconds: float) -> Facts:
    """A worker's facts, and that there were several."""
    hosts = len({place.host for place in crew.places})
    told = (
        f"{len(crew.places)} workers on {hosts} machine{'s' if hosts > 1 else ''}, "
        f"{crew.room.cpus} CPU{'s' if crew.room.cpus > 1 else ''} each, "
        f"{seconds:.1f} s in all, their start included; one of them:"
    )
    return replace(latest, told=(told, *latest.told))
