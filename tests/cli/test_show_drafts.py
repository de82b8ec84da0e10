"""--show-drafts: colours on a terminal, the same text everywhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from conflayers_cli.cli import terminal
from conflayers_cli.utils.notices import terminal_safe
from tests.cli.conftest import Run, save_profile

COMMAND = ("generate", "abcabcabc", "--dtype", "float32", "-n", 30)


def test_the_colours_say_who_drafted(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = save_profile(tmp_path / "own.yaml", model)
    command = (*COMMAND, "--profile", profile)
    plain = run(*command)
    stats = run(*command, "--json").document["stats"]
    piped = run(*command, "--show-drafts")
    monkeypatch.setattr(terminal, "is_terminal", lambda stream: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    shown = run(*command, "--show-drafts")

    assert piped.out == plain.out
    assert stats["accepted"] > 0
    assert "\x1b[32m" in shown.out
    unstyled = re.sub(r"\x1b\[[0-9;]*m", "", shown.out)
    assert unstyled == terminal_safe(plain.out)


@pytest.mark.parametrize("other", ["--json", "--no-stream"])
def test_it_is_for_a_text_as_it_comes(run: Run, model: Path, other: str) -> None:
    result = run(*COMMAND, "--model", model, "--show-drafts", other)

    assert result.code == 2 and "--show-drafts" in result.err
