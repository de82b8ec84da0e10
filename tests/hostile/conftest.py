"""The command line on a tiny model, as its own tests have it, and how a refusal has to look."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Run, model, own_cache, profile, run

__all__ = ["Refuse", "model", "own_cache", "profile", "refused", "run"]

Refuse = Callable[..., str]
LONGEST = 700
"""Characters of an error line; a path of the tests' folders is a hundred or so of them."""


@pytest.fixture
def refused(run: Run, tmp_path: Path) -> Refuse:
    """Runs the command line and gives the one line that it says before it ends with code 2."""

    def go(*arguments: object, stdin: bytes | None = None) -> str:
        before = set(tmp_path.rglob("*"))
        result = run(*arguments, stdin=stdin)
        assert (result.code, result.out) == (2, ""), result.err
        assert len(result.err.splitlines()) == 1, result.err
        assert result.err.startswith("conflayers: error: ")
        assert len(result.err) < LONGEST
        assert result.err.removesuffix("\n").isprintable()
        assert set(tmp_path.rglob("*")) == before, "a file was begun"
        return result.err.removeprefix("conflayers: error: ").rstrip("\n")

    return go
