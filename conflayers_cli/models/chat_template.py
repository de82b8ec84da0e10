"""Limits for chat templates, which come with a model and are programs.

transformers runs them in Jinja's sandbox, which does not bound their time and memory. Here they
get a number of steps, which unlike seconds is the same on every machine, and on Linux some memory.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
from jinja2 import TemplateError

MAX_STEPS = 2_000_000
"""Lines of the compiled template, and calls. A chat of 1,000 messages takes 10,000."""
MAX_MEMORY = 1 << 30
"""Bytes."""

_COMPILED = "<template>"

TEMPLATE_ERRORS = (
    *(TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError),
    *(RuntimeError, SyntaxError, TypeError, ValueError),
)
"""What running a template may raise."""


class EndlessTemplateError(RuntimeError):
    """A template took too many steps."""


@contextmanager
def bounded_template(steps: int = MAX_STEPS, memory: int = MAX_MEMORY) -> Iterator[None]:
    """Within: a template gets so many steps, and so many bytes more than the process has.

    Raises:
        EndlessTemplateError, MemoryError: it needs more.
    """
    left = steps

    def step(frame: Any, event: str, argument: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise EndlessTemplateError(f"it has not ended after {steps:,} steps")
        # lines are counted in the template alone, elsewhere calls
        return step if frame.f_code.co_filename == _COMPILED else None

    before = sys.gettrace()
    with _memory_limit(memory):
        sys.settrace(step)
        try:
            yield
        finally:
            sys.settrace(before)


@contextmanager
def _memory_limit(more: int) -> Iterator[None]:
    process = psutil.Process()
    if not hasattr(process, "rlimit"):  # it is Linux's
        yield
        return
    soft, hard = process.rlimit(psutil.RLIMIT_AS)
    bound = process.memory_info().vms + more
    if soft != psutil.RLIM_INFINITY:
        bound = min(bound, soft)
    with suppress(ValueError, OSError, psutil.Error):  # the system allows less
        process.rlimit(psutil.RLIMIT_AS, (bound, hard))
    try:
        yield
    finally:
        process.rlimit(psutil.RLIMIT_AS, (soft, hard))
