"""Ctrl-C and SIGTERM: whole lines, an exit code of their own, a line on stderr, no traceback."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from conflayers_cli.cli import generate
from conflayers_cli.cli.interruptions import Interruptions
from conflayers_cli.cli.main import main
from tests.cli.conftest import Result, Run, finished, write_prompts
from tests.processes import start

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise")


def grown(path: Path) -> None:
    """Wait until there is something in a file."""
    deadline = time.monotonic() + 200
    while not (path.exists() and path.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)


def ours(result: Result) -> list[str]:
    """All that was said; libraries say nothing here."""
    lines = result.err.splitlines()
    assert all(line.startswith("conflayers: ") for line in lines), result.err
    return lines


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
def test_signals_while_lines_are_written(
    number: signal.Signals, twice: bool, model: Path, tmp_path: Path
) -> None:
    data = write_prompts(tmp_path / "many.jsonl", *(f"prompt {i}" for i in range(400)))
    output = tmp_path / "out.jsonl"
    arguments = ["generate", "-m", model, "--data", data, "-o", output, "-n", "20"]
    pipe = subprocess.PIPE
    process = start("conflayers_cli", arguments, stdout=pipe, stderr=pipe)
    grown(output)
    process.send_signal(number)
    if twice:
        process.send_signal(number)
    result = finished(process)
    code = 130 if number == signal.SIGINT else 143
    # As the interpreter ends it gives signals their usual effect back: the second may come then.
    assert result.code in ((code, -number) if twice else (code,))
    assert ours(result)[-1] in (
        "conflayers: interrupted" if number == signal.SIGINT else "conflayers: terminated",
        *(["conflayers: 1 of 400 prompts are answered; --resume goes on from there"] * twice),
    )
    assert output.read_bytes().endswith(b"\n")


IMPORTING = """
import signal, sys
from conflayers_cli.__main__ import run

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                raise ImportError("something else")

sys.meta_path.insert(0, Interrupting())
sys.exit(run())
"""


def test_ctrl_c_while_modules_are_imported() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTING], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (130, b"")
    assert done.stderr == b"conflayers: interrupted\n"


def test_what_a_library_makes_of_an_interruption_is_one(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def importing(*arguments: object) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise ImportError("initialization failed") from None

    monkeypatch.setattr(generate, "load_profile", importing)
    before = signal.getsignal(signal.SIGTERM)
    result = run("generate", "hi", "--model", "x")
    assert (result.code, result.out, result.err) == (143, "", "conflayers: terminated\n")
    assert signal.getsignal(signal.SIGTERM) == before


class Finalised:
    """Interrupts as it is collected, where Python can't pass an exception on."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def test_an_interruption_in_a_finaliser_is_not_lost(capfd: pytest.CaptureFixture[str]) -> None:
    hook = sys.unraisablehook
    with pytest.raises(KeyboardInterrupt), Interruptions() as interruptions:
        Finalised()
        gc.collect()
        for _ in range(1000):
            time.sleep(0.001)
    assert interruptions.code == 130
    assert sys.unraisablehook is hook
    assert capfd.readouterr().err == ""


def test_who_ignores_ctrl_c_goes_on_ignoring_it() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruptions() as interruptions:
            signal.raise_signal(signal.SIGINT)
        assert interruptions.number is None
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_torchrun_may_end_a_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    for name, value in zip(names, ("1", "2", "1", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    with Interruptions():
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_in_another_thread_nothing_is_done(capfd: pytest.CaptureFixture[str]) -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["--version"])))
    thread.start()
    thread.join()
    assert codes == [0]
