"""What the workers of a Ray cluster do: answer prompts."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from conflayers_cli.cluster.ray_cluster import Cluster
from conflayers_cli.cluster.worker_pool import Crew, Place, crew_of
from conflayers_cli.generation.run import Prepare, PromptResult, RunStats
from conflayers_cli.utils.notices import Render, collected

if TYPE_CHECKING:
    from conflayers_cli.models.loaded_model import LoadedModel

BATCHES = 4
"""Times ``--batch-size`` prompts in a share: the rows of one that ends are filled from it."""


class Answerer:
    """A worker that answers shares of the prompts.

    Args:
        prepare: loads the model and encodes all prompts, so that what is wrong with one is told at
            once.
        render: makes a note's text of its message and the arguments' names in it.
        dtype: which the model is loaded in; None: as the command line says.

    Attributes:
        notes: what there was to say of that.
        place: what it runs on.
    """

    def __init__(self, prepare: Prepare, render: Render, dtype: str | None) -> None:
        self.notes: list[str] = []
        self._render = render
        with collected(self.notes, self._render):
            self._prepared = prepare(dtype)
        self.place = place_of(self._prepared.loaded)

    def __call__(self, share: tuple[int, int]) -> tuple[Sequence[PromptResult], RunStats]:
        """The results of the prompts from one number to before another, and the worker's run."""
        begin, end = share
        with collected(self.notes, self._render):
            results = list(self._prepared.results(begin, end))
        return results, self._prepared.run_stats()


@contextmanager
def answering_workers(
    prepare: Prepare, cluster: Cluster, begin: int, end: int, batch_size: int, render: Render
) -> Iterator[tuple[Iterator[PromptResult], Callable[[], RunStats]]]:
    """Within: the answers to the prompts from number ``begin`` to before ``end``, as they are done,
    and behind the last one what there is to say of the workers.

    Args:
        prepare: goes to every worker.
        cluster: whose workers they are.
        begin, end: as said.
        batch_size: prompts that a worker decodes at once.
        render: as for `Answerer`.

    Raises:
        InputError: as `crew_of`.
    """
    size = batch_size * BATCHES if batch_size > 1 else 1
    shares = [(first, min(first + size, end)) for first in range(begin, end, size)]
    started = time.perf_counter()
    with crew_of(cluster, partial(Answerer, prepare, render)) as crew:
        runs: list[RunStats] = []
        yield _results(crew, shares, started, runs), lambda: runs[-1]


def _results(
    crew: Crew, shares: Sequence[tuple[int, int]], started: float, runs: list[RunStats]
) -> Iterator[PromptResult]:
    """The results; what there is to say of the run comes with the last of them, in ``runs``."""
    for results, latest in crew.results(shares):
        yield from results
        runs[:] = [_of_all(latest, crew, time.perf_counter() - started)]


def _of_all(latest: RunStats, crew: Crew, seconds: float) -> RunStats:
    """A worker's run, and that there were several."""
    hosts = len({place.host for place in crew.places})
    told = (
        f"{_count(len(crew.places), 'worker')} on {_count(hosts, 'machine')}, "
        f"{_count(crew.room.cpus, 'CPU')} each, "
        f"{seconds:.1f} s in all, their start included; one of them:"
    )
    return replace(latest, told=(told, *latest.told))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def place_of(loaded: LoadedModel) -> Place:
    """What a model runs on here; of several GPUs of a kind it does not matter which."""
    import torch

    from conflayers_cli.utils.environment import device_name

    kind = loaded.device.type
    return Place(
        host=socket.gethostname(),
        device=device_name(loaded.device).replace(str(loaded.device), kind, 1),
        dtype=str(loaded.dtype).removeprefix("torch."),
        torch=torch.__version__,
    )
