"""Prompts answered by the workers of a Ray cluster."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from conflayers_cli.cluster.ray_cluster import Cluster
from conflayers_cli.cluster.worker_pool import WorkerInfo, WorkerPool, open_worker_pool
from conflayers_cli.generation.run import PrepareRun, PromptResult, RunStats
from conflayers_cli.utils.notices import Render, collect_notices

BATCHES = 4
"""Times ``--batch-size`` prompts in a share: a sequence that ends is replaced by another of it."""


class PromptWorker:
    """Answers shares of the prompts.

    Args:
        prepare: loads the model and encodes all prompts, so that an error in one comes at once.
        render: makes a note's text of its message and the arguments' names in it.
        dtype: the model's; None: as the command line says.

    Attributes:
        notes: for the user.
        info: where it runs.
    """

    def __init__(self, prepare: PrepareRun, render: Render, dtype: str | None) -> None:
        import torch

        from conflayers_cli.utils.environment import device_name

        self.notes: list[str] = []
        self._render = render
        with collect_notices(self.notes, render):
            self._prepared = prepare(dtype)
        loaded = self._prepared.loaded
        self.info = WorkerInfo(
            host=socket.gethostname(),
            # without the index: several GPUs of a kind are alike
            device=device_name(loaded.device).replace(str(loaded.device), loaded.device.type, 1),
            dtype=str(loaded.dtype).removeprefix("torch."),
            torch=torch.__version__,
        )

    def __call__(self, share: tuple[int, int]) -> tuple[Sequence[PromptResult], RunStats]:
        """The results of the prompts from one number to before another, and run statistics."""
        begin, end = share
        with collect_notices(self.notes, self._render):
            results = list(self._prepared.results(begin, end))
        return results, self._prepared.run_stats()


@contextmanager
def run_on_workers(
    prepare: PrepareRun, cluster: Cluster, begin: int, end: int, batch_size: int, render: Render
) -> Iterator[tuple[Iterator[PromptResult], Callable[[], RunStats]]]:
    """Within: results of the prompts ``begin`` to before ``end`` as they are done, and a function
    that gives run statistics after the last one.

    ``prepare`` is sent to every worker, which decodes ``batch_size`` prompts at once; ``render`` is
    as for `PromptWorker`. Raises as `open_worker_pool`.
    """
    size = batch_size * BATCHES if batch_size > 1 else 1
    shares = [(first, min(first + size, end)) for first in range(begin, end, size)]
    started = time.perf_counter()
    with open_worker_pool(cluster, partial(PromptWorker, prepare, render)) as pool:
        stats: list[RunStats] = []

        def results() -> Iterator[PromptResult]:
            for share_results, latest in pool.results(shares):
                yield from share_results
                stats[:] = [_pool_stats(latest, pool, time.perf_counter() - started)]

        yield results(), lambda: stats[-1]


def _pool_stats(latest: RunStats, pool: WorkerPool, seconds: float) -> RunStats:
    """One worker's statistics, with a sentence on all workers."""
    hosts = len({worker.host for worker in pool.workers})
    sentence = (
        f"{_count(len(pool.workers), 'worker')} on {_count(hosts, 'machine')}, "
        f"{_count(pool.resources.cpus, 'CPU')} each, "
        f"{seconds:.1f} s in all, their start included; one of them:"
    )
    return replace(latest, notes=(sentence, *latest.notes))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
