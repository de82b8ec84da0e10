"""The result of one check of ``conflayers doctor``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class CheckResult:
    """The result of one check.

    Attributes:
        section, name: what was checked.
        message: what was found.
        problem: what should work and does not, and what to do; None: nothing is wrong.
        advice: what could be better; None: nothing.
    """

    section: str
    name: str
    message: str
    problem: str | None = None
    advice: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The fields for JSON, where the message's key is ``told``."""
        return {"told" if key == "message" else key: value for key, value in asdict(self).items()}

    def shortened(self) -> CheckResult:
        """The same with ``~`` for the home folder, whose name may be private."""
        home = str(Path.home())
        if home in ("/", ""):
            return self
        return CheckResult(**{k: v and v.replace(home, "~") for k, v in asdict(self).items()})


def summary(error: BaseException) -> str:
    """An error's class and its first line."""
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line}".rstrip(": ")
