"""One lock per model: a pass, and whatever observes or changes modules, has the model for itself.

A plan is applied by swapping modules of the model itself, and recorded passes share their input
buffers. Between passes the state of a decoding is its own, so several threads may decode at once,
each with a proposer of its own.
"""

from __future__ import annotations

import threading
from typing import Any

_ATTRIBUTE = "conflayers_lock"
"""Where a model keeps its lock: several decoders may have been made of it."""


class ModelLock:
    """A re-entrant lock; unlike `threading.RLock` it may be copied, and a copy is another lock."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.acquire = self._lock.acquire
        self.release = self._lock.release

    def __enter__(self) -> ModelLock:
        self.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def __reduce__(self) -> tuple[type[ModelLock], tuple[()]]:
        return ModelLock, ()


def get_lock(model: Any) -> ModelLock:
    """The lock of a model, the same for all decoders made of it."""
    lock: ModelLock | None = getattr(model, _ATTRIBUTE, None)
    if lock is None:
        lock = ModelLock()
        setattr(model, _ATTRIBUTE, lock)
    return lock
