"""Several processes as torchrun starts them, without torchrun's own process and its time."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.processes import environment, start

PATIENCE = 120
"""Seconds after which processes that wait for each other are ended, and the test fails."""


@dataclass(frozen=True)
class Ended:
    """What one process gave."""

    code: int
    out: str
    err: str


def run_ranks(
    size: int,
    arguments: Callable[[int], Sequence[object]],
    *,
    module: str = "conflayers_cli",
) -> list[Ended]:
    """Run ``python -m module`` as so many ranks, each with its arguments."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(size):
        told = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        pipe = subprocess.PIPE
        processes.append(
            start(module, arguments(rank), env=environment(**told), stdout=pipe, stderr=pipe)
        )
    ended = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=PATIENCE)
            out, err = out or b"", err or b""
            ended.append(Ended(process.wait(), out.decode(), err.decode()))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return ended
