"""Several processes as torchrun starts them, without torchrun's own process and its time."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PATIENCE = 120
"""Seconds after which processes that wait for each other are ended, and the test fails."""


@dataclass(frozen=True)
class Ended:
    """What one process gave."""

    code: int
    out: str
    err: str


def environment(**more: str) -> dict[str, str]:
    """Of a process of its own: one thread, no network, this checkout."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    return {**os.environ, **fixed, **more}


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
        command = [sys.executable, "-m", module, *map(str, arguments(rank))]
        pipe = subprocess.PIPE
        processes.append(
            subprocess.Popen(command, env=environment(**told), stdout=pipe, stderr=pipe)
        )
    ended = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=PATIENCE)
            ended.append(Ended(process.returncode, out.decode(), err.decode()))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return ended
