"""A process that was forked for a test is as one that was started."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ADDRESS, Forked, environment, start, zygote

PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are started there")


def module(folder: Path, code: str) -> dict[str, str]:
    """An environment in which ``-m own`` runs this code."""
    (folder / "own.py").write_text(code)
    more = os.pathsep.join([str(folder), environment()["PYTHONPATH"]])
    return environment(PYTHONPATH=more, OWN="ü")


TELLING = """
import json, os, signal, sys
print("a word", file=sys.stderr, end="")
heeds = signal.getsignal(signal.SIGINT) is signal.default_int_handler
print(json.dumps([__name__, sys.argv[1:], os.getcwd(), os.environ["OWN"], heeds, sys.stdin.read()]))
sys.exit(7)
"""


def test_what_it_is_given_and_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    process = start("own", ["--x", 1, "ö"], env=module(tmp_path, TELLING), **PIPES)
    assert isinstance(process, Forked)
    out, err = process.communicate(timeout=60)
    assert out is not None and err == b"a word"
    assert json.loads(out) == ["__main__", ["--x", "1", "ö"], str(tmp_path), "ü", True, ""]
    assert process.returncode == process.poll() == process.wait() == 7
    process.kill()  # no other process by now


def test_it_has_imported_what_takes_long(tmp_path: Path) -> None:
    code = "import sys\nsys.exit(not {'torch', 'transformers'} <= set(sys.modules))"
    assert start("own", [], env=module(tmp_path, code)).wait(60) == 0


SLEEPING = """
import sys, time
print("asleep", flush=True)
try:
    time.sleep(600)
finally:
    print("awake")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals(number: signal.Signals, tmp_path: Path) -> None:
    process = start("own", [], env=module(tmp_path, SLEEPING), **PIPES)
    assert process.stdout is not None and process.stdout.readline() == b"asleep\n"
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (-number, b"awake\n" if number == signal.SIGINT else b"")
    assert err is not None and (b"KeyboardInterrupt" in err) == (number == signal.SIGINT)


def test_a_terminal_is_one(tmp_path: Path) -> None:
    code = "import sys\nprint(sys.stdin.isatty(), sys.stdout.line_buffering)\nprint(input())"
    master, slave = pty.openpty()
    process = start("own", [], env=module(tmp_path, code), stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    os.write(master, b"hello\n")
    assert process.wait(60) == 0
    shown = os.read(master, 4096).replace(b"\r\n", b"\n")
    os.close(master)
    assert shown.endswith(b"hello\n") and b"True True\n" in shown


def test_a_closed_pipe_is_noticed(tmp_path: Path) -> None:
    process = start("own", [], env=module(tmp_path, "print('x' * 10**6)"), **PIPES)
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err is not None and b"BrokenPipeError" in err


def test_for_scripts(tmp_path: Path) -> None:
    env = {**module(tmp_path, TELLING), ADDRESS: zygote()}
    command = [sys.executable, "-S", "-m", "tests.processes", "own", "-v"]
    done = subprocess.run(command, env=env, input=b"in", capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (7, b"a word")
    assert json.loads(done.stdout)[1::4] == [["-v"], "in"]
