"""Programs in processes of their own, without the seconds that importing torch takes each.

They are forked from a process that has imported it (`tests.zygote`), one for a whole run of the
tests. Where that can't be done they are started as always.

    python -S -m tests.processes MODULE ARGUMENTS…

does it for a shell script that a test runs, and ends as the program does.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parent.parent
ADDRESS = "CONFLAYERS_TEST_ZYGOTE"
"""The variable that holds where to ask for processes, for scripts that a test runs."""

Stream = int | IO[bytes] | IO[str] | None
"""As `subprocess.Popen` takes it."""


class Forked:
    """What the tests need of `subprocess.Popen`, for a process that another one has forked."""

    def __init__(self, connection: socket.socket, name: str) -> None:
        self._connection, self._name = connection, name
        self.pid = int(connection.recv(64))
        self.returncode: int | None = None
        self.stdout: IO[bytes] | None = None
        self.stderr: IO[bytes] | None = None

    def poll(self) -> int | None:
        """How it ended, if it has."""
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self._end()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """How it ended, once it has; TimeoutExpired if that takes longer, in seconds."""
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self._name, timeout or 0.0)
            self._end()
        return self.returncode or 0

    def _end(self) -> None:
        self.returncode = int(self._connection.recv(64))
        self._connection.close()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[bytes | None, bytes | None]:
        """(what it still wrote to stdout, to stderr) where those are pipes, once it has ended."""
        end = None if timeout is None else time.monotonic() + timeout

        def left() -> float | None:
            return None if end is None else max(end - time.monotonic(), 0.0)

        read: dict[IO[bytes], bytes] = {}
        with selectors.DefaultSelector() as selector:
            for pipe in (self.stdout, self.stderr):
                if pipe and not pipe.closed:
                    read[pipe] = b""
                    selector.register(pipe, selectors.EVENT_READ, pipe)
            while selector.get_map():
                ready = selector.select(left())
                if not ready:
                    raise subprocess.TimeoutExpired(self._name, timeout or 0.0)
                for key, _ in ready:
                    piece = os.read(key.fd, 2**16)
                    read[key.data] += piece
                    if not piece:
                        selector.unregister(key.fileobj)
        self.wait(left())
        for pipe in read:
            pipe.close()
        out, err = (read.get(pipe) if pipe else None for pipe in (self.stdout, self.stderr))
        return out, err


Process = Forked | subprocess.Popen[bytes]


def environment(**more: str) -> dict[str, str]:
    """Of a process of its own: one thread, no network, this checkout."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    return {**os.environ, **fixed, **more}


def start(
    module: str,
    arguments: Sequence[object],
    *,
    env: Mapping[str, str] | None = None,
    stdin: Stream = subprocess.DEVNULL,
    stdout: Stream = None,
    stderr: Stream = None,
) -> Process:
    """``python -m module`` with these arguments, which heeds Ctrl-C even where we don't."""
    own = environment() if env is None else dict(env)
    told = [str(argument) for argument in arguments]
    if sys.platform == "linux":
        return _forked(zygote(), module, told, own, (stdin, stdout, stderr))
    # A job that a shell put into the background ignores SIGINT, and its children would, too.
    heed: Callable[[], object] = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        [sys.executable, "-m", module, *told],
        env=own,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        preexec_fn=heed if sys.platform != "win32" else None,
    )


@functools.cache
def zygote() -> str:
    """The address of this run's own process to fork from; it is begun when first asked for."""
    folder = tempfile.TemporaryDirectory(prefix="zygote-")
    address = f"{folder.name}/socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen()
        number = listener.fileno()
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote", str(number)],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,  # it ends when this does, in whatever way we end
            pass_fds=[number],
        )

    def end() -> None:
        process.communicate()
        folder.cleanup()

    atexit.register(end)
    return address


def _forked(
    address: str,
    module: str,
    arguments: Sequence[str],
    env: Mapping[str, str],
    streams: Sequence[Stream],
) -> Forked:
    """The process, once it is there."""
    own: list[int] = []  # ends of pipes that are the process's alone
    pipes: list[IO[bytes] | None] = []
    given: list[int] = []
    for number, stream in enumerate(streams):
        pipe = None
        if stream == subprocess.DEVNULL:
            given.append(os.open(os.devnull, os.O_RDWR))
            own.append(given[-1])
        elif stream == subprocess.PIPE:
            ours, its = os.pipe()
            given.append(its)
            own.append(its)
            pipe = os.fdopen(ours, "rb")
        elif stream is None:
            given.append(number)
        else:
            given.append(stream if isinstance(stream, int) else stream.fileno())
        pipes.append(pipe)
    order = {"module": module, "arguments": list(arguments), "folder": str(Path.cwd())}
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(address)
    message = json.dumps({**order, "environment": dict(env)})
    socket.send_fds(connection, [message.encode()], given)
    process = Forked(connection, module)
    for end in own:
        os.close(end)
    _, process.stdout, process.stderr = pipes
    return process


def main() -> int:
    """For a script: this process is but a name for the other, whose streams are its own."""
    module, *arguments = sys.argv[1:]
    process = _forked(os.environ[ADDRESS], module, arguments, os.environ, (None, None, None))
    return process.wait()


if __name__ == "__main__":
    sys.exit(main())
