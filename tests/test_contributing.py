"""What a contributor is told works: the hooks, the quick tests, the pages' links."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def made(target: str) -> list[str]:
    """The commands that make would run for a target."""
    found = subprocess.run(
        ["make", "--dry-run", "--always-make", target],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return found.stdout.splitlines()


def hooks() -> dict[str, dict[str, object]]:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repo["repo"] for repo in config["repos"]] == ["local"]  # nothing is fetched
    return {hook["id"]: hook for hook in config["repos"][0]["hooks"]}


def test_hooks_run_the_linters_that_make_runs() -> None:
    lint = made("lint")
    for hook in hooks().values():
        assert hook["language"] == "system"
        program, *words = str(hook["entry"]).split()
        assert program.startswith(".venv/bin/")
        if program == ".venv/bin/python":
            assert (ROOT / words[0]).is_file()
        else:
            command = [word for word in (program, *words) if word != "--force-exclude"]
            assert any(line.removesuffix(" .").split() == command for line in lint), command


def test_check_runs_tests_that_there_are() -> None:
    (command,) = [line for line in made("check") if "pytest" in line]
    files = [word for word in command.split() if word.startswith("tests/")]
    assert len(files) > 30
    assert "tests/test_contributing.py" in files
    assert all((ROOT / file).is_file() for file in files)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.py", b"x = 1\n", ""),
        ("a.py", b"", ""),
        ("a.py", b"x = 1", "has to end with one end of line"),
        ("a.py", b"x = 1\n\n", "has to end with one end of line"),
        ("a.py", b"x = 1 \ny\n", "a.py:1: ends with spaces"),
        ("a.md", b"hard break  \ny\n", ""),
        ("a.txt", b"\xff\n", "is not UTF-8"),
        ("a.yaml", b"a: 1\n---\nb: 2\n", ""),
        ("a.yaml", b"a: [1\n", "expected ',' or ']'"),
    ],
)
def test_the_hook_for_files(name: str, content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    found = subprocess.run(
        [sys.executable, ROOT / ".ci" / "files.py", name],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == bool(told)
    assert told in found.stderr
    assert bool(found.stderr) == bool(told)


@pytest.mark.parametrize("page", ["adapted.md", "contributing.md"])
def test_links_lead_to_files(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert all((DOCS / target).is_file() for target in targets), targets


def test_the_page_says_what_a_strategy_is_given() -> None:
    """What the table of ``contributing.md`` names exists."""
    from conflayers_cli.search.problem import SearchProblem

    text = (DOCS / "contributing.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`problem\.(\w+)", text))
    assert {"decoder", "objective", "continuations", "on_trial", "out_of_time", "memo"} <= named
    known = set(SearchProblem.__dataclass_fields__) | {
        n for n in vars(SearchProblem) if not n.startswith("_")
    }
    assert named <= known
