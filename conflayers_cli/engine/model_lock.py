"""Passes of one model one at a time, whoever asks for them.

A plan is applied by swapping modules of the model itself, recorded passes read what they are given
from buffers that all of them share, and whoever observes modules sees every pass. So a pass has the
model for itself, and so has whoever watches or changes its modules, for as long as that takes.
Between passes the state of a decoding is its own: texts may be decoded in several threads at once,
each with a drafter of its own.
"""

from __future__ import annotations

import threading
from typing import Any

_ATTRIBUTE = "conflayers_lock"
"""Where a model keeps its lock: several decoders may have been made for it."""


class ModelLock:
    """A lock that its holder may take again; it takes a fraction of a microsecond."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> ModelLock:
        self._lock.acquire()
        return self

    def __exit__(self, *of_error: object) -> None:
        self._lock.release()

    def acquire(self) -> bool:
        """Acquire it if that needs no waiting; whether it did. To be released by `release`."""
        return self._lock.acquire(blocking=False)

    def release(self) -> None:
        """Release what was acquired."""
        self._lock.release()

    def __reduce__(self) -> tuple[type[ModelLock], tuple[()]]:
        """A copy of a model is a model of its own."""
        return ModelLock, ()


def lock_of(model: Any) -> ModelLock:
    """The lock of a model, the same for all who ask."""
    lock: ModelLock | None = getattr(model, _ATTRIBUTE, None)
    if lock is None:
        lock = ModelLock()
        setattr(model, _ATTRIBUTE, lock)
    return lock
