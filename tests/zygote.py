"""A process that has imported all that is heavy, and becomes whatever process it is asked for.

Importing torch and transformers takes seconds of the processor, most of what a short run of the
command line takes. This process does it once and then forks: `tests.processes` asks it to.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
from typing import Any

HEAVY = (
    "torch._dynamo",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "conflayers_cli.api.generate",
    "conflayers_cli.cli.main",
    "conflayers_cli.spec_decode.mixed",
    "conflayers_cli.search.calibrate",
)
STREAMS = 3
LARGEST = 2**18
"""Bytes of an order; what a packet between processes may hold."""


def _become(order: dict[str, Any], streams: list[int]) -> None:
    """Be the process that was ordered: its streams, environment, folder, signals, program."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        # As the interpreter opens them: what goes to stderr is not held back.
        own = getattr(sys, name)
        opened = open(  # noqa: SIM115
            number,
            "r" if name == "stdin" else "w",
            encoding=own.encoding,
            errors=own.errors,
            closefd=False,
        )
        if name == "stderr":
            opened.reconfigure(line_buffering=True)
        setattr(sys, name, opened)
        setattr(sys, f"__{name}__", opened)
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    sys.path[:0] = [order["folder"], *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [order["module"], *order["arguments"]]
    try:
        runpy.run_module(order["module"], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if not isinstance(ended.code, int | None):
            raise
        _leave(ended.code or 0)
    _leave(0)


def _leave(code: int) -> None:
    """End as the interpreter does, but for taking apart all that was imported: over a second."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _keep(order: dict[str, Any], streams: list[int], asker: socket.socket) -> bool:
    """Fork the process, tell its number and how it ended; True in the process itself."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    number = os.fork()
    if not number:
        asker.close()
        return True
    for stream in streams:
        os.close(stream)
    with contextlib.suppress(OSError):  # nobody is there any more to be told
        asker.send(str(number).encode())
        _, status = os.waitpid(number, 0)
        asker.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def serve(listener: socket.socket) -> None:
    """Fork a process for every order until standard input is closed.

    Comes back in each of the processes, once its program has ended.
    """
    while True:
        ready, _, _ = select.select([listener.fileno(), 0], [], [])
        if listener.fileno() not in ready:
            os._exit(0)
        asker, _ = listener.accept()
        message, streams, _, _ = socket.recv_fds(asker, LARGEST, STREAMS)
        order = json.loads(message)
        if not os.fork() and _keep(order, streams, asker):
            listener.close()
            return _become(order, streams)
        asker.close()
        for stream in streams:
            os.close(stream)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who keeps a process is waited for by nobody
    for name in HEAVY:
        importlib.import_module(name)
    # What is there is there for good: whoever is forked need not look through it for garbage.
    gc.collect()
    gc.freeze()
    serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
