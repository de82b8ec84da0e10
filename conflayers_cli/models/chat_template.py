"""Chat templates, which come with a model and are programs: run within bounds.

transformers runs them in Jinja's sandbox, which keeps them from attributes and files, but not from
loops without end nor from texts without measure. Here a template may take so many steps, counted
and not timed, so that what one machine accepts another does, too; and, where the system can say
so (Linux), so much memory over what the process has.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
from jinja2 import TemplateError

MOST_STEPS = 2_000_000
"""Lines of the compiled template, and calls. A chat of a thousand messages takes ten thousand."""
MEMORY = 1 << 30
"""Bytes. What a template writes is the messages and little more."""

_COMPILED = "<template>"

REFUSALS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""What a template comes to that can't be run to its end."""


class EndlessTemplateError(RuntimeError):
    """A template took more steps than any chat needs."""


@contextmanager
def bounded(steps: int = MOST_STEPS, memory: int = MEMORY) -> Iterator[None]:
    """Within: a template that doesn't end is stopped, and one that grows gets no more memory.

    Raises:
        EndlessTemplateError: it took more than ``steps``.
        MemoryError: it asked for more than ``memory`` bytes over what is taken already.
    """
    left = steps

    def step(frame: Any, event: str, argument: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise EndlessTemplateError(f"it has not ended after {steps:,} steps")
        # lines are counted in the template alone: elsewhere a call stands for all of them
        return step if frame.f_code.co_filename == _COMPILED else None

    before = sys.gettrace()
    with _less_memory(memory):
        sys.settrace(step)
        try:
            yield
        finally:
            sys.settrace(before)


@contextmanager
def _less_memory(more: int) -> Iterator[None]:
    """Within: the process can't take over ``more`` bytes, where the system can say so."""
    process = psutil.Process()
    if not hasattr(process, "rlimit"):  # it is Linux's
        yield
        return
    soft, hard = process.rlimit(psutil.RLIMIT_AS)
    bound = process.memory_info().vms + more
    if soft != psutil.RLIM_INFINITY:
        bound = min(bound, soft)
    with suppress(
        ValueError, OSError, psutil.Error
    ):  # the system allows less: then that is the bound
        process.rlimit(psutil.RLIMIT_AS, (bound, hard))
    try:
        yield
    finally:
        process.rlimit(psutil.RLIMIT_AS, (soft, hard))
