"""What doctor found about one thing."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        section: what it belongs to.
        name: what it is.
        told: what was found.
        problem: what should work and does not, and what to do; None: it is well.
        advice: what could be better; None: nothing.
    """

    section: str
    name: str
    told: str
    problem: str | None = None
    advice: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The finding as JSON takes it."""
        return asdict(self)

    def shortened(self) -> Finding:
        """The same without the name of anybody's home, to be shown to others."""
        home = str(Path.home())
        if home in ("/", ""):
            return self

        def short(text: str | None) -> str | None:
            return None if text is None else text.replace(home, "~")

        return replace(
            self,
            told=self.told.replace(home, "~"),
            problem=short(self.problem),
            advice=short(self.advice),
        )


def summary(error: BaseException) -> str:
    """An error's kind and its first line."""
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line}".rstrip(": ")
