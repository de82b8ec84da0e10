"""Notices: silent for a library's user, routed by `logging`, on stderr for the command line."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading

import pytest

from conflayers_cli.utils.notices import LOGGER, collect_notices, notices_to_stderr, quiet

logger = logging.getLogger(f"{LOGGER}.some.module")


def test_a_library_says_nothing_of_itself() -> None:
    script = (
        "import logging, conflayers_cli\n"
        "logging.getLogger('conflayers_cli.engine').warning('note: something')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")


def test_notices_can_be_routed(caplog: pytest.LogCaptureFixture) -> None:
    logger.warning("note: something")
    logger.info("some figure")
    assert caplog.messages == ["note: something"]


def test_on_stderr_for_the_time_of_a_command(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    package = logging.getLogger(LOGGER)
    before = package.level, package.propagate, list(package.handlers)
    with notices_to_stderr():
        logger.info("100 % of\nall")
        logger.error("error: \x1b[31m")
    assert capsys.readouterr().err == "conflayers: 100 % of all\nconflayers: error: ␛[31m\n"
    with quiet(True), notices_to_stderr():
        logger.error("error: not heard")
    assert capsys.readouterr().err == ""
    assert (package.level, package.propagate, package.handlers) == before
    assert caplog.messages == []


def test_threads_are_quiet_along(capsys: pytest.CaptureFixture[str]) -> None:
    with quiet(True), notices_to_stderr():
        thread = threading.Thread(target=logger.info, args=("from a thread",))
        thread.start()
        thread.join()
    assert capsys.readouterr().err == ""


def test_what_is_collected_is_said_nowhere_else(capsys: pytest.CaptureFixture[str]) -> None:
    outer: list[str] = []
    inner: list[str] = []
    with notices_to_stderr(), collect_notices(outer):
        logger.warning("one")
        with collect_notices(inner):
            logger.warning("two\nlines")
        logger.warning("three")
    assert (outer, inner) == (["one", "three"], ["two lines"])
    assert capsys.readouterr().err == ""


def test_each_thread_collects_its_own() -> None:
    both = threading.Barrier(2)
    found: dict[str, list[str]] = {"a": [], "b": []}

    def work(name: str) -> None:
        with collect_notices(found[name]):
            both.wait()
            logger.warning(name)
            both.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"a": ["a"], "b": ["b"]}
