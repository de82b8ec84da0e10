from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conflayers_cli import __version__
from conflayers_cli.cli import common, generate
from conflayers_cli.errors import ConfLayersError, GateError
from tests.cli.conftest import Run, finished, start

HEAVY = ("torch", "transformers", "scipy", "numpy", "safetensors", "conflayers_cli.profile.schema")


def test_version(run: Run) -> None:
    assert run("--version") == (result := run("--version"))
    assert (result.code, result.out, result.err) == (0, f"conflayers {__version__}\n", "")


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "-h"], ["bench", "--help"]])
def test_help_has_examples_and_goes_to_stdout(run: Run, arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.code == 0
    assert "conflayers bench -" in result.out or "conflayers generate " in result.out
    assert result.err == ""


def test_nothing_asked_for_is_wrong_usage_and_gets_the_help(run: Run) -> None:
    result = run()
    assert result.code == 2
    assert "calibrate" in result.out + result.err


@pytest.mark.parametrize("command", [[], ["generate"], ["bench"], ["calibrate"]])
def test_help_is_quick_and_loads_nothing_heavy(command: list[str]) -> None:
    # Typer itself may look up the parameters of a command by pydantic.
    heavy = HEAVY if command else (*HEAVY, "pydantic")
    script = (
        "import sys, time\nfrom conflayers_cli.cli.main import main\n"
        f"assert main({[*command, '--help']!r}) == 0\n"
        f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)\n"
        "print(time.process_time(), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    loaded, seconds = done.stderr.decode().splitlines()
    assert loaded == "[]"
    assert float(seconds) < 1.5  # of the processor: a busy machine is not our fault


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["genrate"], "did you mean 'generate'"),
        (["--nope"], "no such option: --nope"),
        (["generate", "hi", "--profil", "x"], "--profile"),
        (["generate", "hi", "--seed", "one"], "--seed"),
        (["generate", "hi", "--seed", "-1"], "--seed"),
        (["generate", "hi", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["generate", "--model"], "--model"),
        (["bench"], "--profile"),
        (["bench", "-p", "x.yaml", "--against", "vllm"], "--against"),
    ],
)
def test_wrong_usage_is_one_line_with_a_hint(run: Run, arguments: list[str], said: str) -> None:
    result = run(*arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("conflayers: error: ")
    assert result.err.count("\n") == 1
    assert said in result.err.lower()
    known = arguments[0] in ("generate", "bench")
    hint = f"see 'conflayers {arguments[0]} --help'" if known else "see 'conflayers --help'"
    assert hint in result.err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfLayersError("the disk\nis full"), 1, "error: the disk is full"),
        (GateError("too slow"), 3, "error: too slow"),
        (torch.OutOfMemoryError("CUDA out of memory."), 1, "error: out of memory: CUDA"),
        (MemoryError(), 1, "error: out of memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 TB"),
            1,
            "error: out of memory: Default",
        ),
        (TypeError("x is\nnone"), 1, "internal error: TypeError: x is (run with --debug"),
        (EOFError("short file"), 1, "internal error: EOFError: short file"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ConfLayersError("\x1b[31mred"), 1, "error: ␛[31mred"),
    ],
)
def test_failures_are_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(generate, "load_profile", fail)
    result = run("generate", "hi", "--model", "x")
    assert (result.code, result.out) == (code, "")
    assert result.err.strip().startswith(f"conflayers: {said}")
    assert len(result.err.strip().splitlines()) == 1


@pytest.mark.parametrize("arguments", [["--debug", "generate"], ["generate", "--debug"]])
def test_debug_shows_the_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    def fail(*arguments: object) -> None:
        raise TypeError("x is none")

    monkeypatch.setattr(generate, "load_profile", fail)
    result = run(*arguments, "hi", "--model", "x")
    assert result.code == 1
    assert "Traceback" in result.err
    assert result.err.endswith("conflayers: internal error: TypeError: x is none\n")


def test_debug_behind_two_dashes_is_a_prompt(run: Run, model: Path) -> None:
    result = run("generate", "--model", model, "--dtype", "float32", "-n", "1", "--", "--debug")
    assert result.code == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device here")
@pytest.mark.parametrize("arguments", [["--version"], ["--help"]])
def test_stdout_that_cannot_be_written(arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        result = finished(start(arguments, stdout=full, stderr=subprocess.PIPE))
    assert result.code == 1
    assert "Exception ignored" not in result.err
    assert "Traceback" not in result.err


def test_stdout_that_is_closed() -> None:
    read, write = os.pipe()
    os.close(read)
    result = finished(start(["--version"], stdout=write, stderr=subprocess.PIPE))
    os.close(write)
    assert result.code == 1
    assert result.err == ("conflayers: error: standard output was closed before all was written\n")


def test_stderr_that_is_closed_does_not_change_the_exit_code() -> None:
    read, write = os.pipe()
    os.close(read)
    result = finished(start(["generate", "hi"], stdout=subprocess.PIPE, stderr=write))
    os.close(write)
    assert (result.code, result.out) == (2, "")


def test_the_model_comes_from_the_flag_before_the_profile() -> None:
    assert common.model_source("smollm2", None) == "smollm2"
