"""A peer in a process of its own, which keeps its model loaded: one JSON document a line.

The first line that a worker writes says that its model is loaded, and with which versions; then
every line that it reads is a request, and every line that it writes the answer. Whatever libraries
print goes to standard error. It needs nothing of this package but :mod:`.peer_engines`, so that it
runs in the peers' own environment.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

Answer = dict[str, Any]
_LAST = 2000
"""Characters of a dead worker's log that are shown."""


class PeerError(Exception):
    """A peer can't do what it is asked; the message is its own."""


class Worker:
    """A peer's process. Its log is written to a file, and is gone with the worker if all went well.

    Args:
        python: the interpreter, of the peer's environment.
        spec: what `peer_engines.make_engine` makes of it.
        log: where what the peer prints goes.

    Raises:
        PeerError: the peer can't load the model.
    """

    def __init__(self, python: str | Path, spec: Answer, log: Path) -> None:
        self._log = log
        threads = str(spec["threads"])
        quiet = {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0"}
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [str(python), "-m", "benchmarks.peer_worker", json.dumps(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **quiet},
                text=True,
            )
        try:
            self.loaded = self._read()
        except PeerError:
            self.close()
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def call(self, operation: str, **arguments: Any) -> Answer:
        """Ask for something, and wait for it.

        Raises:
            PeerError: it can't, or has died.
        """
        stream = self._process.stdin
        try:
            if stream is None:
                raise BrokenPipeError
            stream.write(json.dumps({"operation": operation, **arguments}) + "\n")
            stream.flush()
        except BrokenPipeError:
            raise PeerError(self._last_words()) from None
        return self._read()

    def close(self) -> None:
        """End the process."""
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()

    def _read(self) -> Answer:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise PeerError(self._last_words())
        answer: Answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()  # it has closed its end
        text = self._log.read_text(encoding="utf-8", errors="replace")
        return f"the worker ended (code {code}): {text[-_LAST:]}"


def resident(peak: bool = False) -> int | None:
    """This process's memory in bytes, files mapped into it included, or the peak; Linux only."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(rf"^{'VmHWM' if peak else 'VmRSS'}:\s*(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def serve(engine: Any, requests: IO[str], answers: IO[str]) -> None:
    """Load an engine's model and answer requests until there are no more.

    What an engine raises is its answer: peers raise whatever they like.
    """
    base = resident()  # the libraries are imported, the model is not loaded

    def load() -> Answer:
        engine.load()
        return {"versions": engine.versions}

    def memory() -> Answer:
        peak = resident(peak=True)
        return {"bytes": None if peak is None or base is None else peak - base}

    def answer(act: Callable[..., Answer], **arguments: Any) -> None:
        try:
            found = act(**arguments)
        except Exception as error:  # noqa: BLE001
            found = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    answer(load)
    for line in requests:
        request = json.loads(line)
        operation = request.pop("operation")
        answer(memory if operation == "memory" else getattr(engine, operation), **request)


def main() -> None:
    """The worker's side."""
    from benchmarks.peer_engines import make_engine

    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(make_engine(json.loads(sys.argv[1])), sys.stdin, answers)


if __name__ == "__main__":
    main()
