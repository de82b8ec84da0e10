"""`conflayers doctor`: what is well is told, what is broken is found, and no home is named."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from conflayers_cli.doctor import checks, packages, self_test
from conflayers_cli.doctor.check_result import CheckResult, summary
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.generation.loop import Generation
from tests.cli.conftest import Run
from tests.kernels.tape import TapeRecorder


def broken(document: Any) -> dict[str, str]:
    """The problems found, by what they are about."""
    return {f["name"]: f["problem"] for f in document["findings"] if f["problem"]}


def test_all_is_well(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("CONFLAYERS_CACHE", str(home / "kept"))
    result = run("doctor")
    assert (result.code, result.err) == (0, "")
    assert result.out.endswith("all is well\n")
    assert str(home) not in result.out
    assert "cache folder: ~/kept, new" in result.out
    assert not home.exists()  # looking leaves nothing behind
    assert f"torch: {torch.__version__}" in result.out
    message = [line for line in result.out.splitlines() if line.startswith("- self test: cpu")]
    assert len(message) == 2
    assert all(line.endswith(": the same") for line in message)


def test_as_json(run: Run) -> None:
    result = run("doctor", "--json")
    document = result.document
    assert (result.code, document["well"], document["schema_version"]) == (0, True, 1)
    sections = {finding["section"] for finding in document["findings"]}
    assert sections == {"versions", "devices", "memory", "threads", "files", "decoding"}


def test_the_self_test_notices_drafts_that_change_the_text(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Careless(Generation):
        """Keeps whatever was drafted."""

        def _verify(self, draft: Any) -> tuple[int, ...]:
            return (*draft.tokens, 1) if draft.tokens else super()._verify(draft)

    monkeypatch.setattr(self_test, "Generation", Careless)
    result = run("doctor", "--json")
    assert result.code == 1
    assert "drafts change the text" in broken(result.document)["self test"]
    assert result.err.count("\n") == 1
    assert result.err.startswith("conflayers: error: 2 problems found: ")


def test_a_broken_optional_package_is_a_finding(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "bitsandbytes.py").write_text("print('noise')\nraise RuntimeError('no such GPU')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    result = run("doctor", "--json")
    assert result.code == 1
    problems = broken(result.document)
    assert problems.keys() - {"peft"} == {"bitsandbytes"}  # peft imports it, unless it has before
    assert "can't be imported (RuntimeError: no such GPU)" in problems["bitsandbytes"]
    assert "noise" not in result.out + result.err
    text = run("doctor")
    assert text.code == 1
    assert "  - PROBLEM: bitsandbytes" in text.out
    assert text.out.endswith("not all is well, see PROBLEM\n")


def test_a_check_that_fails_does_not_end_the_others(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise KeyError("no such thing")

    monkeypatch.setattr(checks, "_processors", fails)
    document = run("doctor", "--json").document
    assert broken(document) == {"failed": "looking at threads failed: KeyError: 'no such thing'"}
    assert {"files", "decoding"} <= {finding["section"] for finding in document["findings"]}


def test_more_threads_than_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_processors", lambda: 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    first = next(checks._threads())
    assert first.problem is None
    assert "OMP_NUM_THREADS=1" in (first.advice or "")


def test_a_cache_folder_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CONFLAYERS_CACHE", str(tmp_path / "file"))
    (finding,) = checks._files()
    assert "CONFLAYERS_CACHE names another" in (finding.problem or "")


@pytest.mark.parametrize(
    ("built_for", "said"), [(None, "for the CPU alone"), ("13.0", "finds no GPU")]
)
def test_a_gpu_that_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, built_for: str | None, said: str
) -> None:
    (tmp_path / "version").touch()
    monkeypatch.setattr(checks, "_DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    problems = [finding.problem for finding in checks._gpus() if finding.problem]
    assert len(problems) == 1
    assert said in problems[0]


def test_versions_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=99", 'scikit-learn>=1.5; extra == "swift"', "typer"]
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    problems = {f.name: f.problem for f in packages.versions() if f.problem}
    assert list(problems) == ["torch"]
    assert "pip install 'torch>=99'" in (problems["torch"] or "")


def test_what_is_needed_and_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_REQUIRED", ("no_such_package_here",))
    (problem,) = [f.problem for f in packages.versions() if f.problem]
    assert "no_such_package_here can't be imported (it is not installed)" in problem


def ways(quick: Decoder) -> list[CheckResult]:
    """As on a GPU, with a stand-in for its graphs."""
    eager = Decoder(self_test.tiny_model(quick.device, quick.dtype), eager="compared with")
    return self_test.check_gpu_paths(quick, eager)


def test_the_quick_ways_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = Decoder(
        self_test.tiny_model(torch.device("cpu"), torch.float32), recorder=TapeRecorder()
    )
    replayed, kernels = ways(quick)
    assert replayed.problem is None
    assert replayed.message != "passes are replayed (0 recorded)"
    assert kernels.problem is None
    quick.disabled_paths = ("KernelForward: no compiler",)
    replay = quick.runner.run
    monkeypatch.setattr(quick.runner, "run", lambda *arguments: -replay(*arguments))
    replayed, kernels = ways(quick)
    assert "another text" in (replayed.problem or "")
    assert kernels.problem == "kernels failed: KernelForward: no compiler"


def test_passes_that_can_not_be_recorded() -> None:
    quick = Decoder(self_test.tiny_model(torch.device("cpu"), torch.float32))
    launched, _ = ways(quick)
    assert "no graphs: there are no graphs on cpu" in (launched.problem or "")


def test_a_finding_without_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    finding = CheckResult("s", "n", "in /home/ada/x", "at /home/ada", None)
    assert finding.shortened() == CheckResult("s", "n", "in ~/x", "at ~", None)
    monkeypatch.setenv("HOME", "/")
    assert finding.shortened() == finding
    assert summary(ValueError()) == "ValueError"
