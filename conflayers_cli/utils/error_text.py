"""Texts of error messages, and errors of other packages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def first_line(error: BaseException) -> str:
    """An error's first line, with the next one where it ends with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    announced = f" {lines[1]}" if lines[0].endswith(":") and len(lines) > 1 else ""
    return (lines[0] + announced).rstrip(".")


def triton_errors() -> tuple[type[Exception], ...]:
    """Errors of kernels that triton can't compile or run here; none without triton."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return ()
    return (TritonError,)


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """A clause for the end of an error: ``; did you mean X?``, or nothing where no name is near.

    ``cutoff`` is the similarity needed, from 0 to 1.
    """
    names = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), names, n=1, cutoff=cutoff)
    return f"; did you mean {names[close[0]]}?" if close else ""
