"""What errors of other packages say, in one line."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """An error's message down to one line: the first, and what it announces by a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    announced = f" {lines[1]}" if lines[0].endswith(":") and len(lines) > 1 else ""
    return (lines[0] + announced).rstrip(".")
