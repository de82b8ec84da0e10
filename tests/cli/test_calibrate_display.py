"""What calibrate says while it works, where there is no terminal."""

import io
import logging
import time

import pytest
from rich.console import Console

from conflayers_cli.cli import calibrate_display
from conflayers_cli.cli.calibrate_display import Display


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_time_left_follows_from_the_share_done() -> None:
    clock = Clock()
    display = Display("loading", clock)
    clock.now = 4.0
    assert display.status() == "loading: 4 s"
    display.stage("refining")
    clock.now = 14.0
    assert display.status() == "refining: 10 s"
    display.looked(7, 0.25)
    assert display.status() == "refining, 7 sets judged: 10 s, about 30 s left"
    display.looked(8, 0.2)  # never back
    assert display.status().endswith("about 30 s left")
    display.stage("checking")
    assert display.status() == "checking: 0 s"


def test_silence_is_broken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(calibrate_display, "SILENCE", 0.2)
    with caplog.at_level(logging.INFO, "conflayers_cli"), Display("loading") as display:
        for name in ("loading", "refining"):
            limit = time.monotonic() + 10
            while f"{name}: 0 s" not in caplog.text and time.monotonic() < limit:
                time.sleep(0.01)
            if name == "loading":
                display.begin(12)
                display.stage("refining")
    assert "loading: 0 s" in caplog.text and "loading …" not in caplog.text
    assert "refining …" in caplog.text
    assert "refining: 0 s" in caplog.text


def test_a_terminal_shows_nothing_until_the_model_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=80)
    monkeypatch.setattr(calibrate_display, "stderr_console", lambda: console)
    with Display("loading") as display:
        assert shown.getvalue() == ""  # the model's own bar may be shown
        display.begin(12)
        display.stage("refining")
        display.looked(7, 0.5)
    assert "refining, 7 sets judged" in shown.getvalue()
