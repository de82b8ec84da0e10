"""A Ray cluster on this machine for tests, of two CPUs, and the processes of its workers."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

# Before anybody imports Ray, as the command does it.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".*")

WORKER = "ray::_Actor"
"""How Ray names the processes of our workers."""

TOKEN = secrets.token_hex(32)


@contextmanager
def cluster() -> Iterator[None]:
    """Within: this process is the driver of a cluster of its own.

    Its workers keep what they measure in a folder that goes with it. Ray waits half a minute for
    its daemons, in which a busy machine may not get them up.
    """
    import ray

    with folder() as place, pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONFLAYERS_CACHE", f"{place}/cache")
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("RAY_AUTH_TOKEN", TOKEN)  # else Ray makes one, in the user's home
        for last in (False, False, True):
            try:
                _start(place)
            except Exception:  # Ray has no kind of its own for it
                ray.shutdown()
                if last:
                    raise
            else:
                break
        try:
            yield
        finally:
            ray.shutdown()


def _start(place: str) -> None:
    import logging

    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        log_to_driver=False,
        logging_level=logging.CRITICAL,
        _temp_dir=place,
    )


@contextmanager
def folder() -> Iterator[str]:
    """A folder with a short name: those of the sockets in it must not be long."""
    place = tempfile.mkdtemp(prefix="ray")
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def workers(parent: int | None = None) -> list[psutil.Process]:
    """The workers among the processes that a process (this one) has started."""
    return [each for each in psutil.Process(parent).children(recursive=True) if _is_worker(each)]


def _is_worker(process: psutil.Process) -> bool:
    try:
        return any(part.startswith(WORKER) for part in process.cmdline())
    except psutil.Error:  # it has just ended
        return False
