"""The same in processes of their own: no traceback, no memory without bound, the exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import finished, start

PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


@pytest.mark.skipif(sys.platform == "win32", reason="it has no such devices")
def test_a_file_without_end_and_a_profile_with_aliases(tmp_path: Path) -> None:
    profile = tmp_path / "p.yaml"
    profile.write_text("a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(99)))
    processes = [
        start(["generate", "-m", "smollm2", "--data", "/dev/zero"], **PIPES),
        start(["generate", "Hello", "-p", profile], **PIPES),
    ]
    for process, expected in zip(processes, ("/dev/zero:1: has a NUL", "anchors"), strict=True):
        result = finished(process)
        assert (result.code, result.out) == (2, "")
        assert len(result.err.splitlines()) == 1
        assert expected in result.err


@pytest.mark.skipif(sys.platform != "linux", reason="arguments are bytes there")
def test_an_argument_that_is_no_text() -> None:
    module: list[str | bytes] = [sys.executable, "-m", "conflayers_cli.cli.main"]
    command = [*module, "generate", b"caf\xe9", "-m", "x"]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"conflayers: error: the prompt is not UTF-8 text\n"
